"""Linear layers over dense and quantized weights, and the packed forms that torch's int4 kernels take.

A quantized weight is held once. At 4 bit it is packed for `_weight_int4pack_mm_for_cpu` (CPU) or
`_weight_int4pack_mm` (CUDA), w = (q - 8) * scale + zero with zero = bias + 8 * scale; whatever the kernels refuse
stays as stored. Products of many rows, and those in float32, go through dequantized blocks of rows and a dense
product, which is faster there (measured: 512 rows of an 8192 x 2048 product take 15 ms instead of 91 ms with
AVX-512 and AMX). The packed layouts belong to torch and the CPU, so they are learned by packing a probe.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n_mlx.backends.torch.weights import Weights
from g3n_mlx.checkpoint.quantization import Quantization

# Weights dequantized at a time: 4 MiB in bfloat16, so that a block stays in the second-level caches.
BLOCK_WEIGHTS = 1 << 21
# Rows packed at a time: bounds the int32 codes; a multiple of every kernel's block of rows.
PACK_ROWS = 1024
CUDA_INNER_K_TILES = 8


def linear(weights: Weights) -> "Linear | QuantizedLinear | PackedLinear":
    """The layer for a weight [N, K] in whatever form it is stored."""
    quantization = weights.quantization()
    if quantization is None:
        return Linear(weights)
    if packs(weights, quantization):
        return PackedLinear(weights, quantization)
    return QuantizedLinear(weights, quantization)


class Linear(nn.Module):
    """y = x W^T with a dense W [N, K]."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights.tensor(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return F.linear(padded(x), self.weight)[..., : x.shape[-2], :]

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the weight, [T] -> [T, K], in its dtype."""
        return F.embedding(ids, self.weight)


class QuantizedLinear(nn.Module):
    """y = x W^T with W as stored: packed codes [N, K * bits / 32], scales and biases [N, K / group size]."""

    def __init__(self, weights: Weights, quantization: Quantization) -> None:
        super().__init__()
        self.bits, self.group_size = quantization.bits, quantization.group_size
        self.dtype = weights.dtype
        self.weight = weights.stored("weight")
        self.scales = weights.stored("scales")
        self.biases = weights.stored("biases")

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        in_features = self.scales.shape[1] * self.group_size
        return blockwise_product(x, self.weight.shape[0], in_features, 1, self.dequantized)

    def dequantized(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """W^T of the rows [start, stop): [K, rows]."""
        return self.rows(slice(start, stop), dtype).t()

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the weight, [T] -> [T, K], in the activations' dtype."""
        return self.rows(ids, self.dtype)

    def rows(self, chosen: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantized rows [n, K]."""
        codes = unpacked(self.weight[chosen], self.bits)
        scales, biases = self.scales[chosen].float(), self.biases[chosen].float()
        codes = codes.view(codes.shape[0], -1, self.group_size)
        return torch.addcmul(biases[..., None], codes.float(), scales[..., None]).flatten(1).to(dtype)


class PackedLinear(nn.Module):
    """y = x W^T with a 4-bit W in the form of torch's int4 kernels."""

    def __init__(self, weights: Weights, quantization: Quantization) -> None:
        super().__init__()
        self.group_size = quantization.group_size
        self.out_features = weights.shape()[0]
        self.in_features = weights.shape("scales")[1] * self.group_size
        self.dtype = weights.dtype
        self.packed = empty_packed(self.out_features, self.in_features, weights.device)
        # [K / group size, N, 2]: scale and zero of every group, the kernels' order
        shape = (self.in_features // self.group_size, self.out_features, 2)
        self.scales_and_zeros = torch.empty(shape, dtype=weights.dtype, device=weights.device)
        for start in range(0, self.out_features, PACK_ROWS):
            self._pack(weights, start, min(start + PACK_ROWS, self.out_features))

    def _pack(self, weights: Weights, start: int, stop: int) -> None:
        """Reads, packs and places the rows [start, stop)."""
        per_row = self.packed.numel() // self.out_features
        packed = packed_codes(unpacked(weights.stored("weight", start, stop), 4))
        self.packed.view(-1)[start * per_row : stop * per_row] = packed.view(-1)
        scales, biases = (weights.stored(name, start, stop).float() for name in ("scales", "biases"))
        self.scales_and_zeros[:, start:stop, 0] = scales.t()
        self.scales_and_zeros[:, start:stop, 1] = (biases + 8 * scales).t()

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        x = x.contiguous()  # the kernels refuse a slice of the streams
        if x.device.type == "cuda":
            return torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group_size, self.scales_and_zeros)
        if x.shape[0] < dense_product_rows() and x.dtype == torch.bfloat16:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.scales_and_zeros)
        return blockwise_product(x, self.out_features, self.in_features, packing_block_rows(), self.dequantized)

    def dequantized(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """W^T of the rows [start, stop), whole packing blocks but for the last: [K, rows]."""
        block_rows = packing_block_rows()
        whole = (stop - start) // block_rows * block_rows
        pieces = [self._dequantized_blocks(start, start + whole, block_rows, dtype)] if whole else []
        if start + whole < stop:
            pieces.append(self._dequantized_blocks(start + whole, stop, stop - start - whole, dtype))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _dequantized_blocks(self, start: int, stop: int, block_rows: int, dtype: torch.dtype) -> Tensor:
        groups, size, blocks = self.in_features // self.group_size, self.group_size, (stop - start) // block_rows
        planes = nibble_rows(block_rows)
        assert planes is not None, block_rows  # `packs` has seen to it
        low_rows, high_rows = planes
        packed = self.packed.view(-1)[start * self.in_features // 2 : stop * self.in_features // 2]
        packed = packed.view(blocks, self.in_features, block_rows // 2)
        out = torch.empty(self.in_features, blocks, block_rows, dtype=dtype, device=packed.device)
        # The bytes become signed codes -8..7 first: 8-bit arithmetic is the cheapest there is.
        out[:, :, low_rows] = (packed & 15).sub_(8).view(torch.int8).transpose(0, 1)
        out[:, :, high_rows] = (packed >> 4).sub_(8).view(torch.int8).transpose(0, 1)
        scales, zeros = self.scales_and_zeros[:, start:stop].to(dtype).unbind(-1)  # [K / group size, rows]
        out = out.view(groups, size, stop - start)
        torch.addcmul(zeros.contiguous()[:, None], out, scales.contiguous()[:, None], out=out)
        return out.view(self.in_features, stop - start)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the weight, [T] -> [T, K], in the activations' dtype, out of the packed form."""
        block_rows = EMBED_BLOCK_ROWS[self.packed.device.type]()
        nibbles = nibble_index(block_rows, self.in_features, self.packed.device)[ids % block_rows]  # [T, K]
        blocks = self.packed.view(torch.uint8).view(-1, block_rows * self.in_features // 2)[ids // block_rows]
        codes = (blocks.gather(1, nibbles >> 1) >> (4 * (nibbles & 1)).to(torch.uint8)) & 15
        scales, zeros = self.scales_and_zeros[:, ids].unbind(-1)  # [K / group size, T]
        codes = (codes.float() - 8).view(ids.shape[0], -1, self.group_size)
        return (
            torch.addcmul(zeros.t()[..., None].float(), codes, scales.t()[..., None].float()).flatten(1).to(self.dtype)
        )


def blockwise_product(
    x: Tensor,
    out_features: int,
    in_features: int,
    block_rows: int,
    dequantized: Callable[[int, int, torch.dtype], Tensor],
) -> Tensor:
    """x W^T in dense products with blocks of dequantized rows, in the dtype that the device multiplies fastest.

    x: [T, K]. `dequantized(start, stop, dtype)` gives W^T of these rows; blocks are multiples of `block_rows`.
    """
    dtype = dense_product_dtype(x.dtype, x.device.type)
    rows = max(1, BLOCK_WEIGHTS // in_features // block_rows) * block_rows
    y = x.new_empty(x.shape[0], out_features)
    operand = padded(x.to(dtype))
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        y[:, start:stop] = (operand @ dequantized(start, stop, dtype))[: x.shape[0]]
    return y


def padded(x: Tensor, dim: int = -2) -> Tensor:
    """x with zeros behind its rows, the entries of a dimension, up to one of few counts: at most a quarter more.

    For bfloat16 on a CPU, where oneDNN compiles a kernel for every count of rows that it meets and keeps it: 17 ms and
    0.6 MB each, so that every new length of a prompt took 0.1 s and 3 MB more.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return x
    rows = x.shape[dim]
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    missing = -rows % step
    behind = x.dim() - 1 - dim % x.dim()  # dimensions behind this one: the last is padded first
    return F.pad(x, (0, 0) * behind + (0, missing)) if missing else x


@cache
def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 matrices with AMX."""
    return torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage] (there is no public way to ask)


@cache
def dense_product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """On a CPU bfloat16 products pay only with AMX; without it float32 is faster, AVX-512's bfloat16 included."""
    if dtype != torch.bfloat16 or device_type != "cpu" or has_amx():
        return dtype
    return torch.float32


@cache
def dense_product_rows() -> int:
    """Rows of bfloat16 activations from which dequantized blocks beat the CPU's int4 kernel.

    Measured on an 8192 x 2048 weight, two cores: the kernel takes 0.18 ms a row with AVX-512 and 0.32 with AVX2; the
    blocks take 9 ms, and then 0.01 ms a row with AMX, 0.08 in float32.
    """
    if has_amx():
        return 48
    return 96 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 40


def packs(weights: Weights, quantization: Quantization) -> bool:
    """Whether torch's int4 kernel for the device takes this weight."""
    rows, in_features = weights.shape()[0], weights.shape("scales")[1] * quantization.group_size
    if quantization.bits != 4 or quantization.group_size not in (32, 64, 128):
        return False
    if weights.device.type == "cuda":
        # AMD's build calls itself CUDA too, and packs in other tiles.
        kernel = (
            torch.version.hip is None
            and weights.dtype == torch.bfloat16
            and torch.cuda.get_device_capability(weights.device) >= (8, 0)
        )
        return kernel and rows % 8 == 0 and in_features % (16 * CUDA_INNER_K_TILES) == 0
    tail = rows % packing_block_rows() if packing_block_rows() else 0
    return packing_block_rows() > 0 and rows % 16 == 0 and (tail == 0 or nibble_rows(tail) is not None)


def empty_packed(rows: int, in_features: int, device: torch.device) -> Tensor:
    """Room for the packed form of [N, K] 4-bit codes; rows fill it in order."""
    if device.type == "cuda":
        shape = (rows // 8, in_features // (16 * CUDA_INNER_K_TILES), 32, CUDA_INNER_K_TILES // 2)
        return torch.empty(shape, dtype=torch.int32, device=device)
    return torch.empty(rows, in_features // 2, dtype=torch.uint8)


def packed_codes(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] in the form of the device's int4 kernel."""
    if codes.device.type == "cuda":
        pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
        return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), CUDA_INNER_K_TILES)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)


@cache
def packing_block_rows() -> int:
    """Rows that the CPU packing keeps together: the largest block whose layout is known; 0 if none is."""
    return next((rows for rows in (64, 32, 16) if nibble_rows(rows) is not None), 0)


@cache
def nibble_rows(block_rows: int) -> tuple[slice, slice] | None:
    """Which rows of a block, [K, block_rows / 2] bytes on the CPU, the low and the high nibbles hold; None if not so.

    Learned by packing a probe whose codes are the digits of the row and, once, of the column.
    """
    in_features = 32
    row = torch.arange(block_rows)[:, None].expand(-1, in_features)
    column = torch.arange(in_features)[None].expand(block_rows, -1)
    digits = [_nibbles(packed_codes((code & 15).to(torch.uint8))) for code in (row, row >> 4, column)]
    rows = (digits[0] + 16 * digits[1]).view(in_features, block_rows // 2, 2)
    columns = digits[2].view(in_features, block_rows // 2, 2)
    regular = (rows == rows[:1]).all() and (columns == (torch.arange(in_features) & 15)[:, None, None]).all()
    planes = [_as_slice(plane.tolist()) for plane in rows[0].unbind(-1)]
    return (planes[0], planes[1]) if regular and planes[0] is not None and planes[1] is not None else None


def _as_slice(indices: list[int]) -> slice | None:
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    stop = indices[-1] + 1
    return slice(indices[0], stop, step) if step > 0 and indices == list(range(indices[0], stop, step)) else None


@cache
def nibble_index(block_rows: int, in_features: int, device: torch.device) -> Tensor:
    """Where a packed block holds the code of [row, column]: int64 [block_rows, K], counted in nibbles, low first."""
    flat = torch.arange(block_rows * in_features, device=device).view(block_rows, in_features)
    found, weight = torch.zeros(block_rows * in_features, dtype=torch.int64, device=device), 1
    while weight < block_rows * in_features:
        found += weight * _nibbles(packed_codes((flat // weight % 16).to(torch.uint8)))
        weight *= 16
    index = torch.empty_like(found)
    index[found] = torch.arange(block_rows * in_features, device=device)
    return index.view(block_rows, in_features)


def _nibbles(packed: Tensor) -> Tensor:
    data = packed.contiguous().view(torch.uint8).view(-1)
    return torch.stack([data & 15, data >> 4], dim=-1).view(-1).to(torch.int64)


EMBED_BLOCK_ROWS = {"cpu": packing_block_rows, "cuda": lambda: 8}


def gives_rows(layer: "Linear | QuantizedLinear | PackedLinear") -> bool:
    """Whether `embed` works on the layer: a packed one has to consist of whole blocks."""
    return not isinstance(layer, PackedLinear) or layer.out_features % EMBED_BLOCK_ROWS[layer.packed.device.type]() == 0


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """uint8 codes [n, K] of rows [n, K * bits / 32] (int32 with MLX's bits, the first code lowest)."""
    if bits in (2, 4, 8):
        data = packed.contiguous().view(torch.uint8)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((data[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    # 3, 5 and 6 bits: codes run across byte borders in units of 3, 5 and 3 bytes for 8, 8 and 4 codes.
    unit = {3: 3, 5: 5, 6: 3}[bits]
    data = packed.contiguous().view(torch.uint8).view(packed.shape[0], -1, unit).to(torch.int64)
    word = (data << (8 * torch.arange(unit, device=packed.device))).sum(-1, keepdim=True)
    shifts = torch.arange(0, 8 * unit, bits, device=packed.device)
    return ((word >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)

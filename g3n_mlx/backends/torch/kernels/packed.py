"""4-bit weights in the packed forms of torch's int4 kernels.

`_weight_int4pack_mm_for_cpu` (CPU) and `_weight_int4pack_mm` (CUDA) take w = (q - 8) * scale + zero with
zero = bias + 8 * scale. Products of many rows, and those in float32, go through dequantized blocks of rows and a dense
product, which is faster there (measured: 512 rows of an 8192 x 2048 product take 15 ms instead of 91 ms with
AVX-512 and AMX). The packed layouts belong to torch and the CPU, so they are learned by packing a probe.
"""

from functools import cache, cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n_mlx.backends.torch.kernels.dense import blockwise_product, dense_product_rows, unpacked
from g3n_mlx.backends.torch.weights import Weights
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.source import Ranges

# Rows packed at a time: bounds the int32 codes; a multiple of every kernel's block of rows.
PACK_ROWS = 1024

CUDA_INNER_K_TILES = 8

# Pieces of a weight of which slices are taken: E4B's published slices have halves of its FFN, users' own any eighth.
MAX_SLABS = 8


class PackedLinear(nn.Module):
    """y = x W^T with a 4-bit W in the form of torch's int4 kernels."""

    def __init__(self, packed: Tensor, scales_and_zeros: Tensor, group_size: int) -> None:
        """packed: see `empty_packed`. scales_and_zeros: [K / group size, N, 2] in the activations' dtype."""
        super().__init__()
        self.packed, self.scales_and_zeros, self.group_size = packed, scales_and_zeros, group_size
        self.out_features, self.in_features = scales_and_zeros.shape[1], scales_and_zeros.shape[0] * group_size
        self.dtype = scales_and_zeros.dtype

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

    def picked(self, rows: Ranges) -> "PackedLinear | None":
        """The layer over some ranges of rows, which are copied; None where they are not whole blocks."""
        block_rows = blocks(self.packed.device)[0]
        if any(border % block_rows for span in rows for border in span):
            return None
        per_row = self.out_features // self.packed.shape[0]
        packed = torch.cat([self.packed[start // per_row : stop // per_row] for start, stop in rows])
        scales = torch.cat([self.scales_and_zeros[:, start:stop] for start, stop in rows], dim=1)
        return PackedLinear(packed, scales, self.group_size)


def packed_linear(weights: Weights, quantization: Quantization) -> PackedLinear:
    """The layer for a 4-bit weight; reads and packs some rows at a time."""
    rows, group_size = weights.shape()[0], quantization.group_size
    groups = weights.shape("scales")[1]
    packed = empty_packed(rows, groups * group_size, weights.device)
    per_row = packed.numel() // rows
    scales_and_zeros = torch.empty(groups, rows, 2, dtype=weights.dtype, device=weights.device)
    for start in range(0, rows, PACK_ROWS):
        stop = min(start + PACK_ROWS, rows)
        codes = packed_codes(unpacked(weights.stored("weight", start, stop), 4))
        packed.view(-1)[start * per_row : stop * per_row] = codes.view(-1)
        scales, biases = (weights.stored(name, start, stop).float() for name in ("scales", "biases"))
        scales_and_zeros[:, start:stop, 0] = scales.t()
        scales_and_zeros[:, start:stop, 1] = (biases + 8 * scales).t()
    return PackedLinear(packed, scales_and_zeros, group_size)


class Slabs:
    """The rows or the columns of a packed weight in pieces of equal width, which the packed form as a whole has not.

    The first pieces are a smaller weight: what slices of a model share with it. Where the weight has a form that can't
    be taken apart, it is one piece.
    """

    def __init__(self, layer: PackedLinear, of_rows: bool) -> None:
        self.of_rows = of_rows
        self._layer: PackedLinear | None = layer
        block_rows, unit = blocks(layer.packed.device)
        step = block_rows if of_rows else max(unit, layer.group_size)
        self.size = layer.out_features if of_rows else layer.in_features
        counts = [n for n in range(1, MAX_SLABS + 1) if self.size % (n * step) == 0]
        self.count = max(counts, default=1) if layer.out_features % block_rows == 0 else 1
        self.width = self.size // self.count

    @cached_property
    def pieces(self) -> list[PackedLinear]:
        """The pieces, made at the first use."""
        layer, self._layer = self._layer, None
        assert layer is not None
        if self.count == 1:
            return [layer]
        scales = layer.scales_and_zeros.chunk(self.count, dim=1 if self.of_rows else 0)
        if self.of_rows:
            packed = layer.packed.chunk(self.count)
        else:
            shape, block_rows = layer.packed.shape, blocks(layer.packed.device)[0]
            tiles = layer.packed.view(layer.out_features // block_rows, self.count, -1).transpose(0, 1).contiguous()
            packed = tiles.view(self.count, shape[0], shape[1] // self.count, *shape[2:])
        return [
            PackedLinear(codes, both.contiguous(), layer.group_size) for codes, both in zip(packed, scales, strict=True)
        ]


class SlabLinear(nn.Module):
    """y = x W^T with the first rows or columns of a packed W."""

    def __init__(self, slabs: Slabs, size: int) -> None:
        """size: how many rows or columns."""
        super().__init__()
        self.slabs, self.size = slabs, size
        self.count = -(-size // slabs.width)

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]; sums over pieces are float32."""
        pieces, width = self.slabs.pieces[: self.count], self.slabs.width
        if self.slabs.of_rows:
            return torch.cat([piece(x) for piece in pieces], dim=-1)[:, : self.size]
        x = F.pad(x, (0, self.count * width - self.size))
        parts = [piece(x[:, n * width : (n + 1) * width]) for n, piece in enumerate(pieces)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0, dtype=torch.float32).to(x.dtype)

    def narrowed(self, rows: int | None, columns: int | None) -> "SlabLinear":
        """The layer over the first rows or columns; None is all of them."""
        size = rows if self.slabs.of_rows else columns
        return self if size is None else SlabLinear(self.slabs, size)


def blocks(device: torch.device) -> tuple[int, int]:
    """Rows and columns that the packed form keeps together."""
    return (8, 16 * CUDA_INNER_K_TILES) if device.type == "cuda" else (packing_block_rows(), 1)


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

"""Products with dense weights, and with quantized ones in blocks of rows that are dequantized first."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

# Weights dequantized at a time: 4 MiB in bfloat16, so that a block stays in the second-level caches.
BLOCK_WEIGHTS = 1 << 21
# Rows from which a product is worth copies of its weights in float32: of fewer a bfloat16 product reads half as much.
# Two cores with AVX2, 256 x 2048: 4 rows 0.35 ms and 0.27, 16 rows 1.4 and 0.4; 2048 x 7680: 16 rows 26 and 64 ms, 32
# rows 60 and 65, 256 rows 410 and 129.
_FLOAT32_ROWS = 24


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T over the last axis with a dense W [N, K], in the dtype that the device multiplies fastest.

    x: [..., T, K] -> [..., T, N], in x's dtype, which may be float32 over a W in bfloat16.
    """
    if x.dtype == weight.dtype and (
        x.shape[-2] < _FLOAT32_ROWS or x.dtype == dense_product_dtype(x.dtype, x.device.type)
    ):
        return F.linear(padded(x), weight)[..., : x.shape[-2], :]
    out_features, in_features = weight.shape
    rows = x.reshape(-1, in_features)
    y = blockwise_product(
        rows, out_features, in_features, 1, lambda start, stop, dtype: weight[start:stop].to(dtype).t()
    )
    return y.view(*x.shape[:-1], out_features)


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
def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16: with AMX, or AVX-512's instructions for it."""
    return has_amx() or torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]


@cache
def dense_product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of products with many rows: float32 for bfloat16 where a CPU has no instructions for that."""
    if dtype != torch.bfloat16 or device_type != "cpu" or multiplies_bfloat16():
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

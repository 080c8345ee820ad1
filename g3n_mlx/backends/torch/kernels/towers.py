"""Norms, 1 x 1 convolutions and attention of the towers' large maps, as a CPU does them fast.

torch's own forms read and write a map several times, and a map has up to 28 million numbers, which no cache holds.
On other devices they are what is used, and where gradients are wanted. Figures: two cores of a Zen 4, torch 2.13.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from g3n_mlx.backends.torch.kernels.dense import multiplies_bfloat16

Activation = Callable[[Tensor], Tensor]

# Numbers that are normalized at a time: in float32 they stay in the cores' own caches. Half as many cost more in calls
# than they save (2304 x 2560 in bfloat16: 1.3 ms, in blocks of half the size 1.5, as a whole 4.6).
_NORM_BLOCK = 1 << 19
# Rows of queries that attend at a time.
_QUERY_BLOCK = 2304
# Rows of a float32 product are filled up to a multiple of this; fewer are a product of MKL's.
_ROW_STEP = 64


def rms_norm_(x: Tensor, weight: Tensor, eps: float, activation: Activation | None = None) -> Tensor:
    """x / rms(x) * weight over the last axis, and a function of every number after that; overwrites x on a CPU.

    In float32 inside, up to the activation's result.
    """
    if x.device.type != "cpu" or not x.is_contiguous() or x.requires_grad or weight.requires_grad:
        normed = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
        return normed if activation is None else activation(normed)
    width = x.shape[-1]
    weight = weight.float()
    for block in x.view(-1, width).split(max(1, _NORM_BLOCK // width)):
        values = block.float()
        mean_square = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_().div_(width)
        values = values.mul_(mean_square.add_(eps).rsqrt_()).mul_(weight)
        if activation is not None:
            values = activation(values)
        if values.data_ptr() != block.data_ptr():
            block.copy_(values)
    return x


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T over the last axis, [..., I] and [O, I] -> [..., O].

    In float32 a CPU's convolutions are oneDNN's and its products MKL's, which on an AMD processor leaves AVX-512
    unused: 576 x 1280 x 2560 takes 9 ms as a convolution, 18 as a product. Without AVX-512 a product is as fast or
    faster (two cores with AVX2: 128 x 8192 x 256 at 68 GFLOP/s, 22 as a convolution). In bfloat16 both are oneDNN's.
    """
    weight = weight.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or count < _ROW_STEP
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not torch.backends.mkldnn.is_available()
    ):
        return F.linear(x, weight)
    # oneDNN compiles a kernel for every count of rows that it meets, so there should be few.
    if missing := -count % _ROW_STEP:
        rows = F.pad(rows, (0, 0, 0, missing))
    image = rows.view(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, I, rows, 1], channels_last
    out = F.conv2d(image, weight[:, :, None, None]).permute(0, 2, 3, 1)  # [1, rows, 1, O]
    return out.view(len(rows), -1)[:count].view(*x.shape[:-1], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v of one head without a mask, [B, 1, T, H], [B, 1, S, H] and [B, 1, S, V] -> [B, 1, T, V].

    Where the CPU multiplies bfloat16 the two products take a third of the fused kernel's time, which stays far
    below that rate (27,648 x 576 x 64: 8.8 ms instead of 22.8); in float32 they take the same.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.requires_grad or not multiplies_bfloat16():
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    for batch in range(q.shape[0]):
        keys = (k[batch, 0] * scale).T
        for rows, target in zip(q[batch, 0].split(_QUERY_BLOCK), out[batch, 0].split(_QUERY_BLOCK), strict=True):
            torch.mm(torch.softmax(rows @ keys, dim=-1), v[batch, 0], out=target)
    return out

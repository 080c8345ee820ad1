"""Quantized weights as they are stored, through the kernels in C (g3n_mlx/kernels): on a CPU, where they are built."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from g3n_mlx.backends.torch.weights import Weights
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.kernels import library

# Rows up to which the kernel beats products with dequantized blocks (measured with 4 bits on 8192 x 2048 weights).
KERNEL_ROWS = 16

SCALE_BITS = {torch.bfloat16: 16, torch.float32: 32}


def multiplies(weights: Weights, quantization: Quantization) -> bool:
    """Whether the kernels take this weight where it is to be placed."""
    return (
        weights.device.type == "cpu"
        and library.library() is not None
        and weights.dtype in SCALE_BITS
        and quantization.group_size in (32, 64, 128)
    )


def kernel_scales(scales: Tensor) -> Tensor:
    """Scales or biases in a dtype that the kernels read: float16 becomes float32."""
    return scales if scales.dtype in SCALE_BITS else scales.float()


def calls() -> ctypes.CDLL:
    """The library, with as many threads as PyTorch has."""
    found = shared_library()
    found.g3n_threads(torch.get_num_threads())
    return found


@cache
def shared_library() -> ctypes.CDLL:
    """The library on the threads of PyTorch's own OpenMP, where that is one with GCC's interface."""
    found = library.library()
    assert found is not None
    for path in Path(torch.__file__).parent.glob("lib/libgomp*"):
        openmp = ctypes.CDLL(str(path))  # the one that PyTorch has loaded
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        found.g3n_share(*(ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in names))
    return found


class StoredProduct:
    """y = x W^T with a quantized W left as it is stored."""

    def __init__(self, codes: Tensor, scales: Tensor, biases: Tensor, quantization: Quantization) -> None:
        """codes [N, K * bits / 32] int32, scales and biases [N, K / group size]: rows may lie apart."""
        self.tensors = codes, scales, biases  # kept alive for the pointers
        self.quantization = quantization
        self._units: tuple[Tensor, Tensor, Tensor] | None = None
        self.out_features, groups = scales.shape
        self.in_features = groups * quantization.group_size
        self.matrix = library.Matrix(
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            biases=biases.data_ptr(),
            code_stride=codes.stride(0) * codes.element_size(),
            scale_stride=scales.stride(0),
            rows=self.out_features,
            columns=self.in_features,
            bits=quantization.bits,
            group=quantization.group_size,
            scale_bits=SCALE_BITS[scales.dtype],
        )

    def over(self, codes: Tensor, scales: Tensor, biases: Tensor) -> "StoredProduct":
        """The product with the first rows and columns of W, given as views of these tensors."""
        other = StoredProduct(codes, scales, biases, self.quantization)
        if other.out_features == self.out_features:
            other._units = self._units
        return other

    def units(self) -> tuple[Tensor, Tensor, Tensor]:
        """A 4-bit W of whole blocks of 128 rows once more, column by column: codes, scales and biases.

        [K, N / 2], and twice [K / group size, N], of which the first K serve a W of fewer columns.
        """
        if self._units is None:
            codes = torch.empty(self.in_features, self.out_features // 2, dtype=torch.uint8)
            shape = self.in_features // self.quantization.group_size, self.out_features
            scales, biases = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
            calls().g3n_units(self.matrix, codes.data_ptr(), scales.data_ptr(), biases.data_ptr())
            self._units = codes, scales, biases
        return self._units

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N] in x's dtype; sums are float32."""
        found, rounded = calls(), x.dtype == torch.bfloat16
        operand = x.float().contiguous()
        y = torch.empty(x.shape[0], self.out_features)
        for start in range(0, x.shape[0], library.MAX_ROWS):
            some, out = operand[start : start + library.MAX_ROWS], y[start : start + library.MAX_ROWS]
            found.g3n_product(self.matrix, some.data_ptr(), rounded, some.shape[0], out.data_ptr())
        return y.to(x.dtype)

    def takes_int8(self) -> bool:
        """Whether the processor has instructions for `int8` with codes of these bits."""
        return self.matrix.bits <= calls().g3n_int8_bits()

    def int8(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N] in x's dtype, from x rounded to 8 bits in the weight's groups; T of any size."""
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.out_features)
        rounded = x.dtype == torch.bfloat16
        calls().g3n_int8_product(self.matrix, x.data_ptr(), rounded, x.shape[0], y.data_ptr())
        return y

    def dequantized(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of W: [stop - start, K]."""
        out = torch.empty(stop - start, self.in_features, dtype=dtype)
        calls().g3n_dequantize(self.matrix, start, stop, dtype == torch.bfloat16, out.data_ptr())
        return out

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of W, [T] -> [T, K], float32."""
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(ids.shape[0], self.in_features)
        calls().g3n_embed(self.matrix, ids.data_ptr(), ids.shape[0], out.data_ptr())
        return out

"""Why MLX_CONV_WINOGRAD is 0: MLX's Winograd convolution in bfloat16, recomputed in numpy beside the direct product.

Metal takes it for two 3 x 3 convolutions of the vision tower with 128 input channels; no other device does.
Source: MLX, backend/metal/kernels/conv.metal, WinogradTransforms<6, 3, 8>; every stored array is rounded as there.
"""

import ml_dtypes
import numpy as np
import pytest

CHANNELS, OUTPUTS, TILE = 128, 32, 6  # the tower's input channels; tiles give 6 x 6 outputs out of 8 x 8 inputs

INPUT = np.array(
    [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, -1, 0.5, -0.5, 2, -2, -1],
        [-5.25, 1, 1, 0.25, 0.25, 4, 4, 0],
        [0, -4.25, 4.25, -2.5, 2.5, -2.5, 2.5, 5.25],
        [5.25, -4.25, -4.25, -1.25, -1.25, -5, -5, 0],
        [0, 1, -1, 2, -2, 0.5, -0.5, -5.25],
        [-1, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
)
POINTS = (1, -1, 2, -2, 0.5, -0.5)
OUTPUT = np.array([[1, 0, 0, 0, 0, 0], *([x**power for power in range(6)] for x in POINTS), [0, 0, 0, 0, 0, 1]])
KERNEL = np.array(
    [
        [1, 0, 0],
        [-2 / 9, -2 / 9, -2 / 9],
        [-2 / 9, 2 / 9, -2 / 9],
        [1 / 90, 1 / 45, 2 / 45],
        [1 / 90, -1 / 45, 2 / 45],
        [32 / 45, 16 / 45, 8 / 45],
        [32 / 45, -16 / 45, 8 / 45],
        [0, 0, 1],
    ]
)


def rounded(x, dtype):
    return x.astype(dtype).astype(np.float64)


def winograd(tiles, kernels, dtype):
    """[n, 8, 8, C], [O, 3, 3, C] -> [n, 6, 6, O], with every array that the kernels store in this dtype."""
    transformed = rounded(np.einsum("ik,jl,nijc->nklc", INPUT, INPUT, tiles), dtype)
    weights = rounded(np.einsum("ki,lj,oijc->kloc", KERNEL, KERNEL, kernels), dtype)
    products = rounded(np.einsum("nklc,kloc->nklo", transformed, weights), dtype)
    return rounded(np.einsum("ki,lj,nklo->nijo", OUTPUT, OUTPUT, products), dtype)


def direct(tiles, kernels):
    windows = np.lib.stride_tricks.sliding_window_view(tiles, (3, 3), axis=(1, 2))  # [n, 6, 6, C, 3, 3]
    return np.einsum("nyxcij,oijc->nyxo", windows, kernels)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(ml_dtypes.bfloat16, 0.03, 0.08), (np.float32, 0.0, 1e-5)], ids=["bfloat16", "float32"]
)
def test_error_beside_the_direct_product(dtype, least, most):
    rng = np.random.default_rng(0)
    tiles = rounded(rng.standard_normal((4, TILE + 2, TILE + 2, CHANNELS)), dtype)
    kernels = rounded(rng.standard_normal((OUTPUTS, 3, 3, CHANNELS)) / np.sqrt(9 * CHANNELS), dtype)
    exact = direct(tiles, kernels)
    scale = np.sqrt(np.mean(exact**2))

    def error(found):
        return np.sqrt(np.mean((found - exact) ** 2)) / scale

    assert least <= error(winograd(tiles, kernels, dtype)) <= most
    assert error(rounded(exact, dtype)) < 0.003  # what is stored after the direct product

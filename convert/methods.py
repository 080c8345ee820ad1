"""How weights are quantized, by the names that users give: as MLX does it, or with more care (fitting.py)."""

from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np

from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.convert.fitting import Moments, Quantized, compensated, fitted, inverse_factors
from g3n_mlx.convert.quantize import Method, affine
from g3n_mlx.failures import BadValue, FileProblem, MissingFile

METHODS = ("affine", "mse", "gptq")
# Bits at which the plain grid is as good as any.
_PLAIN_BITS = 8
# Factors kept in memory: those of one module, and of the next, whose blocks of rows begin while its last ones end.
_KEPT_FACTORS = 2


def method_named(name: str, moments: Path | None) -> Method:
    """The method of a name. moments: the folder with the second moments of modules' inputs, for "gptq".

    Raises ValueError for a name that does not exist, or without what the method needs.
    """
    if name not in METHODS:
        raise BadValue(f"method is {name!r}, expected one of {', '.join(METHODS)}")
    if (moments is not None) != (name == "gptq"):
        raise BadValue("method 'gptq' needs the moments that a calibration measured, the others take none")
    if moments is None:
        return affine if name == "affine" else least_error
    if not moments.is_dir():
        raise MissingFile(f"{moments} is not a folder: expected one that a calibration filled")
    return Calibrated(moments)


def least_error(path: str, rows: np.ndarray, how: Quantization) -> Quantized:
    """With the least squared error of the weights."""
    if how.bits >= _PLAIN_BITS:
        return affine(path, rows, how)
    return fitted(rows, how.bits, how.group_size)


class Calibrated:
    """With the least error of products, where the inputs of a module were measured; else of the weights."""

    # Columns go one after the other, so few rows would be many small steps: 128 rows take twice the time of 1,024.
    least_rows = 1024

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, Lock()
        self._factors = lru_cache(_KEPT_FACTORS)(self._read)

    def __call__(self, path: str, rows: np.ndarray, how: Quantization) -> Quantized:
        file = moments_file(self._folder, path)
        if not file.is_file():
            return least_error(path, rows, how)
        with self._lock:  # the blocks of one module come from several threads at once
            factors = self._factors(file)
        return compensated(rows, how.bits, how.group_size, factors)

    def _read(self, file: Path) -> list[np.ndarray]:
        with np.load(file) as stored:
            moments = Moments([stored[name] for name in sorted(stored.files)])
        try:
            return inverse_factors(moments)
        except np.linalg.LinAlgError as error:
            raise FileProblem(
                f"{file}: what was measured there can't be used ({error}): delete it, and calibrate again with data "
                "that the model reads without overflow"
            ) from None


def moments_file(folder: Path, path: str) -> Path:
    """Where the second moments of a module's inputs are kept: blocks named in their order."""
    return folder / f"{path}.npz"

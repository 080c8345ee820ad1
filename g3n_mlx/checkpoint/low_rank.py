"""What an adapter adds to a weight: a product of two narrow matrices, and with DoRA a factor for each row."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from g3n_mlx.checkpoint.quantization import to_float32
from g3n_mlx.failures import BadValue

if TYPE_CHECKING:
    from g3n_mlx.checkpoint.source import Ranges


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The change of a weight W [N, K] into factor * (W + up down). All arrays are float32.

    A kernel's axes behind the first count as one, in the published order.
    Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353, whose factor is its magnitude over the norm of the row.
    """

    down: np.ndarray  # A [r, K]
    up: np.ndarray  # B [N, r] with the scale
    factor: np.ndarray | None = None  # [N]; None is 1

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return self.down.size + self.up.size + (0 if self.factor is None else self.factor.size)

    def merged(self, rows: np.ndarray, start: int = 0) -> np.ndarray:
        """Rows [start, start + n) of the changed weight, float32 in the shape of those that are given."""
        block = slice(start, start + len(rows))
        merged = to_float32(rows) + (self.up[block] @ self.down).reshape(rows.shape)
        if self.factor is not None:
            merged *= self.factor[block].reshape(-1, *[1] * (rows.ndim - 1))
        return merged

    def narrowed(self, rows: "Ranges | None", columns: "Ranges | None") -> "LowRank":
        """The change of some rows and columns of the weight; None is all of them."""
        factor = None if self.factor is None else _ranges(self.factor, rows)
        return LowRank(_ranges(self.down.T, columns).T, _ranges(self.up, rows), factor)

    def then(self, other: "LowRank") -> "LowRank":
        """This change, and another one of what it makes.

        Raises ValueError where the other one adds to rows that this one makes 0 by its factor.
        """
        up, factor = other.up, other.factor
        if self.factor is not None:
            gone = self.factor == 0
            if up[gone].any():
                raise BadValue(
                    "an adapter's DoRA magnitudes are 0 where the next adapter adds something, which can't be put "
                    "beside a quantized weight: merge them by converting the unquantized checkpoint with --adapter"
                )
            up = up / np.where(gone, np.float32(1), self.factor)[:, None]
            factor = self.factor if factor is None else self.factor * factor
        return LowRank(np.concatenate([self.down, other.down]), np.concatenate([self.up, up], axis=1), factor)


def _ranges(array: np.ndarray, ranges: "Ranges | None") -> np.ndarray:
    return array if ranges is None else np.concatenate([array[start:stop] for start, stop in ranges])

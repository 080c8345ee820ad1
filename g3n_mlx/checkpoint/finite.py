"""NaN and infinity: which arrays hold them, and which tensor of a checkpoint they come from."""

from math import prod

import ml_dtypes
import numpy as np

from g3n_mlx.checkpoint.folder import Checkpoint

# Of a tensor that is looked at, at once.
_BLOCK_BYTES = 4 << 20


def all_finite(rows: np.ndarray) -> bool:
    """Whether an array of any dtype is free of NaN and infinity."""
    if rows.dtype == ml_dtypes.bfloat16:
        exponent = np.uint16(0x7F80)  # all ones is NaN or infinity
        return not ((rows.view(np.uint16) & exponent) == exponent).any()
    return rows.dtype.kind != "f" or bool(np.isfinite(rows).all())


def not_finite(checkpoint: Checkpoint) -> str | None:
    """The first tensor that a model reads with NaN or infinity in it, and its file; None when there is none.

    Reads the whole checkpoint, some megabytes at a time.
    """
    for name in checkpoint.names:
        source = checkpoint.sources[name]
        if source.stored.dtype == "U32":  # packed codes
            continue
        length = source.shape[0] if source.shape else 1
        # A block of turned rows is read whole: tensors with axes of their own are small.
        row_bytes = max(1, prod(source.shape[1:]) * source.dtype.itemsize)
        step = length if source.axes else max(1, _BLOCK_BYTES // row_bytes)
        for start in range(0, length, step):
            if not all_finite(checkpoint.read(name, start, min(start + step, length))):
                return f"{name} (in {source.stored.shard.path.name})"
    return None

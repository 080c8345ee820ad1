"""The head that a file holds beside the token embedding: Gemma 3n's is the embedding itself, so both must be equal.

Trainers whose frameworks do not share tensors write it twice; safetensors' own `save_model` writes it once, by the name
that comes first in the alphabet, which is the head's.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from g3n_mlx.checkpoint.quantization import PARTS, to_float32
from g3n_mlx.checkpoint.shards import StoredTensor
from g3n_mlx.checkpoint.source import Source
from g3n_mlx.config.manifest import TEXT, TOKEN_TABLE
from g3n_mlx.failures import BadValue

_HEADS = ("lm_head", f"{TEXT}lm_head")
# Compared at once.
_BLOCK_BYTES = 4 << 20


def without_head(tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The tensors, by canonical names, without a head; one that stands alone becomes the embedding.

    Raises ValueError when a head differs from the embedding.
    """
    kept = dict(tensors)
    for head in _HEADS:
        parts = {part: kept.pop(f"{head}.{part}") for part in PARTS if f"{head}.{part}" in kept}
        if not parts:
            continue
        table = {part: kept[f"{TOKEN_TABLE}.{part}"] for part in PARTS if f"{TOKEN_TABLE}.{part}" in kept}
        if not table:
            kept |= {f"{TOKEN_TABLE}.{part}": stored for part, stored in parts.items()}
        elif parts.keys() != table.keys() or not all(_equal(stored, table[part]) for part, stored in parts.items()):
            raise BadValue(
                f"{folder} holds a head ({head}.weight) that differs from the token embedding ({TOKEN_TABLE}.weight), "
                "to which Gemma 3n ties it: a model with a head of its own can't be used; train with "
                "tie_word_embeddings"
            )
    return kept


def _equal(head: StoredTensor, table: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, whichever floats they are stored as."""
    if head.shape != table.shape or ("U32" in (head.dtype, table.dtype) and head.dtype != table.dtype):
        return False
    first, second = Source(head, head.shape), Source(table, table.shape)
    length = head.shape[0] if head.shape else 1
    step = max(1, _BLOCK_BYTES * length // max(1, head.num_bytes))
    for start in range(0, length, step):
        ours, theirs = (source.read(start, min(start + step, length)) for source in (first, second))
        if head.dtype == table.dtype:
            if ours.tobytes() != theirs.tobytes():
                return False
        elif not np.array_equal(to_float32(ours), to_float32(theirs)):
            return False
    return True

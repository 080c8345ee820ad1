"""How large a slice is before it is made: bytes on disk, and bytes that a text run keeps in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.recipe import choose_quantizations
from g3n_mlx.checkpoint.shards import DTYPES
from g3n_mlx.config.manifest import PLE_TABLE, dead_manifest, effective_parameters, text_manifest
from g3n_mlx.config.text import SLIDING, TextConfig
from g3n_mlx.matformer.plan import is_whole, plan_slice, slice_config
from g3n_mlx.matformer.table import Slice

# What a run takes besides weights: the KV caches of a conversation of this length, in bfloat16, ...
CONTEXT_TOKENS = 4096
_CACHE_ITEM_BYTES = 2
# ... and Python, the array framework and a short prompt's activations. On Linux with torch, 4 bits, VmHWM was 1.89 GB
# (E2B) and 3.20 GB (E4B): this makes the estimates 2.05 and 3.21 GB, on the safe side.
PROGRAM_BYTES = 620_000_000


@dataclass(frozen=True, slots=True)
class SizedSlice:
    """A slice with what it costs at some width of the weights."""

    slice: Slice
    q_bits: int | None  # None: not quantized, or as the base is stored
    is_whole: bool  # keeps everything of the base
    effective_parameters: int  # computed; the table has the published figure
    disk_bytes: int  # of the text model
    resident_bytes: int  # of a text run: all but the PLE table, which stays on disk, and the towers; with its cache
    cache_bytes: int  # of these, the keys and values of CONTEXT_TOKENS


def size_slices(
    raw_text: dict[str, Any],
    slices: Sequence[Slice],
    q_bits: int | None,
    q_group_size: int,
    ple_bits: int,
    dtype: str,
    stored: Mapping[str, Quantization],
) -> list[SizedSlice]:
    """Sizes every slice of a base model whose text_config is given; dtype as safetensors spells it.

    stored: how the base is quantized already, by module path; the requested bits are then ignored.
    """
    base, item_bytes = TextConfig.from_dict(raw_text), DTYPES[dtype].itemsize
    sized: list[SizedSlice] = []
    for entry in slices:
        plan = plan_slice(base, entry)
        text = TextConfig.from_dict(slice_config(raw_text, plan))
        dead = dead_manifest(text)
        shapes = text_manifest(text) | dead
        chosen: Mapping[str, Quantization] = {}
        if stored:
            chosen = {name: how for path, how in stored.items() if (name := plan.sliced_name(path)) is not None}
        elif q_bits is not None:
            chosen = choose_quantizations(shapes, q_bits, q_group_size, ple_bits)
        disk = resident = 0
        for name, shape in shapes.items():
            path = name.removesuffix(".weight")
            size = chosen[path].num_bytes(shape, item_bytes) if path in chosen else prod(shape) * item_bytes
            disk += size
            if path != PLE_TABLE and name not in dead:
                resident += size
        sized.append(
            SizedSlice(
                slice=entry,
                q_bits=None if stored else q_bits,
                is_whole=is_whole(base, entry),
                effective_parameters=effective_parameters(text),
                disk_bytes=disk,
                resident_bytes=resident + _cache_bytes(text) + PROGRAM_BYTES,
                cache_bytes=_cache_bytes(text),
            )
        )
    return sized


def _cache_bytes(config: TextConfig) -> int:
    """Keys and values of a conversation; sliding layers keep their window only."""
    tokens = sum(
        min(config.sliding_window, CONTEXT_TOKENS) if kind == SLIDING else CONTEXT_TOKENS
        for kind in config.layer_types[: config.first_kv_shared_layer]
    )
    return tokens * 2 * prod((config.num_key_value_heads, config.head_dim, _CACHE_ITEM_BYTES))

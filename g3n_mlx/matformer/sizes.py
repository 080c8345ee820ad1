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
from g3n_mlx.failures import BadValue, size_in_words
from g3n_mlx.matformer.plan import plan_slice, slice_config
from g3n_mlx.matformer.table import Slice

# What a run takes besides weights: the KV caches of a conversation of this length, in bfloat16, ...
_CONTEXT_TOKENS = 4096
_CACHE_ITEM_BYTES = 2
# ... and Python, the array framework and a short prompt's activations. On Linux with torch, 4 bits, VmHWM was 1.89 GB
# (E2B) and 3.20 GB (E4B): this makes the estimates 2.05 and 3.21 GB, on the safe side.
_PROGRAM_BYTES = 620_000_000


@dataclass(frozen=True, slots=True)
class SizedSlice:
    """A slice with what it costs."""

    slice: Slice
    effective_parameters: int  # computed; the table has the published figure
    disk_bytes: int  # of the text model
    resident_bytes: int  # of a text run: all but the PLE table, which stays on disk


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
            SizedSlice(entry, effective_parameters(text), disk, resident + _cache_bytes(text) + _PROGRAM_BYTES)
        )
    return sized


def largest_fitting(sized: Sequence[SizedSlice], quantized: bool, limit_bytes: int) -> SizedSlice:
    """The slice with the most effective parameters that fits; of equals, the one with the better published score.

    quantized: whether the base is already, so that its bits are what they are. Raises ValueError when none fits.
    """
    fitting = [entry for entry in sized if entry.resident_bytes <= limit_bytes]
    if not fitting:
        advice = "start from the unquantized checkpoint for fewer bits" if quantized else "try fewer bits"
        smallest = min(sized, key=lambda entry: entry.resident_bytes)
        raise BadValue(
            f"no slice fits {size_in_words(limit_bytes)}: the smallest, {smallest.slice.short_name}, needs "
            f"{size_in_words(smallest.resident_bytes)}; {advice}"
        )
    return max(fitting, key=lambda entry: (entry.effective_parameters, entry.slice.mmlu or 0.0))


def table(sized: Sequence[SizedSlice]) -> str:
    """The slices as lines of text."""
    header = f"{'slice':<14} {'layers':>6} {'eff. B':>7} {'published':>9} {'MMLU':>6} {'disk':>9} {'memory':>9}  name"
    lines = [header]
    for entry in sized:
        chosen = entry.slice
        published = "" if chosen.effective_params_b is None else _billions(chosen.effective_params_b, 2)
        mmlu = "" if chosen.mmlu is None else f"{chosen.mmlu:.1f}%"
        effective = _billions(entry.effective_parameters / 1e9, 3)
        lines.append(
            f"{chosen.short_name:<14} {chosen.num_layers:>6} {effective:>7} {published:>9} "
            f"{mmlu:>6} {size_in_words(entry.disk_bytes):>9} {size_in_words(entry.resident_bytes):>9}  {chosen.name}"
        )
    return "\n".join(lines)


def _billions(count: float, places: int) -> str:
    """With some decimal places; numbers that these would round away with three digits that count."""
    return f"{count:.{places}f}" if count >= 0.1 else f"{count:.3g}"


def _cache_bytes(config: TextConfig) -> int:
    """Keys and values of a conversation; sliding layers keep their window only."""
    tokens = sum(
        min(config.sliding_window, _CONTEXT_TOKENS) if kind == SLIDING else _CONTEXT_TOKENS
        for kind in config.layer_types[: config.first_kv_shared_layer]
    )
    return tokens * 2 * prod((config.num_key_value_heads, config.head_dim, _CACHE_ITEM_BYTES))

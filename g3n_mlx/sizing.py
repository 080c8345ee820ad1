"""Which slice of a model a command takes, at how many bits: the best that fits a memory, or that reaches a speed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from g3n_mlx.checkpoint import hub
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.convert import DEFAULT_GROUP_SIZE, DEFAULT_PLE_BITS
from g3n_mlx.failures import BadValue
from g3n_mlx.matformer.choice import UNASKED_BITS, best, best_fitting
from g3n_mlx.matformer.plan import is_whole, whole_model
from g3n_mlx.matformer.sizes import SizedSlice, size_slices
from g3n_mlx.matformer.table import slices_for
from g3n_mlx.matformer.view import can_slice

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

SPEED_BITS = 4  # of what is not quantized, where a speed is wanted
# A measurement of the speed: decoded tokens, of which the first few warm up.
_PROMPT_IDS, _WARM_TOKENS, _TOKENS = (2, 2, 2, 2), 3, 16


def fitting(
    path_or_id: str | Path, limit_bytes: int, revision: str | None, table: Path | None, q_bits: int | None
) -> SizedSlice:
    """The best slice of a checkpoint whose memory fits, and its bits (`matformer.choice.best`).

    q_bits: what was asked for; without it an unquantized checkpoint gets 8 where the whole model has room, else 4.
    Raises ValueError when none fits.
    """
    checkpoint = Checkpoint.open(hub.resolve(path_or_id, revision))
    try:
        stored = bool(checkpoint.quantizations)
        widths: Sequence[int | None] = (None,) if stored else UNASKED_BITS if q_bits is None else (q_bits,)
        candidates = [entry for width in widths for entry in sized(checkpoint, table, width)]
    finally:
        checkpoint.close()
    advice = "start from the unquantized checkpoint for fewer bits" if stored else "--q-bits takes fewer bits"
    return best_fitting(candidates, limit_bytes, advice)


def is_quantized(path_or_id: str | Path, revision: str | None) -> bool:
    """Whether a checkpoint's weights are."""
    checkpoint = Checkpoint.open(hub.resolve(path_or_id, revision))
    checkpoint.close()
    return bool(checkpoint.quantizations)


def fast_enough(model: "Gemma3n", tokens_per_s: float, table: Path | None = None) -> "tuple[Gemma3n, float]":
    """The model, or the best slice of it, that decodes so many tokens per second here, and its measured speed.

    The speeds of the whole and of the smallest are measured, those between them estimated by what a token reads, and
    the best slice that should do is measured, until one does. Raises ValueError when none does.
    """
    candidates = sized(model.checkpoint, table, None)
    smallest = min(candidates, key=lambda entry: entry.resident_bytes)
    seconds: dict[int, float] = {}  # per token, by the candidate's memory

    def measured(entry: SizedSlice) -> "Gemma3n":
        taken = model if entry.is_whole else model.slice(entry.slice.name, matformer_config=table)
        seconds[entry.resident_bytes] = 1 / decode_speed(taken)
        return taken

    def expected(entry: SizedSlice) -> bool:
        known = sorted(seconds)
        return tokens_per_s * float(np.interp(entry.resident_bytes, known, [seconds[size] for size in known])) <= 1

    for entry in [smallest, *(entry for entry in candidates if entry.is_whole)]:
        taken = measured(entry)
        if taken is not model:
            taken.close()
    while (chosen := best(candidates, expected)) is not None:
        known = seconds.get(chosen.resident_bytes)
        taken = model if chosen.is_whole else measured(chosen)
        if known is not None or seconds[chosen.resident_bytes] * tokens_per_s <= 1:
            return taken, 1 / seconds[chosen.resident_bytes]
        taken.close()
    raise BadValue(
        f"no slice of {model.name} decodes {tokens_per_s:g} tokens per second here: the smallest, "
        f"{smallest.slice.short_name}, makes {1 / seconds[smallest.resident_bytes]:.1f}; try fewer bits"
    )


def decode_speed(model: "Gemma3n") -> float:
    """Tokens per second behind a short prompt."""
    for count in (_WARM_TOKENS, _TOKENS):
        model.reset()
        usage = model.generate(_PROMPT_IDS, max_tokens=count, ignore_eos=True, temperature=0.0).usage
    model.reset()
    return usage.avg_compl_tok_per_sec


def sized(checkpoint: Checkpoint, table: Path | None, q_bits: int | None) -> list[SizedSlice]:
    """A checkpoint and its slices with their sizes, as stored or at a width."""
    text = checkpoint.config.text
    found = [entry for entry in slices_for(checkpoint.folder, table) if can_slice(checkpoint, entry)]
    if not any(is_whole(text, entry) for entry in found):
        found.append(whole_model(text))
    dtype = "F32" if checkpoint.info("language_model.norm.weight").dtype == "F32" else "BF16"
    raw_text = checkpoint.raw_config["text_config"]
    return size_slices(raw_text, found, q_bits, DEFAULT_GROUP_SIZE, DEFAULT_PLE_BITS, dtype, checkpoint.quantizations)


def chosen_in_words(entry: SizedSlice, size: Callable[[int], str]) -> str:
    """What was chosen, for a line of the command."""
    bits = "" if entry.q_bits is None else f" at {entry.q_bits} bits"
    return f"{entry.slice.short_name}{bits}, {size(entry.resident_bytes)} in memory"

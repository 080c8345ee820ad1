"""Which slice of a model a command takes, at how many bits: the best that fits a memory, or that reaches a speed."""

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from g3n_mlx.checkpoint import hub
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.outline import Outline
from g3n_mlx.convert import DEFAULT_GROUP_SIZE, DEFAULT_PLE_BITS, resolve
from g3n_mlx.failures import BadValue, size_in_words
from g3n_mlx.matformer.choice import UNASKED_BITS, best, best_fitting
from g3n_mlx.matformer.plan import find_slice, is_whole, whole_model
from g3n_mlx.matformer.sizes import SizedSlice, size_slices
from g3n_mlx.matformer.table import Slice, slices_for
from g3n_mlx.matformer.view import can_slice

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

# What a model takes at most that is loaded as it is stored, unless something else is asked for.
SMALL_BYTES = 1_500_000_000
# Of the memory that is free, what a model that nobody chose may take: the rest is for contexts and other programs.
_USABLE = 0.9

SPEED_BITS = 4  # of what is not quantized, where a speed is wanted
# A measurement of the speed: decoded tokens, of which the first few warm up.
_PROMPT_IDS, _WARM_TOKENS, _TOKENS = (2, 2, 2, 2), 3, 16


def outline_of(path_or_id: str | Path, revision: str | None) -> Outline:
    """The outline of a folder, a GGUF file or a hub id; raises as `resolve` does.

    Of a hub id whose weights are not here it is asked from the hub, so that what can't fit is not downloaded.
    """
    if hub.is_absent(path_or_id, revision):
        with suppress(OSError):  # what keeps the hub from answering is said where the model is downloaded
            return Outline.of_hub_id(str(path_or_id), revision)
    with closing(Checkpoint.open(resolve(path_or_id, revision))) as checkpoint:
        return Outline.of(checkpoint)


def fitting(
    path_or_id: str | Path, limit_bytes: int, revision: str | None, table: Path | None, q_bits: int | None
) -> SizedSlice:
    """The best slice of a checkpoint whose memory fits, and its bits (`matformer.choice.best`).

    q_bits: what was asked for; without it an unquantized checkpoint gets 8 where the whole model has room, else 4.
    Raises ValueError when none fits.
    """
    outline = outline_of(path_or_id, revision)
    stored = bool(outline.quantizations)
    widths: Sequence[int | None] = (None,) if stored else UNASKED_BITS if q_bits is None else (q_bits,)
    candidates = [entry for width in widths for entry in sized(outline, table, width)]
    advice = "start from the unquantized checkpoint for fewer bits" if stored else "--q-bits takes fewer bits"
    return best_fitting(candidates, limit_bytes, advice)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `unasked` has chosen: how a model is loaded, and the words that say so."""

    matformer: str | None
    q_bits: int | None
    told: str | None  # None where the model is loaded as it is stored


def unasked(
    path_or_id: str | Path,
    free_bytes: int,
    revision: str | None,
    table: Path | None,
    matformer: str | None,
    q_bits: int | None,
) -> Chosen:
    """How a model is loaded so that it fits what is free, its towers included, where a user has not said it all.

    matformer, q_bits: what was asked for, which stays. A quantized model stays whole if it fits, an unquantized one
    gets 8 or else 4 bits; where the whole does not fit, the best slice is taken that does. Models below SMALL_BYTES, as
    the demo model is, stay as they are. Raises ValueError, saying what would fit, where nothing does that
    was asked for.
    """
    outline = outline_of(path_or_id, revision)
    if outline.folder == hub.demo_folder():
        return Chosen(matformer, q_bits, None)
    towers = outline.tower_bytes
    (whole,) = sized(outline, table, None, [whole_model(outline.text)])
    stored, room = bool(outline.quantizations), int(_USABLE * free_bytes) - towers
    if whole.resident_bytes + towers <= SMALL_BYTES or (stored and q_bits is not None):  # the latter is an error
        return Chosen(matformer, q_bits, None)
    if stored and matformer is None and whole.resident_bytes <= room:
        return Chosen(None, None, None)
    widths: Sequence[int | None] = (None,) if stored else UNASKED_BITS
    possible = [entry for width in widths for entry in sized(outline, table, width)]
    named = None
    if matformer is not None:
        named = [find_slice(matformer, slices_for(outline.folder, table), outline.text)]
    asked = possible
    if named is not None or q_bits is not None:
        asked_widths = widths if q_bits is None else (q_bits,)
        asked = [entry for width in asked_widths for entry in sized(outline, table, width, named)]
    chosen = _widest_whole(asked, room) or _best_or_only(asked, room)
    if chosen is None:
        raise _nothing_fits(asked, possible, towers, free_bytes)
    taken = matformer if named is not None else None if chosen.is_whole else chosen.slice.name
    if (taken, chosen.q_bits) == (matformer, q_bits):
        return Chosen(matformer, q_bits, None)
    return Chosen(
        taken,
        chosen.q_bits,
        f"chosen for {size_in_words(free_bytes)} of free memory: {_named(chosen)}, "
        f"{size_in_words(chosen.resident_bytes + towers)}; --q-bits and --matformer choose otherwise, --fits off loads "
        "it as it is stored",
    )


def _widest_whole(candidates: Sequence[SizedSlice], room: int) -> SizedSlice | None:
    """The whole model at most bits, which nobody asked to be cut where it fits, whatever a slice of it scores."""
    fitting_wholes = [entry for entry in candidates if entry.is_whole and entry.resident_bytes <= room]
    return max(fitting_wholes, key=lambda entry: entry.resident_bytes, default=None)


def _best_or_only(candidates: Sequence[SizedSlice], room: int) -> SizedSlice | None:
    """The best slice that fits; of a single slice at several widths, the widest."""
    if len({entry.slice.name for entry in candidates}) == 1:
        meeting = [entry for entry in candidates if entry.resident_bytes <= room]
        return max(meeting, key=lambda entry: entry.resident_bytes, default=None)
    return best(candidates, lambda entry: entry.resident_bytes <= room)


def _nothing_fits(
    asked: Sequence[SizedSlice], possible: Sequence[SizedSlice], towers: int, free_bytes: int
) -> BadValue:
    smallest = min(asked, key=lambda entry: entry.resident_bytes)
    room = int(_USABLE * free_bytes) - towers
    other = _widest_whole(possible, room) or _best_or_only(possible, room)
    advice = "close other programs, or take a smaller model" if other is None else f"{_named(other)} would fit"
    return BadValue(
        f"{_named(smallest)} needs {size_in_words(smallest.resident_bytes + towers)} of memory, and "
        f"{size_in_words(free_bytes)} are free, of which a tenth is left to others: {advice}; --fits off loads it all "
        "the same"
    )


def _named(entry: SizedSlice) -> str:
    return f"{entry.slice.short_name}{'' if entry.q_bits is None else f' at {entry.q_bits} bits'}"


def is_quantized(path_or_id: str | Path, revision: str | None) -> bool:
    """Whether a checkpoint's weights are."""
    checkpoint = Checkpoint.open(resolve(path_or_id, revision))
    checkpoint.close()
    return bool(checkpoint.quantizations)


def fast_enough(model: "Gemma3n", tokens_per_s: float, table: Path | None = None) -> "tuple[Gemma3n, float]":
    """The model, or the best slice of it, that decodes so many tokens per second here, and its measured speed.

    The speeds of the whole and of the smallest are measured, those between them estimated by what a token reads, and
    the best slice that should do is measured, until one does. Raises ValueError when none does.
    """
    candidates = sized(Outline.of(model.checkpoint), table, None)
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


def sized(
    outline: Outline, table: Path | None, q_bits: int | None, slices: Sequence[Slice] | None = None
) -> list[SizedSlice]:
    """A checkpoint and its slices, or those that are given, with their sizes, as stored or at a width."""
    text, stored = outline.text, outline.quantizations
    found = slices
    if found is None:
        found = [entry for entry in slices_for(outline.folder, table) if can_slice(text, stored, entry)]
        if not any(is_whole(text, entry) for entry in found):
            found.append(whole_model(text))
    return size_slices(
        outline.raw_text, found, q_bits, DEFAULT_GROUP_SIZE, DEFAULT_PLE_BITS, outline.dtype, outline.quantizations
    )


def chosen_in_words(entry: SizedSlice, size: Callable[[int], str]) -> str:
    """What was chosen, for a line of the command."""
    return f"{_named(entry)}, {size(entry.resident_bytes)} in memory"

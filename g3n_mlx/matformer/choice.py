"""Which slice to take, at how many bits: the best by published quality among those that meet a limit.

The largest that fits is often not the best: of the sixteen published slices of E4B, five have a lower MMLU score than
a smaller one.
"""

from collections.abc import Callable, Sequence

from g3n_mlx.failures import BadValue, size_in_words
from g3n_mlx.matformer.sizes import SizedSlice

# Tried where nobody asked for bits: 8 where even the whole model has room for them, else 4; fewer cost too much quality
# to be taken unasked.
UNASKED_BITS = (8, 4)


def best(candidates: Sequence[SizedSlice], meets: Callable[[SizedSlice], bool]) -> SizedSlice | None:
    """The slice with the best published score among those that meet a limit, of equals the smaller; None if none does.

    candidates: slices of one model, at one or at several widths. Of these the widest is taken at which the whole model
    meets the limit, or else the narrowest. meets: any test, of a size or of a measured speed; asked once a candidate.
    Without a score, the whole model is better than its slices, and a larger slice is better than a smaller.
    """
    meeting = [candidate for candidate in candidates if meets(candidate)]
    widths = {_width(candidate) for candidate in meeting if candidate.is_whole}
    width = max(widths) if widths else min(map(_width, candidates))
    return max((candidate for candidate in meeting if _width(candidate) == width), key=_preference, default=None)


def best_within(candidates: Sequence[SizedSlice], limit_bytes: int) -> SizedSlice | None:
    """The best slice whose memory fits; see `best`."""
    return best(candidates, lambda candidate: candidate.resident_bytes <= limit_bytes)


def best_fitting(candidates: Sequence[SizedSlice], limit_bytes: int, advice: str) -> SizedSlice:
    """The best slice whose memory fits. Raises ValueError, ending in the advice, when none fits."""
    chosen = best_within(candidates, limit_bytes)
    if chosen is None:
        smallest = min(candidates, key=lambda candidate: candidate.resident_bytes)
        raise BadValue(
            f"no slice fits {size_in_words(limit_bytes)}: the smallest, {smallest.slice.short_name}, needs "
            f"{size_in_words(smallest.resident_bytes)}; {advice}"
        )
    return chosen


def frontier(sized: Sequence[SizedSlice]) -> list[SizedSlice]:
    """Those with a published score that no smaller one reaches and none of the same size exceeds, smallest first."""
    found: list[SizedSlice] = []
    highest = float("-inf")
    scored = [entry for entry in sized if entry.slice.mmlu is not None]
    for entry in sorted(scored, key=lambda entry: (entry.resident_bytes, -(entry.slice.mmlu or 0.0))):
        score = entry.slice.mmlu or 0.0
        twin = bool(found) and (entry.resident_bytes, score) == (found[-1].resident_bytes, highest)
        if score > highest or twin:
            found.append(entry)
            highest = score
    return found


def _width(candidate: SizedSlice) -> int:
    """Bits of a weight; what is not quantized, or as it is stored, is the only width there is."""
    return candidate.q_bits or 0


def _preference(candidate: SizedSlice) -> tuple[bool, float, int]:
    score = candidate.slice.mmlu
    if score is None:
        return candidate.is_whole, float("-inf"), candidate.resident_bytes
    return False, score, -candidate.resident_bytes

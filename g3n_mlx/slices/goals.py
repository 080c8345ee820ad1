"""From budgets of memory or speed to what was found for them, beside the slices that a table already has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from g3n_mlx.commands import say
from g3n_mlx.failures import BadValue, size_in_words
from g3n_mlx.matformer.plan import find_slice
from g3n_mlx.matformer.table import Slice
from g3n_mlx.slices.costs import Costs
from g3n_mlx.slices.measure import Divergences
from g3n_mlx.slices.pieces import Piece
from g3n_mlx.slices.search import Found, check_room, search
from g3n_mlx.slices.space import UNCHANGED, Candidate, Cost, Space, candidate_of
from g3n_mlx.slices.speed import Line, decode_speed
from g3n_mlx.slices.variants import Variants

# Tables say nothing about bits: where bits are searched, their slices are compared at these, as usual.
_USUAL_BITS = 4
# Searches with a smaller budget after a candidate that was slower than its line says.
_SPEED_TRIES = 4


@dataclass(frozen=True)
class Setting:
    """What a search works with."""

    variants: Variants
    space: Space
    divergences: Divergences
    pieces: Sequence[Piece]
    held_out: Sequence[Piece]
    rows: Sequence[Slice]  # a table's slices, to compare with
    costs: Costs = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", Costs(self.variants.whole.checkpoint))

    def summary(self) -> str:
        tokens, rest = (sum(piece.tokens for piece in pieces) for pieces in (self.pieces, self.held_out))
        held_out = f"{rest} more tokens are held out for the figures"
        if self.held_out is self.pieces:
            held_out = "nothing is held out, the figures are of the same tokens: more data would be better"
        return f"{len(self.space.changes())} choices, run on {tokens} tokens in {len(self.pieces)} pieces; {held_out}"

    @cached_property
    def losses(self) -> dict[Candidate, float]:
        """What every single choice is worth."""
        return self.divergences.of(self.space.changes(), self.pieces)

    @property
    def table_bits(self) -> int:
        """Bits of slices that a table names."""
        bits = self.space.bits
        return _USUAL_BITS if _USUAL_BITS in bits else bits[-1]

    def candidate(self, row: Slice) -> Candidate:
        """A row of the table at the bits of tables."""
        return candidate_of(self.variants.whole.config.text, row).at(self.table_bits)

    def find(self, name: str, cost: Cost, budget: int) -> Found:
        rivals = [candidate for candidate in map(self.candidate, self.rows) if self.space.holds(candidate)]
        return search(name, self.space, cost, budget, self.divergences, self.losses, self.pieces, rivals)


@dataclass(frozen=True, slots=True)
class Axis:
    """What the picture shows divergence over."""

    label: str
    size: Callable[[Candidate], float]


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate with what it came to on data that was not searched on."""

    name: str
    group: str  # "whole", "table" or "found"
    candidate: Candidate
    divergence: float  # nats per token


def for_budgets(setting: Setting, budgets: Sequence[int | str]) -> tuple[list[Found], Axis]:
    """The best candidate for each budget: bytes in memory, or as many as the slice of a name takes."""
    memory, limits = setting.costs.memory, dict[str, int]()
    for budget in budgets:
        if isinstance(budget, int):
            limits[f"Found {size_in_words(budget)}"] = budget
        else:
            row = find_slice(budget, setting.rows, setting.variants.whole.config.text)
            limits[f"Found at {row.short_name}"] = memory(setting.candidate(row))
    for limit in limits.values():
        check_room(setting.space, memory, limit)
    found = [setting.find(name, memory, limit) for name, limit in limits.items()]
    read = setting.costs.read_per_token
    return found, Axis("weights in memory, MB", lambda candidate: read(candidate) / 1e6)


def for_speed(setting: Setting, tokens_per_s: float) -> tuple[list[Found], Axis]:
    """The best candidate that decodes so many tokens per second, measured; raises ValueError where none is so fast."""
    read, whole, least = setting.costs.read_per_token, setting.space.whole, setting.space.cheapest()
    fastest, slowest = _measured_speed(setting, least), decode_speed(setting.variants.whole)
    say(f"the whole model decodes {slowest:.1f} tokens/s, the smallest candidate {fastest:.1f}")
    line = Line.through((read(least), fastest), (read(whole), slowest))
    if fastest < tokens_per_s:
        raise BadValue(
            f"nothing is as fast as {tokens_per_s:g} tokens/s: the smallest candidate decodes {fastest:.1f}; "
            "allow smaller --widths or fewer --bits"
        )
    budget = line.budget(tokens_per_s)
    for _ in range(_SPEED_TRIES):
        found = setting.find(f"Found {tokens_per_s:g} tokens/s", read, max(budget, read(least)))
        speed = _measured_speed(setting, found.candidate)
        say(f"a candidate that reads {size_in_words(read(found.candidate))} a token decodes {speed:.1f} tokens/s")
        if speed >= tokens_per_s:
            return [found], Axis("time per token, ms", lambda candidate: line.seconds(read(candidate)) * 1e3)
        budget = int(min(budget, read(found.candidate)) * speed / tokens_per_s)
    raise BadValue(f"nothing that was found decodes {tokens_per_s:g} tokens/s when it is run; is the machine busy?")


def _measured_speed(setting: Setting, candidate: Candidate) -> float:
    with setting.variants.opened(candidate) as model:
        return decode_speed(model)


def compare(setting: Setting, found: Sequence[Found]) -> list[Entry]:
    """The whole model, the slices of the table and what was found, on the data held out."""
    named = {"whole": ("whole", setting.space.whole)}
    if setting.table_bits != UNCHANGED:
        named |= {f"whole, {bits} bits": ("whole", setting.space.whole.at(bits)) for bits in setting.space.bits}
    for row in setting.rows:
        candidate = setting.candidate(row)
        if candidate.widths != setting.space.whole.widths:
            named[row.short_name] = ("table", candidate)
    named |= {entry.name: ("found", entry.candidate) for entry in found}
    measured = setting.divergences.of([candidate for _, candidate in named.values()], setting.held_out)
    return [Entry(name, group, candidate, measured[candidate]) for name, (group, candidate) in named.items()]

"""The search: what every choice is worth by itself, the best sum within the budget, and runs that check it.

Losses of single choices are taken to add up, which holds for small ones. So the candidate that solves the sum is run,
and with it those of its neighbours that are expected to lose least; the best of them is the next centre, until none of
its neighbours is better. Slices that a table already has are run as well, and only what is clearly better replaces
them: a difference as small as chance makes may be the other way round on other data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from g3n_mlx.failures import BadValue, size_in_words
from g3n_mlx.slices.measure import Divergences
from g3n_mlx.slices.pieces import Piece
from g3n_mlx.slices.space import Candidate, Cost, Space

# Neighbours of a centre that are run, the most promising ones.
NEIGHBOURS = 12
# Centres after which a search is content: each one costs as many passes as it has neighbours.
MAX_CENTRES = 6


@dataclass(frozen=True, slots=True)
class Found:
    """What a budget came to."""

    name: str
    candidate: Candidate
    expected: float  # the sum of its choices' losses, nats per token
    measured: float  # on the pieces that were searched on


def check_room(space: Space, cost: Cost, budget: int) -> None:
    """Raises ValueError unless the smallest candidate is within a budget of bytes."""
    least = cost(space.cheapest())
    if least > budget:
        raise BadValue(
            f"nothing fits {size_in_words(budget)}: the smallest that is searched needs {size_in_words(least)}; "
            "allow smaller --widths or fewer --bits"
        )


def search(
    name: str,
    space: Space,
    cost: Cost,
    budget: int,
    divergences: Divergences,
    losses: Mapping[Candidate, float],
    pieces: Sequence[Piece],
    known: Sequence[Candidate] = (),
) -> Found:
    """The best candidate within a budget of bytes. losses: of every one of the space's changes.

    known: candidates to beat, such as a table's; those within the budget are run beside the solution, and the best of
    them is found unless something else is clearly better.
    """
    centre = space.best(losses, cost, budget) or space.cheapest()
    rivals = [candidate for candidate in known if cost(candidate) <= budget]
    measured: dict[Candidate, float] = {}
    for _ in range(MAX_CENTRES):
        tried = [centre, *rivals, *promising(space, cost, budget, losses, centre)]
        measured |= divergences.of(tried, pieces)
        best = min(tried, key=lambda candidate: (measured[candidate], cost(candidate)))
        if best == centre:
            break
        centre = best
    if rivals:
        rival = min(rivals, key=lambda candidate: (measured[candidate], cost(candidate)))
        if not divergences.is_clearly_less(centre, rival, pieces):
            centre = rival
    return Found(name, centre, space.loss(centre, losses), measured[centre])


def promising(
    space: Space, cost: Cost, budget: int, losses: Mapping[Candidate, float], centre: Candidate
) -> list[Candidate]:
    """The neighbours within the budget that are expected to lose least."""
    expected = {candidate: space.loss(candidate, losses) for candidate in space.neighbours(centre)}
    in_order = sorted(expected, key=lambda candidate: (expected[candidate], candidate))
    found: list[Candidate] = []
    for candidate in in_order:  # what a candidate costs takes longer to find out than what it is expected to lose
        if len(found) == NEIGHBOURS:
            break
        if cost(candidate) <= budget:
            found.append(candidate)
    return found

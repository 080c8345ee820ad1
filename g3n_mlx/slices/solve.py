"""The multiple-choice knapsack: one option of every group, the least loss that a budget allows, exactly.

All sums of costs that can be best are kept, group by group: of two sums the dearer one is dropped when it loses no
less. Layers of equal widths have few different sums, so a search over E4B keeps some thousands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# More sums than this are thinned to the best in each of as many equal steps of cost; what is found then costs at most
# one step a group less than it might.
MAX_SUMS = 50_000


@dataclass(frozen=True, slots=True)
class Option:
    """What may be chosen for a group: its cost, the loss it brings, and the values that it stands for."""

    cost: int
    loss: float
    values: tuple[object, ...]


def solve(groups: Sequence[Sequence[Option]], budget: int) -> Option | None:
    """The choice of one option a group with the least loss among those within the budget; None if there is none.

    Of equal losses the cheaper one. Its values are those of the chosen options, in the groups' order.
    """
    found = undominated(groups, budget)
    return found[-1] if found else None


def undominated(groups: Sequence[Sequence[Option]], budget: int | None = None) -> list[Option]:
    """Every choice within the budget that no other of at most its cost equals: cheapest first, of falling loss."""
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    stages: list[tuple[np.ndarray, np.ndarray]] = []
    rest = [sum(min(option.cost for option in group) for group in groups[at + 1 :]) for at in range(len(groups))]
    for group, cheapest_rest in zip(groups, rest, strict=True):
        option_costs = np.array([option.cost for option in group], np.int64)
        option_losses = np.array([option.loss for option in group])
        sums = (costs[:, None] + option_costs).ravel()
        totals = (losses[:, None] + option_losses).ravel()
        kept = _best_of_each_cost(sums, totals, None if budget is None else budget - cheapest_rest)
        costs, losses = sums[kept], totals[kept]
        stages.append((kept // len(group), kept % len(group)))
    return [_option(groups, stages, at, int(costs[at]), float(losses[at])) for at in range(len(costs))]


def _best_of_each_cost(costs: np.ndarray, losses: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices of what no cheaper or equally dear entry equals, by cost."""
    order = np.lexsort((losses, costs))
    if limit is not None:
        order = order[costs[order] <= limit]
    if not len(order):
        return order
    sorted_losses = losses[order]
    lowest_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_losses)[:-1]])
    kept = order[sorted_losses < lowest_before]
    if len(kept) > MAX_SUMS:
        steps = (costs[kept] - costs[kept[0]]) * MAX_SUMS // (costs[kept[-1]] - costs[kept[0]] + 1)
        last_of_step = np.append(steps[1:] != steps[:-1], True)
        kept = kept[last_of_step]
    return kept


def _option(
    groups: Sequence[Sequence[Option]], stages: Sequence[tuple[np.ndarray, np.ndarray]], at: int, cost: int, loss: float
) -> Option:
    """The way back from a sum to the options that it is made of."""
    values: list[object] = []
    for group, (parents, options) in zip(reversed(groups), reversed(stages), strict=True):
        values[:0] = group[int(options[at])].values
        at = int(parents[at])
    return Option(cost, loss, tuple(values))

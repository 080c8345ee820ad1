"""Which slices of its model a server offers, and with which adapters."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from g3n_mlx.failures import BadValue
from g3n_mlx.matformer.plan import SlicePlan, find_slice, is_whole, plan_slice
from g3n_mlx.matformer.view import sliced
from g3n_mlx.model import Gemma3n

ALL, NONE = "all", "none"


def offered(
    model: Gemma3n, names: Sequence[str], shed: Sequence[str], table: Path | None = None
) -> dict[str, SlicePlan]:
    """The plans of the slices that requests may name, by short name: all that the model allows, none, or the named.

    shed: those that requests get under load, which are offered too. table: a CSV table of slices instead of the
    model's. Raises ValueError for a name that does not exist or can't be taken.
    """
    text, allowed = model.config.text, model.slices(table)
    found = [entry for entry in allowed if not is_whole(text, entry)]
    if shed and not found:
        raise BadValue(f"--shed {','.join(shed)}: {model.name} has no slices to answer with")
    asked = [name for name in names if name not in (ALL, NONE)]
    wanted = {find_slice(name, found).name for name in [*asked, *shed]} if found else set[str]()
    if asked and not found:
        raise BadValue(f"--slices {','.join(asked)}: {model.name} has no slices to offer")
    return {e.short_name: plan_slice(text, e) for e in found if ALL in names or e.name in wanted}


def with_adapters(model: Gemma3n, adapters: Sequence[tuple[str, str]], taken: Sequence[str]) -> dict[str, Gemma3n]:
    """The model with each of some adapters, by their names: pairs of a name and a folder or hub id.

    taken: ids that stand for something else already. Raises ValueError, also for a name given twice, and as `adapted`.
    """
    found: dict[str, Gemma3n] = {}
    for name, path in adapters:
        if name in taken or name in found:
            raise BadValue(f"--lora {name}={path}: the model id {name!r} is taken, choose another name")
        found[name] = model.adapted(path)
    return found


def largest_first(model: Gemma3n, slices: Mapping[str, SlicePlan], names: Sequence[str]) -> list[str]:
    """Short names of the named slices, by the bytes that a token reads."""
    known = {alias.casefold(): short for short, plan in slices.items() for alias in (short, plan.slice_name)}
    sizes: dict[str, int] = {}
    for short_name in {known[name.strip().casefold()] for name in names}:
        view = sliced(model.checkpoint, slices[short_name])
        sizes[short_name] = view.nbytes_per_token
        view.close()
    return sorted(sizes, key=lambda short_name: -sizes[short_name])

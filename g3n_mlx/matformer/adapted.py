"""Checkpoints and slices of them with adapters: read for the whole model, cut as its weights are."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from g3n_mlx.checkpoint.adapter import changes_of
from g3n_mlx.checkpoint.folder import Changes, Checkpoint
from g3n_mlx.checkpoint.hub import resolve_adapter
from g3n_mlx.failures import BadValue
from g3n_mlx.matformer.plan import SlicePlan
from g3n_mlx.matformer.view import cut_changes, open_sliced

# An adapter, several, or several with their weights.
AdapterLike = str | Path | Sequence[str | Path] | Mapping[str, float]


def named_adapters(adapter: AdapterLike | None) -> dict[str, float]:
    """Adapters by folder, file or hub id, with their weights; raises ValueError for what is none."""
    if adapter is None:
        return {}
    if isinstance(adapter, str | Path):
        adapter = [adapter]
    if not isinstance(adapter, Mapping | Sequence):
        raise BadValue(f"adapter is {adapter!r:.80}, expected a folder, a hub id, or several with their weights")
    weights = dict(adapter) if isinstance(adapter, Mapping) else dict.fromkeys(adapter, 1.0)
    for name, weight in weights.items():
        if not isinstance(name, str | Path) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise BadValue(f"adapter has {name!r:.80}: {weight!r:.80}, expected a folder or hub id, and a number")
    return {str(name): float(weight) for name, weight in weights.items()}


def parsed_adapters(given: Iterable[str]) -> dict[str, float]:
    """Adapters as commands take them, PATH or PATH=WEIGHT, with their weights."""
    found: dict[str, float] = {}
    for text in given:
        name, equals, weight = text.rpartition("=")
        if equals and not Path(text).expanduser().exists():
            try:
                found[name] = float(weight)
            except ValueError:
                raise BadValue(f"--adapter {text}: {weight!r} is no weight, expected a number as in PATH=0.5") from None
        else:
            found[text] = 1.0
    return found


def open_adapted(folder: Path, plan: SlicePlan | None, adapters: Mapping[str, float]) -> Checkpoint:
    """The checkpoint in a folder, or the slice of it, with adapters; raises as `changes_of_slice` and `sliced` do."""
    changes = changes_of_slice(folder, plan, adapters)
    return with_changes(open_sliced(folder, plan), changes)


def changes_of_slice(folder: Path, plan: SlicePlan | None, adapters: Mapping[str, float]) -> list[Changes]:
    """What adapters, made for the checkpoint in a folder, change of it or of a slice of it, one after the other.

    Raises FileNotFoundError, the hub's errors, or ValueError where an adapter can't be used or would have no effect.
    """
    found: list[Changes] = []
    if not adapters:
        return found
    with ExitStack() as opened, ExitStack() as after_error:
        whole = opened.enter_context(closing(Checkpoint.open(folder)))
        config = whole.config.text
        for name, weight in adapters.items():
            changes = after_error.enter_context(closing(changes_of(resolve_adapter(name), whole, weight)))
            if plan is not None:
                found.append(after_error.enter_context(closing(cut_changes(changes, plan, config))))
            else:
                found.append(changes)
            whole = opened.enter_context(closing(whole.changed(changes)))
        after_error.pop_all()
    return found


def with_changes(checkpoint: Checkpoint, changes: Sequence[Changes]) -> Checkpoint:
    """The checkpoint with some changes, instead of the one that is given, which is closed."""
    for entry in changes:
        with closing(checkpoint) as before:
            checkpoint = before.changed(entry)
    return checkpoint

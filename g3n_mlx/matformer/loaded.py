"""The layers of a loaded model as a slice of it, or it with an adapter, takes them: shared, or views of them."""

from dataclasses import dataclass, field
from typing import Any

from g3n_mlx.checkpoint.folder import Changes
from g3n_mlx.checkpoint.source import Ranges
from g3n_mlx.config.text import TextConfig
from g3n_mlx.matformer.plan import PROJECTION, Cut, SlicePlan, cut


@dataclass(frozen=True, slots=True)
class LoadedLayers:
    """What a slice shares with the model that it is taken from, or a model with an adapter with the one without."""

    model: Any  # a backend's Gemma3nModel
    config: TextConfig  # of that model
    plan: SlicePlan
    changes: Changes | None = None  # of an adapter
    _found: dict[str, Any] = field(default_factory=dict[str, Any])  # modules by their paths

    def at(self, path: str) -> Any:
        """The module at a path of the slice, as it is or narrowed; None for what the slice reads for itself.

        Where layers are skipped, the rows of per_layer_model_projection that are kept lie in several places: they are
        copied, 0.2 % of E4B at 4 bits, or read.
        """
        name = self.plan.base_name(path)
        found = self._module(name)
        kept = cut(self.plan, self.config, name)
        if kept == Cut():
            return found
        if name == PROJECTION:
            return found.picked(kept.rows)
        return found.narrowed(_end(kept.rows), _end(kept.columns))

    def _module(self, name: str) -> Any:
        if not name:
            return self.model
        if name not in self._found:
            parent, _, last = name.rpartition(".")
            within = self._module(parent)
            self._found[name] = within[int(last)] if last.isdigit() else getattr(within, last)
        return self._found[name]


def _end(ranges: Ranges | None) -> int | None:
    """How many of the first rows or columns of an FFN's matrix are kept; None for all."""
    return None if ranges is None else ranges[0][1]


def module_at(model: Any, path: str) -> Any:
    """The module of a backend's model at a path, as in `language_model.layers.3.mlp.up_proj`."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def put_module(model: Any, path: str, module: Any) -> None:
    """Puts another module at a path."""
    parent, _, last = path.rpartition(".")
    within = module_at(model, parent)
    if last.isdigit():
        within[int(last)] = module
    else:
        setattr(within, last, module)

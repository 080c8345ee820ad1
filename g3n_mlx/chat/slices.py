"""The sizes in which a chat's model answers: itself and its MatFormer slices, with the speed measured so far."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from g3n_mlx.failures import BadValue
from g3n_mlx.matformer.plan import find_slice, is_whole
from g3n_mlx.matformer.table import Slice

if TYPE_CHECKING:
    from g3n_mlx.engine.results import Usage
    from g3n_mlx.model import Gemma3n

# What the model is called that the slices are taken from.
LOADED = "whole"


@dataclass(slots=True)
class Speed:
    """Tokens decoded so far, and how long that took."""

    tokens: int = 0
    seconds: float = 0.0


class Sizes:
    """The model and its slices, of which one answers; a slice is taken when it is first asked for."""

    def __init__(self, model: "Gemma3n", table: Path | None = None) -> None:
        """table: a CSV table of slices instead of the model's own and the published ones."""
        self._loaded, self._table = model, table
        self._taken = {LOADED: model}
        self._speeds: dict[str, Speed] = {}
        self.name = LOADED

    @property
    def model(self) -> "Gemma3n":
        """What answers."""
        return self._taken[self.name]

    def checked_draft(self, draft: str) -> str:
        """The way to draft, where the whole model knows it; raises ValueError when it does not."""
        return self._loaded.checked_draft(draft)

    def draft(self, draft: str) -> str:
        """How what answers drafts; a slice that drafts does so for the whole model alone."""
        from g3n_mlx.engine.drafts import MODES

        return draft if self.name == LOADED or draft in MODES else "auto"

    def choose(self, name: str) -> None:
        """Has a slice answer from now on, by name or short name; raises ValueError when there is none of that name."""
        chosen = LOADED
        if name.casefold() != LOADED:
            rows = self._rows()
            if not rows:
                raise BadValue(f"{self._loaded.name} has no slices")
            entry = find_slice(name, rows)
            chosen = entry.short_name
            if chosen not in self._taken:
                self._taken[chosen] = self._loaded.slice(entry.name, matformer_config=self._table)
        self.name = chosen

    def close(self) -> None:
        """Frees the model and its slices."""
        for model in self._taken.values():
            model.close()

    def reopen(self, model: "Gemma3n") -> None:
        """Goes on, after `close`, with the same model loaded anew, and with the slice that answered."""
        name, self._loaded, self._taken = self.name, model, {LOADED: model}
        self.choose(name)

    def note(self, usage: "Usage") -> None:
        """Adds the speed of an answer."""
        if usage.avg_compl_tok_per_sec:
            speed = self._speeds.setdefault(self.name, Speed())
            speed.tokens += usage.completion_tokens - 1
            speed.seconds += (usage.completion_tokens - 1) / usage.avg_compl_tok_per_sec

    def lines(self) -> list[str]:
        """All sizes with what is known of them; a star marks the one that answers."""
        found = [self._line(LOADED, self._loaded.slice_name or self._loaded.name)]
        for entry in self._rows():
            size = "" if entry.effective_params_b is None else f"{entry.effective_params_b:.3g} B"
            score = "" if entry.mmlu is None else f", MMLU {entry.mmlu:.1f} %"
            found.append(self._line(entry.short_name, f"{size}{score}"))
        return found

    def _rows(self) -> list[Slice]:
        text = self._loaded.config.text
        return [entry for entry in self._loaded.slices(self._table) if not is_whole(text, entry)]

    def _line(self, name: str, known: str) -> str:
        speed = self._speeds.get(name)
        measured = "not measured yet" if speed is None else f"{speed.tokens / speed.seconds:.1f} tok/s"
        return f"{'*' if name == self.name else ' '} {name:<14} {measured:<17} {known}".rstrip()

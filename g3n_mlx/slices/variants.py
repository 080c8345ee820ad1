"""Candidates as models that run: views of the loaded model, or weights of several conversions put together."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import PARTS
from g3n_mlx.config.manifest import PLE_TABLE
from g3n_mlx.convert import cached_conversion
from g3n_mlx.loading import load_view
from g3n_mlx.slices.costs import has_bits, quantizations
from g3n_mlx.slices.space import Candidate, plan_of

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n


class Variants:
    """The smaller models that a loaded one can become."""

    def __init__(
        self, whole: "Gemma3n", device: str | None = None, activations: str = "exact", *, everything: bool = False
    ) -> None:
        """device, activations: those that the model was loaded with.

        everything: bits of the PLE table and of LAuReL vary too, which the usual conversions have at 8 and dense.
        """
        self.whole, self._device, self._activations = whole, device, activations
        self._everything = everything
        self._conversions: dict[int, Checkpoint] = {}  # by bits; made in the user's cache when first asked for

    @contextmanager
    def opened(self, candidate: Candidate) -> "Generator[Gemma3n, None, None]":
        """The candidate, until the block ends."""
        text = self.whole.config.text
        if not has_bits(candidate):
            with self.whole.slice(plan_of(text, candidate)) as model:
                yield model
            return
        with load_view(self.whole, self._mixed(candidate), self._device, self._activations) as mixed:
            if candidate.widths == text.intermediate_size:
                yield mixed
            else:
                with mixed.slice(plan_of(text, candidate)) as model:
                    yield model

    def close(self) -> None:
        """Closes the conversions; the model that was given stays open."""
        for checkpoint in self._conversions.values():
            checkpoint.close()

    def _mixed(self, candidate: Candidate) -> Checkpoint:
        """The checkpoint with the modules whose bits the candidate chooses taken from its conversions."""
        base = self.whole.checkpoint
        sources, low_ranks, chosen = dict(base.sources), dict(base.low_ranks), dict(quantizations(base, candidate))
        for path, quantization in tuple(chosen.items()):
            if sources[f"{path}.weight"].stored.shard.path.parent != base.folder:  # replaced by an adapter: it stays
                del chosen[path]
                continue
            if (merged := sources[f"{path}.weight"].low_rank) is not None:  # the conversions are without the adapter
                low_ranks[path] = merged
            usual = path == PLE_TABLE and not self._everything  # every conversion has it, at 8 bits
            converted = self._conversion(candidate.outside.token_bits if usual else quantization.bits)
            del sources[f"{path}.weight"]
            sources |= {f"{path}.{part}": converted.sources[f"{path}.{part}"] for part in PARTS}
        return base.view(base.config, base.raw_config, sources, chosen, low_ranks)

    def _conversion(self, bits: int) -> Checkpoint:
        if bits not in self._conversions:
            folder = cached_conversion(self.whole.checkpoint.folder, q_bits=bits, everything=self._everything)
            self._conversions[bits] = Checkpoint.open(folder)
        return self._conversions[bits]

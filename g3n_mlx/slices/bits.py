"""Bits for every part of a model within a budget of bytes on disk: `g3n convert --budget`.

It is the search of slices with every layer as wide as it is: the divergence that each part's bits bring is measured on
data, the best sum within the budget is solved for, and run beside its neighbours and the usual conversions. The result
is a recipe.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from g3n_mlx.calibration import read_prompts
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.hub import resolve
from g3n_mlx.checkpoint.quantization import BITS
from g3n_mlx.checkpoint.recipe import Recipe, write_recipe
from g3n_mlx.checkpoint.registry import cache_folder
from g3n_mlx.commands import say
from g3n_mlx.convert import fingerprint, written_bytes
from g3n_mlx.convert.quantize import FLOATS
from g3n_mlx.failures import BadValue, size_in_words
from g3n_mlx.loading import load
from g3n_mlx.slices.costs import Costs, stored_quantizations
from g3n_mlx.slices.journal import Journal
from g3n_mlx.slices.measure import Divergences
from g3n_mlx.slices.pieces import Piece, split, spread
from g3n_mlx.slices.search import search
from g3n_mlx.slices.space import Candidate, Space, bits_space
from g3n_mlx.slices.variants import Variants

# That are read of the data in each run, spread over all of it.
MAX_TOKENS = 4096
# Text weights that are measured in float32, in which 8 bits can be told from 16; larger ones in the usual dtype.
_FLOAT32_BYTES = 8 << 30
# Searches with a little less room, after one whose folder was larger than its tensors led to expect.
_TRIES = 4


def recipe_within(
    source: str | Path, budget: int, data: Path, recipe: Path, dtype: str | None = None, revision: str | None = None
) -> None:
    """Writes the recipe of the best conversion that was found whose folder is not larger than a budget of bytes.

    data: as `calibration.read_prompts` takes it. dtype: of the conversion. Measurements are kept in the user's cache.
    Raises OSError, or ValueError where nothing fits and for a source that is quantized already.
    """
    folder = resolve(source, revision)
    with closing(Checkpoint.open(folder)) as checkpoint:
        if checkpoint.quantizations:
            raise BadValue(
                f"{folder} is quantized already: --budget chooses bits of the unquantized checkpoint; start from that, "
                "or make this one dense with --dequantize first"
            )
        space, sizes = bits_space(checkpoint.config.text, BITS), _Sizes(checkpoint, dtype)
        if (least := sizes.exact(space.cheapest())) > budget:
            rest = sum(checkpoint.sources[name].num_bytes for name in checkpoint.names if "tower" in name)
            towers = f", {size_in_words(rest)} of it towers, which are not quantized" if rest else ""
            raise BadValue(
                f"nothing fits {size_in_words(budget)}: with everything at {BITS[0]} bits {folder.name} takes "
                f"{size_in_words(least)} on disk{towers}; take a slice of it first (--matformer)"
            )
        small = checkpoint.nbytes_in_memory(4) <= _FLOAT32_BYTES
        with load(folder, dtype="float32" if small else None) as model:
            pieces, held_out = split(spread(read_prompts(model, data), MAX_TOKENS))
            subject = {"model": fingerprint(folder), "backend": model.backend, "device": model.device}
            subject |= {"dtype": model.dtype, "of": "bits of everything"}
            with (
                closing(Variants(model, everything=True)) as variants,
                Journal(_journal(folder, subject), subject) as journal,
                tqdm(total=0, unit="run", disable=None, file=sys.stderr, desc="measuring bits") as bar,
            ):
                divergences = Divergences(variants, journal, bar)
                losses = divergences.of(space.changes(), pieces)
                found = _found(space, sizes, budget, divergences, losses, pieces)
                rivals = [space.whole.at(bits) for bits in BITS if sizes.exact(space.whole.at(bits)) <= budget]
                measured = divergences.of([found, *rivals[-1:]], held_out)
        tokens = sum(piece.tokens for piece in held_out)
        words = f"KL divergence on {tokens} tokens held out: {measured[found]:.4g} nats"
        for rival in rivals[-1:]:
            size, bits = size_in_words(sizes.exact(rival)), rival.outside.token_bits
            words += f"; with {bits} bits throughout ({size}): {measured[rival]:.4g}"
        say(words)
        write_recipe(recipe, stored_quantizations(checkpoint, found))


class _Sizes:
    """Bytes of the folder that a candidate becomes: what adds up, and exactly."""

    def __init__(self, checkpoint: Checkpoint, dtype: str | None) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self.tensors = Costs(checkpoint, FLOATS[dtype or "bfloat16"]).disk

    def exact(self, candidate: Candidate) -> int:
        chosen = stored_quantizations(self._checkpoint, candidate)
        return written_bytes(self._checkpoint, Recipe(tuple(chosen.items())), self._dtype)


def _found(
    space: Space,
    sizes: _Sizes,
    budget: int,
    divergences: Divergences,
    losses: Mapping[Candidate, float],
    pieces: Sequence[Piece],
) -> Candidate:
    """What the search finds, or a usual conversion that fits where that is better after all."""
    least = space.cheapest()
    rest = sizes.exact(least) - sizes.tensors(least)  # towers, tokenizer, headers
    usual = [space.whole.at(bits) for bits in BITS if sizes.exact(space.whole.at(bits)) <= budget]
    found = [least]
    for _ in range(_TRIES):
        room = budget - rest
        candidate = search("bits", space, sizes.tensors, room, divergences, losses, pieces, usual).candidate
        if (excess := sizes.exact(candidate) - budget) <= 0:
            found = [candidate]
            break
        rest += excess
    measured = divergences.of([*found, *usual], pieces)
    return min(measured, key=lambda candidate: measured[candidate])


def _journal(folder: Path, subject: dict[str, str]) -> Path:
    key = hashlib.sha256(repr(subject).encode()).hexdigest()[:16]
    path = cache_folder() / "sensitivities" / f"{folder.resolve().name}-{key}.journal"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

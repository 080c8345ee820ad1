"""A search over the checkpoint with planted importance, in each backend."""

import sys
from fractions import Fraction

import numpy as np
import pytest
from planted import write_planted
from tqdm import tqdm

from g3n_mlx import load
from g3n_mlx.prompt.prompt import of_token_ids
from g3n_mlx.slices.goals import Setting
from g3n_mlx.slices.journal import Journal
from g3n_mlx.slices.measure import Divergences
from g3n_mlx.slices.pieces import Piece
from g3n_mlx.slices.space import space_of
from g3n_mlx.slices.variants import Variants


@pytest.fixture(scope="session")
def planted_folder(tiny_folder, tmp_path_factory):
    return write_planted(tmp_path_factory.mktemp("planted") / "model", tiny_folder)


@pytest.fixture
def setting(planted_folder, backend, tmp_path):
    """A search over two pieces, none held out."""
    draw = np.random.default_rng(0)
    pieces = [Piece(of_token_ids([2, *draw.integers(200, 900, 24).tolist()], 1152), start) for start in (0, 5)]
    with (
        load(planted_folder, backend=backend, dtype="float32", device="cpu") as model,
        Journal(tmp_path / "j", {}) as journal,
    ):
        variants = Variants(model, "cpu")
        space = space_of(model.checkpoint, [Fraction(1, 2)], [])
        with tqdm(total=0, disable=True, file=sys.stderr) as bar:
            yield Setting(variants, space, Divergences(variants, journal, bar), pieces, pieces, [])

"""`Gemma3n.slice`: smaller models inside a loaded one, by name or plan, each with conversations of its own."""

import csv
import weakref

import numpy as np
import pytest
from devices import device_for

from g3n_mlx import load
from g3n_mlx.matformer.plan import SlicePlan
from g3n_mlx.matformer.table import read_slices

QUESTION = "What is 12 + 34?"
GREEDY = {"temperature": 0.0, "max_tokens": 24}
NAMES = ("half", "quarter", "eighth", "skip", "half-skip", "eighth-skip")


@pytest.fixture(scope="module")
def whole(backend):
    """The demo model: 4 bits, with slices of its own."""
    with load("demo", backend=backend, dtype="float32", device=device_for(backend)) as model:
        yield model


def test_a_slice_answers_as_the_one_that_is_taken_at_load(whole, backend):
    assert [entry.short_name for entry in whole.slices()] == list(NAMES)
    before = whole.generate(QUESTION, **GREEDY).token_ids
    slices = {name: whole.slice(name) for name in NAMES}
    for name, ours in slices.items():
        with load("demo", backend=backend, dtype="float32", device=device_for(backend), matformer=name) as theirs:
            assert ours.generate(QUESTION, **GREEDY).token_ids == theirs.generate(QUESTION, **GREEDY).token_ids
            assert (ours.slice_name, ours.config) == (theirs.slice_name, theirs.config)
            assert ours.checkpoint.nbytes_per_token == theirs.checkpoint.nbytes_per_token
            prompt = ours.prepare(QUESTION)
            np.testing.assert_allclose(ours.logits(prompt), theirs.logits(prompt), rtol=0, atol=3e-4)  # of 30
        assert f"slice {ours.slice_name}" in repr(ours)
    assert whole.generate(QUESTION, **GREEDY).token_ids == before
    assert whole.slice_name is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slices_of_a_dense_checkpoint(tiny_folder, backend, dtype, tmp_path):
    rows = [["Narrow", 9, "", "", str([64] * 8 + [128]), "[6]"], ["Wide", 10, "", "", str([256] * 10), ""]]
    table = write_table(tmp_path / "own.csv", rows)
    with load(tiny_folder, backend=backend, dtype=dtype, device=device_for(backend)) as model:
        assert [entry.short_name for entry in model.slices(table)] == ["narrow", "wide"]
        with (
            load(
                tiny_folder,
                backend=backend,
                dtype=dtype,
                device=device_for(backend),
                matformer="narrow",
                matformer_config=table,
            ) as theirs,
            model.slice("Narrow", matformer_config=table) as ours,
        ):
            assert ours.generate([2, 9, 8], **GREEDY).token_ids == theirs.generate([2, 9, 8], **GREEDY).token_ids


def write_table(path, rows):
    header = ["name", "# Layers", "# Effective Params (B)", "MMLU PT accuracy", "FFN Hidden Dims", "Layers Skipped"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_keys_and_values_of_another_slice_are_never_reused(whole):
    half = whole.slice("half")
    fresh = half.generate(QUESTION, **GREEDY)
    assert fresh.usage.cached_tokens == 0
    whole.generate(QUESTION, **GREEDY)
    again = whole.slice("half")
    assert again.generate(QUESTION, **GREEDY).usage.cached_tokens == 0
    assert half.generate(QUESTION, **GREEDY).usage.cached_tokens > 0
    assert half.generate(QUESTION, **GREEDY).token_ids == fresh.token_ids


def test_streams_of_the_whole_and_of_slices_go_on_beside_each_other(whole):
    models = [whole, whole.slice("half"), whole.slice("half-skip")]
    alone = [list(model.generate(QUESTION, **GREEDY).token_ids) for model in models]
    for model in models:
        model.reset()
    streams = [model.stream(QUESTION, **GREEDY) for model in models]
    ids = [[] for _ in models]
    for _ in range(GREEDY["max_tokens"] + 1):
        for stream, found in zip(streams, ids, strict=True):
            chunk = next(stream, None)
            found += [] if chunk is None or chunk.token is None else [chunk.token]
    assert ids == alone


def test_each_is_closed_by_itself_and_the_last_frees_the_weights(backend):
    whole = load("demo", backend=backend, dtype="float32", device=device_for(backend))
    half, other = whole.slice("half"), whole.slice("quarter")
    expected = [model.generate(QUESTION, **GREEDY).token_ids for model in (half, other)]
    picture = np.zeros((16, 16, 3), np.uint8)
    soft = whole.encode_image(picture)
    head = weakref.ref(whole.runner.model.language_model.embed_tokens)
    whole.close()
    with pytest.raises(ValueError, match="closed"):
        whole.slice("half")
    half.reset()
    assert half.generate(QUESTION, **GREEDY).token_ids == expected[0]
    half.drop_towers()
    np.testing.assert_array_equal(half.encode_image(picture), soft)
    half.close()
    assert other.generate(QUESTION, **GREEDY).token_ids == expected[1]
    assert head() is not None
    other.close()
    assert head() is None


def test_a_slice_of_a_slice(whole, backend):
    text = whole.config.text
    first = SlicePlan("first", (0, 1, 2, 3, 5, 6, 7), (512, 256, 512, 256, 384, 512, 512))
    second = SlicePlan("second", (0, 1, 2, 3, 4, 6), (128, 256, 64, 256, 320, 512))
    both = SlicePlan("both", (0, 1, 2, 3, 5, 7), (128, 256, 64, 256, 320, 512))
    assert text.num_hidden_layers == 8
    outer = whole.slice(first)
    inner = outer.slice(second)
    outer.close()
    expected = whole.slice(both)
    prompt = whole.prepare(QUESTION)
    np.testing.assert_allclose(inner.logits(prompt), expected.logits(prompt), rtol=0, atol=3e-4)  # of 30
    assert inner.plan == second


def test_soft_tokens_are_made_once_for_all_slices(whole, monkeypatch):
    half = whole.slice("half")
    calls = []
    towers = whole.runner.model.towers
    embed_images = towers.embed_images
    monkeypatch.setattr(towers, "embed_images", lambda pixels: (calls.append(1), embed_images(pixels))[1])
    picture = np.full((24, 24, 3), 7, np.uint8)
    np.testing.assert_array_equal(whole.encode_image(picture), half.encode_image(picture))
    assert calls == [1]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("halv", "did you mean 'half'"),
        (SlicePlan("p", (0, 1), (512, 512)), r"skips layers \[2, 3\]"),
        (SlicePlan("p", (0, 2, 1, 3, 4, 5, 6, 7), (512,) * 8), "ascending"),
        (SlicePlan("p", (0, 1, 2, 3, 4, 5, 6, 8), (512,) * 8), "expected some of 0 to 7"),
        (SlicePlan("p", tuple(range(8)), (512,) * 7), "7 FFN widths for 8 kept layers"),
        (SlicePlan("p", tuple(range(8)), (1024,) * 8), "wants 1024 FFN units in layer 0"),
        (SlicePlan("p", tuple(range(8)), (100,) * 8), "not whole groups"),
    ],
    ids=str,
)
def test_what_cannot_be_taken_is_said(whole, chosen, message):
    with pytest.raises(ValueError, match=message):
        whole.slice(chosen)


def test_only_slices_of_whole_groups_are_listed(tmp_path, whole):
    odd = [["Odd", 8, "", "", str([100] * 8), ""], ["Even", 8, "", "", str([64] * 8), ""]]
    table = write_table(tmp_path / "own.csv", odd)
    assert len(read_slices(table)) == 2
    assert [entry.name for entry in whole.slices(table)] == ["Even"]

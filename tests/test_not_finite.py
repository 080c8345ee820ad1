"""Weights with NaN or infinity in them: an error that names the tensor, never text."""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest

from g3n_mlx import Image, load
from g3n_mlx.convert import convert
from g3n_mlx.failures import Error

TEXT = "model.language_model."
UP = f"{TEXT}layers.1.mlp.up_proj.weight"


@pytest.fixture
def damaged(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """damaged(name, value, index): the tiny checkpoint with one number of one tensor replaced."""

    def write(name: str, value: float, index: tuple[int, ...] | int = 0, source: Path = tiny_folder) -> Path:
        tensors = files.read_folder(source)
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[index] = value
        folder = shutil.copytree(source, tmp_path / "damaged")
        files.write_safetensors(folder / "model.safetensors", tensors)
        return folder

    return write


def named(name: str) -> str:
    return rf"{name.removeprefix('model.')} \(in model.safetensors\) holds NaN or infinity"


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"regex": "[a-z]+"}])
@pytest.mark.parametrize(
    "name", [UP, f"{TEXT}layers.9.altup.correct_output_scale", f"{TEXT}altup_projections.1.weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_names_the_tensor(backend, damaged, name, value, options):
    model = load(damaged(name, value), backend=backend)
    with pytest.raises(Error, match=named(name)):
        model.generate("Hello", max_tokens=4, ignore_eos="regex" not in options, **options)
    with pytest.raises(Error, match=named(name)):
        list(model.stream("Hello", max_tokens=4))
    outcomes = dict(model.stream_many(["Hello", "Hi"], max_tokens=4, **options))
    assert all(isinstance(outcome, Error) for outcome in outcomes.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [f"{TEXT}norm.weight", f"{TEXT}embed_tokens.weight"])
def test_what_the_soft_cap_would_hide_is_seen_at_load(backend, damaged, name, value):
    with pytest.raises(Error, match=named(name)):
        load(damaged(name, value, 7), backend=backend)


def test_a_later_step_names_it_too(backend, damaged, tiny_folder):
    """A row of the PLE table that no prompt reads, but the answer does."""
    sound = load(tiny_folder, backend=backend)
    options = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    first, *rest = sound.generate([2, 5], **options).token_ids
    assert rest
    ple = f"{TEXT}embed_tokens_per_layer.weight"
    model = load(damaged(ple, math.nan, first * 640), backend=backend)
    chunks = model.stream([2, 5], **options)
    assert next(chunks).token == first
    with pytest.raises(Error, match=named(ple)):
        list(chunks)


def test_whatever_is_read_of_a_model_is_finite(backend, damaged):
    model = load(damaged(UP, math.nan), backend=backend)
    with pytest.raises(Error, match=named(UP)):
        model.logits("Hello")
    with pytest.raises(Error, match=named(UP)):
        list(model.score(model.prepare("Hello")))


def test_a_tower_is_named(backend, damaged):
    name = "model.vision_tower.timm_model.conv_stem.conv.weight"
    model = load(damaged(name, math.nan), backend=backend)
    image = Image(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(Error, match=named(name)):
        model.encode_image(image)
    with pytest.raises(Error, match=named(name)):
        model.generate("What is it?", images=image, max_tokens=2)
    assert model.generate("Hello", max_tokens=2).text is not None


def test_finite_weights_that_overflow_are_told_apart(backend, damaged):
    """Finite in every weight, infinite in the product of two."""
    model = load(damaged(f"{TEXT}layers.1.post_feedforward_layernorm.weight", 3e38, slice(None)), backend=backend)
    with pytest.raises(Error, match="every weight is finite, but the activations overflow"):
        model.logits("Hello")


def test_the_command_fails(damaged):
    command = [sys.executable, "-m", "g3n_mlx.chat", "--model", str(damaged(UP, math.nan)), "-p", "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "layers.1.mlp.up_proj.weight" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [UP, f"{TEXT}norm.weight", "model.embed_audio.embedding.weight"])
@pytest.mark.parametrize("q_bits", [None, 4])
def test_a_conversion_fails(damaged, tmp_path, name, value, q_bits):
    with pytest.raises(Error, match=f"{name} holds NaN or infinity"):
        convert(damaged(name, value), tmp_path / "out", q_bits=q_bits, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_a_quantized_source_is_checked_too(backend, damaged, tiny_folder, tmp_path, part):
    quantized = convert(tiny_folder, tmp_path / "quantized", q_bits=4, q_group_size=32, progress=False)
    name = UP.replace("weight", part)
    folder = damaged(name, math.nan, source=quantized)
    with pytest.raises(Error, match=f"{name} holds NaN or infinity"):
        convert(folder, tmp_path / "out", progress=False)
    with pytest.raises(Error, match=named(name)):
        load(folder, backend=backend).generate("Hello", max_tokens=2)

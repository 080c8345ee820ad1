"""Whole models of all three modalities with drawn shapes: both backends against transformers, pictures and sounds in.

Each clip is encoded alone, as everywhere here (tests/golden/README.md).
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import logits_of, make_cache
from checkpoint_files import read_config
from devices import tolerance
from random_gemma3n import IMAGE, MediaPrompt, random_prompt, write_gemma3n

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.engine.sequence import prefill_spans, soft_tokens
from g3n_mlx.prompt.prompt import MediaSpan

TOLERANCE = tolerance(1e-3)
SEEDS = (0, 1, 2, 3, 5, 6, 7, 8)  # not 4: there the reference itself is 1e-2 from its float64


@pytest.fixture(scope="module")
def reference_class() -> Any:
    """The reference's wrapper that the goldens were made with."""
    for package in ("torch", "timm", "torchvision", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    importlib.import_module("golden.reference_builder.torchvision_stubs").declare_missing_operators()
    return importlib.import_module("golden.reference_builder.reference_model").Reference


@pytest.fixture(scope="module", params=SEEDS)
def seed(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def folder(seed: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma3n(tmp_path_factory.mktemp("drawn"), seed)


@pytest.fixture(scope="module")
def prompt(seed: int, folder: Path) -> MediaPrompt:
    return random_prompt(read_config(folder), seed)


@pytest.fixture(scope="module")
def networks(folder: Path, frameworks: dict[str, Any]) -> dict[str, Any]:
    """Backend -> Gemma3nModel in float32."""
    return {name: framework.model(Checkpoint.open(folder)) for name, framework in frameworks.items()}


@pytest.fixture(scope="module")
def soft(networks: dict[str, Any], prompt: MediaPrompt) -> dict[str, dict[tuple[str, int], Any]]:
    """Backend -> kind and number of a medium -> its soft tokens."""
    encoded: dict[str, dict[tuple[str, int], Any]] = {}
    for name, network in networks.items():
        pictures = {(IMAGE, i): network.embed_images(picture[None])[0] for i, picture in enumerate(prompt.pictures)}
        clips = {
            ("audio", i): network.embed_audio(frames[None], mask[None])[0]
            for i, (frames, mask) in enumerate(prompt.clips)
        }
        encoded[name] = pictures | clips
    return encoded


@pytest.fixture(scope="module")
def expected(folder: Path, prompt: MediaPrompt, reference_class: Any) -> np.ndarray:
    """Logits [T, V] of transformers."""
    import torch
    import transformers

    class Bare(reference_class):
        def __init__(self) -> None:
            self.dtype = torch.float32
            self.model = transformers.Gemma3nForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()

    pixels = torch.from_numpy(prompt.pictures.transpose(0, 3, 1, 2).copy())
    clips = [(frames[None], mask[None]) for frames, mask in prompt.clips]
    ids = torch.from_numpy(prompt.token_ids)[None]
    return Bare().logits(ids, pixel_values=pixels, audio_clips=clips)[0].numpy()


def placed(prompt: MediaPrompt, soft: dict[tuple[str, int], Any], start: int, stop: int) -> Any:
    """The soft tokens among ids [start, stop)."""
    spans = [MediaSpan(first, length, (kind, which)) for first, length, kind, which in prompt.spans]
    return soft_tokens(spans, start, stop, lambda which, _: soft[which])


def test_logits_are_the_references(networks, prompt, soft, expected):
    assert np.abs(expected).max() > 1  # or equality would say little
    for name, network in networks.items():
        media = placed(prompt, soft[name], 0, len(prompt.token_ids))
        ours = logits_of(network, prompt.token_ids, make_cache(network), media)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE, err_msg=name)


def test_pieces_are_the_whole(networks, prompt, soft):
    for name, network in networks.items():
        whole = logits_of(network, prompt.token_ids, make_cache(network), placed(prompt, soft[name], 0, 10**6))
        cache = make_cache(network)
        rows = [
            logits_of(network, prompt.token_ids[a:b], cache, placed(prompt, soft[name], a, b))
            for a, b in prefill_spans(0, len(prompt.token_ids), (), 5)
        ]
        np.testing.assert_allclose(np.concatenate(rows), whole, rtol=0, atol=TOLERANCE, err_msg=name)

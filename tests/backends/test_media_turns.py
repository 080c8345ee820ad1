"""Pictures and sounds over several turns and prompts; the towers' dtype; and the memory that they give back."""

import gc
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import copy_sidecars
from devices import device_for
from hypothesis import given, settings
from hypothesis import strategies as st
from random_vision import er, uir, write_random_vision

from g3n_mlx import Audio, Image, load
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.memory import return_freed_memory

RATE = 16_000
NOISE = np.random.default_rng(3)
MEDIA = [
    *(Image(NOISE.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(2)),
    *(Audio(NOISE.uniform(-0.5, 0.5, length).astype(np.float32), RATE) for length in (300, 9_000)),
]


@pytest.fixture(scope="module")
def models(backends, tiny_folder) -> list[Any]:
    return [load(tiny_folder, backend=backend, dtype="float32", device=device_for(backend)) for backend in backends]


parts = st.lists(st.one_of(st.sampled_from(MEDIA), st.sampled_from(["Look", " and listen:", "\n\nWhy?"])), min_size=1)


@settings(max_examples=5, deadline=None)
@given(
    turns=st.lists(parts.filter(lambda content: len(content) < 5), min_size=1, max_size=3), step_size=st.integers(3, 40)
)
def test_any_turns_are_answered_as_if_fresh(models, turns, step_size):
    """Whatever the cache holds of the turns before, and wherever the prompt is cut, media blocks included."""
    options = {"temperature": 0, "max_tokens": 2, "ignore_eos": True}
    for model in models:
        model.reset()
        messages: list[dict] = []
        for content in turns:
            messages.append({"role": "user", "content": content})
            prompt = model.prepare(messages)
            going_on = model.generate(prompt, **options, prefill_step_size=step_size)
            before, model._conversation = model._conversation, None
            fresh = model.generate(prompt, **options, prefill_step_size=4096)
            model._conversation = before
            row = model.logits(prompt)[-1]
            best = np.sort(row)[-2:]
            if best[1] - best[0] > 1e-3:
                assert going_on.token_ids[0] == fresh.token_ids[0] == row.argmax()
            if len(messages) > 1:
                assert going_on.usage.cached_tokens > 0
            messages.append({"role": "assistant", "content": going_on.text or "."})


def test_back_across_a_media_block(models):
    """Another text behind the same picture goes on behind the picture; another picture before it does not."""
    picture, other, sound, _ = MEDIA
    options = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
    for model in models:
        model.reset()

        def ask(*content: Any, model: Any = model) -> tuple[Any, Any]:
            prompt = model.prepare([{"role": "user", "content": list(content)}])
            return prompt, model.generate(prompt, **options)

        ask("Look:", picture, sound, "What is it?")
        prompt, result = ask("Look:", picture, sound, "And how many?")
        behind = prompt.media[1].start + prompt.media[1].length + 1
        assert behind <= result.usage.cached_tokens < len(prompt.token_ids)
        prompt, result = ask("Look:", picture, "And how many?")
        behind = prompt.media[0].start + prompt.media[0].length + 1
        assert result.usage.cached_tokens == behind
        prompt, result = ask("Look:", other, "And how many?")
        assert result.usage.cached_tokens <= prompt.media[0].start
        model.reset()
        assert ask("Look:", other, "And how many?")[1].token_ids == result.token_ids


@pytest.mark.usefixtures("bfloat16_products")
def test_nothing_between_the_modules_of_bfloat16_towers_is_float32(framework, tiny_folder, monkeypatch):
    """Whatever goes into a module of the towers and embedders or comes out of it, and every weight."""
    network = framework.model(Checkpoint.open(tiny_folder), "bfloat16")
    call, seen = ("__call__", set()) if framework.name == "mlx" else ("forward", set())

    def floats(values: Any) -> list[str]:
        values = values if isinstance(values, tuple | list) else (values,)
        return [str(value.dtype) for value in values if "float" in str(getattr(value, "dtype", ""))]

    def watch(kind: type) -> None:
        original = getattr(kind, call)

        def watched(self: Any, *arguments: Any) -> Any:
            result = original(self, *arguments)
            for dtype in floats(arguments) + floats(result):
                assert dtype.endswith("bfloat16"), (kind.__name__, dtype)
            seen.add(kind.__name__)
            return result

        monkeypatch.setattr(kind, call, watched)

    for name in ("vision", "audio", "layers", "model"):
        module = framework.module(name)
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module.__name__ and call in vars(kind):
                watch(kind)
    watch(framework.module("text").RMSNorm)
    image = network.embed_images(np.ones((1, 64, 64, 3), np.float32))[0]
    sound = network.embed_audio(np.ones((1, 40, 128), np.float32), np.ones((1, 40), bool))[0]
    assert floats((image, sound)) == [str(image.dtype)] * 2
    assert {"Conv2d", "MultiQueryAttention", "LocalAttention", "CumulativeGroupNorm", "Linear"} <= seen
    for tower in (network.towers.vision_tower, network.towers.audio_tower):
        weights = tower.state_dict().values() if framework.name == "torch" else leaves(tower.parameters())
        assert {dtype.rpartition(".")[2] for weight in weights for dtype in floats(weight)} == {"bfloat16"}


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [leaf for value in tree for leaf in leaves(value)] if isinstance(tree, list) else [tree]


def test_dropped_towers_leave_the_process(backend, tiny_folder, tmp_path):
    """Not only the objects: what they held goes back to the system, in tensors of any size."""
    if sys.platform != "linux":
        pytest.skip("asks Linux for the process's own memory")
    narrow = [[er(16, 3, 2)], [uir(16, 3, 0, stride=2)], [uir(16, 3, 0, stride=2)]]
    wide = [uir(512, 3, 0, stride=2), *[uir(512, 3, 0, ratio=4.0)] * 12]  # few places, many weights
    folder = write_random_vision(tmp_path, tiny_folder, {"block_args": [*narrow, wide], "msfa_output_resolution": 2})
    copy_sidecars(tiny_folder, folder)
    model = load(folder, backend=backend, dtype="float32", device=device_for(backend))
    tower = [name for name in model.checkpoint.names if name.startswith("vision_tower.")]
    weights = sum(4 * math.prod(model.checkpoint.info(name).shape) for name in tower)
    assert weights > 100e6  # so much that nothing else in the process comes near
    gc.collect()
    return_freed_memory()  # what is free already would be taken before new pages are
    before = anonymous_bytes()
    model.encode_image(np.zeros((32, 32, 3), np.uint8))
    assert anonymous_bytes() - before > 0.7 * weights
    model.drop_towers()
    assert anonymous_bytes() - before < 0.3 * weights


def anonymous_bytes() -> int:
    """What the process holds that is no page of a file."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

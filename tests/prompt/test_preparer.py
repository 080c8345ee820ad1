"""Prompts made in several threads at once."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from media_files import sound_file, tones, video_file
from PIL import Image as pil

from g3n_mlx import Audio, Image, Video
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.prompt.preparer import Preparer
from g3n_mlx.prompt.prompt import PromptTooLong
from g3n_mlx.prompt.tokenizer import Tokenizer

THREADS = 8


def preparer(folder) -> Preparer:
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    return Preparer(Tokenizer.from_folder(folder), MediaOpener(folder, config), 10_000)


def image_file(path, seed: int, **options) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (50, 70, 3), np.uint8)
    pil.fromarray(pixels).save(path, **options)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> list[list]:
    """One for each thread, with media of every kind in files of their own; the last object stands in all of them."""
    folder = tmp_path_factory.mktemp("media")
    waveform = tones(16_000)
    (folder / "a.mp3").write_bytes(sound_file("mp3"))
    (folder / "a.m4a").write_bytes(sound_file("m4a"))
    (folder / "a.mp4").write_bytes(video_file(2.0, sound=tones(48_000, 2.0)))
    found = []
    for thread in range(THREADS):
        image_file(folder / f"{thread}.png", thread)
        image_file(folder / f"{thread}.jpg", thread, quality=80 + thread)
        found.append(
            [
                f"Thread {thread}",
                {"type": "image", "path": folder / f"{thread}.png"},
                {"type": "image", "path": folder / f"{thread}.jpg"},
                Audio(folder / ("a.mp3" if thread % 2 else "a.m4a")),
                Audio(waveform * np.float32(1 / (thread + 1)), 16_000 + 1000 * thread),
                Video(folder / "a.mp4", fps=1 + thread % 3),
                "word " * (50 * thread),
            ]
        )
    shared = Image(folder / "0.png")
    return [[{"role": "user", "content": [*parts, shared]}] for parts in found]


def test_threads_prepare_what_one_thread_would(tiny_folder, conversations):
    expected = [preparer(tiny_folder).prepare(messages) for messages in conversations]
    assert len({prompt.identity for prompt in expected}) == THREADS
    shared, begin = preparer(tiny_folder), threading.Barrier(THREADS)

    def prepare(thread: int) -> list:
        begin.wait(60)
        # Each begins with its own conversation, then meets those of the others.
        order = [(thread + step) % THREADS for step in range(3)]
        return [(index, shared.prepare(conversations[index])) for index in order]

    filters = list(warnings.filters)
    with ThreadPoolExecutor(THREADS) as threads:
        for prepared in threads.map(prepare, range(THREADS)):
            for index, prompt in prepared:
                assert prompt.identity == expected[index].identity
                assert prompt.borders == expected[index].borders
    assert warnings.filters == filters


def test_filters_of_warnings_outlive_images_that_overlap():
    """Whoever comes first need not leave last."""
    from g3n_mlx.media.image import _pillow_is_quiet

    filters = list(warnings.filters)
    first, second = threading.Event(), threading.Event()

    def overlap() -> None:
        with _pillow_is_quiet:
            first.set()
            assert second.wait(60)

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(overlap)
        assert first.wait(60)
        with _pillow_is_quiet:
            second.set()
            done.result()
            assert warnings.filters != filters
    assert warnings.filters == filters


def test_text_alone(tiny_folder):
    small = Preparer(Tokenizer.from_folder(tiny_folder), preparer(tiny_folder).opener, 6)
    assert small.encode("Hi") == small.tokenizer.encode("Hi")
    with pytest.raises(PromptTooLong, match="context of 6 tokens"):
        small.encode("a" * (6 * small.tokenizer.max_token_bytes + 1))
    with pytest.raises(ValueError, match="lone surrogate"):
        small.encode("\ud800")

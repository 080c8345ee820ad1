"""Every example is short and runs on the embedded model; the media beside them are what they are said to be."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from g3n_mlx import Audio, Image, Video
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.media.policy import MediaPolicy

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
MEDIA = FOLDER / "media"
SCRIPT = MEDIA / "make_media.py"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path):
    assert len(path.read_text("utf-8").splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, str(path), str(demo_folder())],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_media_are_what_the_examples_say():
    files = sorted(path for path in MEDIA.iterdir() if path.is_file() and path != SCRIPT)
    assert sum(path.stat().st_size for path in files) < 200_000
    policy = MediaPolicy()
    pictures = {path.name: Image(path).rgb(policy) for path in files if path.suffix in (".png", ".jpg")}
    sounds = {
        path.name: Audio(path).waveform(16_000, policy) for path in files if path.suffix in (".ogg", ".wav", ".flac")
    }
    assert set(pictures) == {"shapes.png", "sign.png", "circle.jpg"}
    assert set(sounds) == {"digits.ogg", "red_circle.ogg", "tone.wav", "beeps.flac"}
    assert all(0.5 < len(sound) / 16_000 < 3.9 for sound in sounds.values())  # a clip of the demo is 4 s
    red, blue = (
        np.abs(pictures["shapes.png"].astype(int) - colour).sum(-1) < 120 for colour in ((215, 30, 30), (35, 70, 215))
    )
    assert red.sum() > 2 * blue.sum() > 200
    assert red.nonzero()[1].max() < blue.nonzero()[1].min()
    clip = Video(MEDIA / "clip.mp4")
    frames = [pixels for _, pixels in clip.open(policy).frames()]
    places = [(pixels.min(axis=2) < 100).nonzero()[1].mean() for pixels in frames]
    assert len(frames) == 3
    assert all(step > 40 for step in np.diff(places))
    assert clip.open(policy).audio(16_000) is not None


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_the_script_makes_the_media(tmp_path):
    fonts = {path.name for path in Path("/usr/share/fonts/truetype").rglob("*.ttf")}
    if not {"DejaVuSans-Bold.ttf", "LiberationSans-Regular.ttf", "FreeSansBold.ttf"} <= fonts:
        pytest.skip("the fonts DejaVu, Liberation and FreeFont are not installed")
    assert importlib.util.find_spec("av")
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in MEDIA.iterdir() if path.is_file() and path != SCRIPT}

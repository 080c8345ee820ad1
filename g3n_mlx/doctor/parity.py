"""The embedded model on this device beside what it computed where it was made: logits, soft tokens and answers.

`golden.npz` beside the model holds those; examples/train_demo/write_golden.py writes it. The picture and the clip are
drawn here, so that nothing has to be shipped for them.
"""

from typing import Any

import numpy as np

from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.media.audio import Audio
from g3n_mlx.media.image import Image
from g3n_mlx.model import Gemma3n

FILE = "golden.npz"
# Of the largest value. In float32, sums in another order move the last digits. bfloat16 has 8 bits, so every stored
# number is off by up to 0.2 %: on CPUs the logits were 1.1 % off with PyTorch and 2.6 % with MLX, soft tokens 1 %.
LIMITS = {"float32": 1e-3, "bfloat16": 0.05}
QUESTIONS = ("What is 12 + 34?", "What is in this picture?", "What do you hear?")
_SIZE, _RATE = 192, 16_000
_KINDS = ("logits", "image", "audio")


def picture() -> np.ndarray:
    """A red circle left of a blue square on white, uint8 [h, w, 3]."""
    y, x = np.mgrid[:_SIZE, :_SIZE]
    drawn = np.full((_SIZE, _SIZE, 3), 255, np.uint8)
    drawn[(x - 50) ** 2 + (y - 60) ** 2 < 34**2] = (220, 30, 30)
    drawn[(abs(x - 140) < 30) & (abs(y - 130) < 30)] = (30, 60, 220)
    return drawn


def clip() -> np.ndarray:
    """Two seconds of a tone that rises from 300 to 900 Hz, float32."""
    seconds = np.arange(2 * _RATE) / _RATE
    return (0.3 * np.sin(2 * np.pi * (300 * seconds + 150 * seconds**2))).astype(np.float32)


def computed(model: Gemma3n) -> dict[str, np.ndarray]:
    """What is compared, float32 but for the answers: logits [8, V], soft tokens [n, D] of both kinds, three texts."""
    image, audio = Image(picture()), Audio(clip(), _RATE)
    media: tuple[dict[str, Any], ...] = ({}, {"images": image}, {"audio": audio})
    texts = [
        model.generate(question, temperature=0.0, max_tokens=32, **about).text
        for question, about in zip(QUESTIONS, media, strict=True)
    ]
    return {
        "logits": model.logits(QUESTIONS[0])[-8:],
        "image": model.encode_image(image),
        "audio": model.encode_audio(clip(), _RATE),
        "answers": np.array(texts),
    }


def compared(model: Gemma3n) -> dict[str, Any]:
    """The differences of the embedded model, of the largest value, with their limit, and its three answers."""
    with np.load(demo_folder() / FILE) as golden:
        expected = dict(golden)
    found = computed(model)
    limit = LIMITS[model.dtype]
    differences: dict[str, float] = {}
    for kind in _KINDS:
        ours, theirs = found[kind], expected[kind]
        same_shape = ours.shape == theirs.shape
        differences[kind] = float(np.abs(ours - theirs).max() / np.abs(theirs).max()) if same_shape else float("inf")
    return {
        "dtype": model.dtype,
        "limit": limit,
        "differences": differences,
        "answers": found["answers"].tolist(),
        "equal_answers": int((found["answers"] == expected["answers"]).sum()),
        "good": all(value <= limit for value in differences.values()),
    }

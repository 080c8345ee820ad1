"""Makes the pictures, sounds and the video beside this file: python examples/media/make_media.py [FOLDER]

They are drawn and sounded by what the demo model was trained with (../train_demo), and spoken by espeak-ng; nothing
in them is anybody else's. Needs espeak-ng, the DejaVu fonts.
"""

import sys
from fractions import Fraction
from itertools import count
from pathlib import Path
from random import Random

import av
import numpy as np
import soundfile
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "train_demo"))

from pictures import Thing, draw_scene, draw_sign  # noqa: E402
from sounds import recorded, tone  # noqa: E402
from speech import RATE, synthesise  # noqa: E402

VOICE, WORDS_A_MINUTE, PITCH = "en-gb", 160, 50
VIDEO_SECONDS, FRAMES_A_SECOND = 3, 10


def on_white(*things: Thing) -> Image.Image:
    """A scene of 256 x 256 pixels on white: the first seed that draws one."""
    pictures = (draw_scene(Random(seed), list(things)) for seed in count())
    return next(p for p in pictures if p.size == (256, 256) and p.getpixel((0, 0)) == (255, 255, 255))


def said(words: str) -> np.ndarray:
    """A voice that says the words, with silence around them."""
    waveform = synthesise(words, VOICE, WORDS_A_MINUTE, PITCH).astype(np.float32) / 32768
    return recorded(Random(1), waveform)


def sign(text: str) -> Image.Image:
    """A sign of 192 x 192 pixels."""
    signs = (draw_sign(Random(seed), text, held_out=False) for seed in count())
    return next(picture for picture in signs if picture.size == (192, 192))


def beeps(number: int) -> np.ndarray:
    """Short tones with pauses."""
    silence = np.zeros(RATE // 4, np.float32)
    return np.concatenate([part for _ in range(number) for part in (tone(800, 800, 0.2), silence)])


def write_video(path: Path, waveform: np.ndarray) -> None:
    """A green square that moves to the right for two seconds and rests for one, and a sound."""
    with av.open(str(path), "w") as output:
        pictures = output.add_stream("libx264", rate=FRAMES_A_SECOND, options={"crf": "18"})
        pictures.width, pictures.height, pictures.pix_fmt = 256, 256, "yuv420p"
        sound = output.add_stream("aac", rate=RATE, layout="mono")
        for index in range(VIDEO_SECONDS * FRAMES_A_SECOND):
            x = 0.25 + 0.25 * min(2.0, index / FRAMES_A_SECOND)
            frame = av.VideoFrame.from_image(on_white(Thing("square", "green", "large", x, 0.5, 0.185, 0.0)))
            frame.pts, frame.time_base = index, Fraction(1, FRAMES_A_SECOND)
            output.mux(pictures.encode(frame))
        output.mux(pictures.encode(None))
        whole = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        whole.sample_rate = RATE
        queue, position = av.AudioFifo(), 0
        queue.write(whole)
        while block := queue.read(1024, partial=True):
            block.pts, block.time_base = position, Fraction(1, RATE)
            position += block.samples
            output.mux(sound.encode(block))
        output.mux(sound.encode(None))


def main(folder: str | None = None) -> None:
    target = Path(folder) if folder else HERE
    circle = Thing("circle", "red", "large", 0.3, 0.42, 0.19, 0.0)
    square = Thing("square", "blue", "small", 0.75, 0.62, 0.1, 0.0)
    on_white(circle, square).save(target / "shapes.png", optimize=True)
    sign("OPEN").save(target / "sign.png", optimize=True)
    on_white(circle).save(target / "circle.jpg", quality=90)
    soundfile.write(target / "digits.ogg", said("three one four"), RATE, subtype="VORBIS")
    soundfile.write(target / "red_circle.ogg", said("red circle"), RATE, subtype="VORBIS")
    soundfile.write(target / "tone.wav", recorded(Random(2), tone(1400, 1400, 0.8)), RATE, subtype="PCM_16")
    soundfile.write(target / "beeps.flac", recorded(Random(3), beeps(3)), RATE, subtype="PCM_16")
    write_video(target / "clip.mp4", recorded(Random(4), tone(220, 1500, 1.2)))


if __name__ == "__main__":
    main(*sys.argv[1:])

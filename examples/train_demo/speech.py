"""Speech by espeak-ng, synthesised once into a cache: digits, commands, coloured shapes, by many voices.

    python speech.py CACHE_FOLDER --train 16000 --held-out 2500 --seed 1

Writes train.npy and held_out.npy (int16 waveforms, 16 kHz, one behind the other) with a .json of texts and borders.
The held-out part is spoken by other voices. espeak-ng is GPL software, what it speaks is free.
"""

import argparse
import io
import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
from pictures import COLOURS, SHAPES

RATE = 16_000
MAX_SECONDS = 3.8  # a clip is four seconds at most, and gets some silence around
DIGITS = "zero one two three four five six seven eight nine".split()
COMMANDS = (
    "stop", "go", "start", "yes", "no", "hello", "good morning", "thank you", "turn left", "turn right",
    "open the door",
    "close the door", "lights on", "lights off", "play music", "pause", "louder", "quieter", "next song", "go home",
    "call Anna", "what time is it", "good night", "help me",
)  # fmt: skip
ACCENTS = ("en-gb", "en-us", "en-gb-x-rp", "en-029", "en-us-nyc", "en-gb-scotland")
TONES = ("", "+f1", "+f2", "+f3", "+f5", "+m1", "+m2", "+m3", "+m5", "+m6", "+m8", "+Alicia", "+Andy", "+Michael",
         "+Annie", "+Denis", "+Lee", "+Mario", "+adam", "+edward", "+linda", "+steph", "+travis",
         "+victor")  # fmt: skip
HELD_OUT_TONES = ("+f4", "+m4", "+m7", "+Jacky", "+steph2", "+max", "+belinda")


def spoken(rng: random.Random) -> tuple[str, str, str]:
    """Kind, the text as the model should write it, and the words to say."""
    kind = rng.choices(("digits", "command", "shape"), (6, 2, 2))[0]
    if kind == "digits":
        digits = [rng.randrange(10) for _ in range(rng.randint(1, 5))]
        separator = rng.choice((" ", " ", ", "))
        return kind, " ".join(map(str, digits)), separator.join(DIGITS[digit] for digit in digits)
    if kind == "command":
        command = rng.choice(COMMANDS)
        return kind, command, command
    phrase = f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
    return kind, phrase, phrase


def synthesise(words: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """The waveform of some words, int16 at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", words]
    wav = subprocess.run(command, check=True, capture_output=True).stdout
    waveform, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    waveform = soxr.resample(waveform, rate, RATE)
    return (np.clip(waveform, -1, 1) * 32767).astype(np.int16)


def write_cache(folder: Path, name: str, count: int, seed: int) -> None:
    """Synthesises `count` utterances, those that are too long left out."""
    rng = random.Random(f"{name} {seed}")
    tones = HELD_OUT_TONES if name == "held_out" else TONES
    texts = [spoken(rng) for _ in range(count)]
    settings = [(rng.choice(ACCENTS) + rng.choice(tones), rng.randint(130, 210), rng.randint(20, 80)) for _ in texts]
    with ThreadPoolExecutor(2) as pool:
        waves = pool.map(lambda text, setting: synthesise(text[2], *setting), texts, settings)
        kept = [(text, wave) for text, wave in zip(texts, waves, strict=True) if len(wave) < MAX_SECONDS * RATE]
    borders = np.cumsum([0, *(len(wave) for _, wave in kept)]).tolist()
    np.save(folder / f"{name}.npy", np.concatenate([wave for _, wave in kept]))
    entries = [(kind, text, *borders[place : place + 2]) for place, ((kind, text, _), _) in enumerate(kept)]
    (folder / f"{name}.json").write_text(json.dumps(entries))


class SpeechCache:
    """The utterances of one part, by kind."""

    def __init__(self, folder: Path, name: str) -> None:
        self.samples = np.load(folder / f"{name}.npy", mmap_mode="r")
        self.entries: dict[str, list[tuple[str, int, int]]] = {}
        for kind, text, start, stop in json.loads((folder / f"{name}.json").read_text()):
            self.entries.setdefault(kind, []).append((text, start, stop))

    def draw(self, rng: random.Random, kind: str) -> tuple[str, np.ndarray]:
        """A text and its waveform, float32."""
        text, start, stop = rng.choice(self.entries[kind])
        return text, self.samples[start:stop].astype(np.float32) / 32768


def main() -> None:
    """Writes both parts of the cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=16_000)
    parser.add_argument("--held-out", type=int, default=2_500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_cache(arguments.folder, "held_out", arguments.held_out, arguments.seed)
    write_cache(arguments.folder, "train", arguments.train, arguments.seed)


if __name__ == "__main__":
    main()

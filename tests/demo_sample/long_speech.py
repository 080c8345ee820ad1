"""How well the embedded model hears long speech, at the borders of its clips and inside them: for docs/tools.md.

    python tests/demo_sample/long_speech.py --minutes 10 --seed 1

Needs `espeak-ng`. Groups of one to five digits, each said by another voice of those that training never heard, with
pauses of 0.15 to 0.9 seconds between them. A digit's place in time is its share of the group's letters; digits within
half a second of a border are counted as the border's.
"""

import argparse
import io
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from g3n_mlx import Audio, load

RATE = 16_000
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# Of examples/train_demo/speech.py: what the held-out part is spoken with.
ACCENTS = ("en-gb", "en-us", "en-gb-x-rp", "en-029", "en-us-nyc", "en-gb-scotland")
TONES = ("+f4", "+m4", "+m7", "+Jacky", "+steph2", "+max", "+belinda")
NEAR_S = 0.5


@dataclass(frozen=True, slots=True)
class Word:
    """A digit, and the second at which its middle is said."""

    digit: str
    at_s: float


def say(digits: list[int], voice: str, speed: int, pitch: int) -> np.ndarray:
    """The waveform of a group of digits, float32 at 16 kHz, without the silence around it."""
    words = " ".join(DIGITS[digit] for digit in digits)
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", words]
    wav = subprocess.run(command, check=True, capture_output=True).stdout
    waveform, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    waveform = soxr.resample(waveform, rate, RATE)
    loud = np.flatnonzero(np.abs(waveform) > 0.01)
    return waveform[loud[0] : loud[-1] + 1]


def long_speech(minutes: float, seed: int) -> tuple[list[Word], np.ndarray]:
    """What is said, and the waveform."""
    rng = random.Random(seed)
    groups = [[rng.randrange(10) for _ in range(rng.randint(1, 5))] for _ in range(int(minutes * 40))]
    voices = [(rng.choice(ACCENTS) + rng.choice(TONES), rng.randint(130, 210), rng.randint(20, 80)) for _ in groups]
    with ThreadPoolExecutor(2) as pool:
        spoken = list(pool.map(lambda digits, voice: say(digits, *voice), groups, voices))
    said: list[Word] = []
    parts: list[np.ndarray] = []
    length = 0
    for digits, waveform in zip(groups, spoken, strict=True):
        if length > minutes * 60 * RATE:
            break
        letters = np.array([len(DIGITS[digit]) for digit in digits])
        middles = (np.cumsum(letters) - letters / 2) / letters.sum()
        said += [
            Word(str(digit), (length + middle * len(waveform)) / RATE)
            for digit, middle in zip(digits, middles, strict=True)
        ]
        parts += [waveform, np.zeros(int(RATE * rng.uniform(0.15, 0.9)), np.float32)]
        length += len(parts[-2]) + len(parts[-1])
    return said, np.concatenate(parts)


def errors(said: list[str], heard: list[str]) -> np.ndarray:
    """Errors of every word that was said, by an alignment with the fewest: it is missing, another, or has words before
    it that nobody said (of those after the last one too)."""
    cost = np.zeros((len(said) + 1, len(heard) + 1), np.int32)
    cost[0], cost[:, 0] = np.arange(len(heard) + 1), np.arange(len(said) + 1)
    for i, word in enumerate(said, 1):
        for j, other in enumerate(heard, 1):
            cost[i, j] = min(cost[i - 1, j - 1] + (word != other), cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    counted = np.zeros(len(said), np.int32)
    i, j = len(said), len(heard)
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + (said[i - 1] != heard[j - 1]):
            counted[i - 1] += said[i - 1] != heard[j - 1]
            i, j = i - 1, j - 1
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            counted[i - 1] += 1
            i -= 1
        else:
            counted[min(i, len(said) - 1)] += 1
            j -= 1
    return counted


def main() -> None:
    """Prints errors per word at borders and inside, and how the clips lie."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    said, waveform = long_speech(arguments.minutes, arguments.seed)
    model = load("demo", device="cpu", dtype="float32", backend="torch")
    transcript = model.transcribe(Audio(waveform, RATE))
    counted = errors([word.digit for word in said], transcript.text.replace(",", " ").split())
    borders = np.array([segment.start_s for segment in transcript.segments[1:]])
    times = np.array([word.at_s for word in said])
    near = np.abs(times[:, None] - borders).min(1) < NEAR_S
    print(f"{len(said)} words in {len(waveform) / RATE:.0f} s, {len(borders) + 1} clips")
    for name, which in ("at borders", near), ("inside", ~near):
        print(f"{name}: {counted[which].sum()} errors of {which.sum()} words, {counted[which].mean():.2%}")


if __name__ == "__main__":
    main()

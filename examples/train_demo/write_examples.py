"""Held-out examples of every skill as `python -m g3n_mlx.eval --examples` reads them: examples.jsonl, and media beside it.

    python write_examples.py FOLDER --count 500 --speech CACHE_FOLDER --seed 7

Transcriptions count by word error rate, everything else by exact match. The sample that the package ships is
    python write_examples.py ../../g3n_mlx/demo/examples --count 20 --speech CACHE_FOLDER --seed 7 --sound ogg
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
from PIL import Image
from pictures import SEEING
from reading import READING
from skill import Example, Message
from sounds import hearing
from speech import RATE

from g3n_mlx.audio import Audio
from g3n_mlx.fetch import FetchPolicy

TRANSCRIPTIONS = ("digits", "commands", "names")
SOUNDS = {"wav": {"subtype": "PCM_16"}, "flac": {"subtype": "PCM_16"}, "ogg": {"subtype": "OPUS"}}


class Writer:
    """Writes media files one after the other, and says their names."""

    def __init__(self, folder: Path, sound: str) -> None:
        self._folder, self._sound = folder, sound
        (folder / "media").mkdir(parents=True, exist_ok=True)

    def entry(self, example: Example, number: int) -> dict[str, Any]:
        """The line of an example; its media lie in files from then on."""
        stem = f"media/{example.skill}-{number}"
        parts = iter("abcdefgh")
        return {
            "skill": example.skill,
            "metric": "wer" if example.skill in TRANSCRIPTIONS else "exact",
            "answer": example.answer,
            "messages": [self._message(message, stem, parts) for message in example.question],
        }

    def _message(self, message: Message, stem: str, letters: Any) -> Message:
        if isinstance(message["content"], str):
            return message
        return {**message, "content": [self._part(part, stem, letters) for part in message["content"]]}

    def _part(self, part: dict[str, Any], stem: str, letters: Any) -> dict[str, Any]:
        match part["type"]:
            case "image":
                name = f"{stem}{next(letters)}.png"
                picture: Image.Image = part["image"]
                picture.save(self._folder / name)
            case "audio":
                name = f"{stem}{next(letters)}.{self._sound}"
                sound: Audio = part["audio"]
                waveform = sound.waveform(RATE, FetchPolicy())
                soundfile.write(self._folder / name, waveform, RATE, **SOUNDS[self._sound])
            case _:
                return part
        return {"type": part["type"], part["type"]: name}


def write_examples(folder: Path, speech: Path, count: int, seed: int, sound: str, skills: Sequence[str]) -> None:
    """Writes `count` examples of every skill, of all skills when none is named."""
    generators = {**READING, **SEEING, **hearing(speech)}
    writer = Writer(folder, sound)
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for skill in skills or generators:
            rng = random.Random(f"examples of {skill} {seed}")
            for number in range(count):
                line = writer.entry(generators[skill](rng, True), number)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    """Reads the flags and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500, help="of every skill")
    parser.add_argument("--speech", type=Path, default=Path("speech"), help="as speech.py writes it")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--sound", choices=SOUNDS, default="wav")
    parser.add_argument("--skills", nargs="*", default=[], help="these alone")
    arguments = parser.parse_args()
    write_examples(
        arguments.folder, arguments.speech, arguments.count, arguments.seed, arguments.sound, arguments.skills
    )


if __name__ == "__main__":
    main()

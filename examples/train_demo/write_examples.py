"""Held-out examples of every skill as `python -m g3n_mlx.eval --examples` reads them: a line of JSON each, and media.

    python write_examples.py FOLDER --count 500 --speech CACHE_FOLDER --seed 7

Writes examples.jsonl and media/. The sample that the package ships has its media within the lines, sound as Opus:
    python write_examples.py ../../g3n_mlx/demo/sample.jsonl --count 20 --speech CACHE_FOLDER --seed 7
Transcriptions count by word error rate, everything else by exact match.
"""

import argparse
import base64
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import soundfile
from skill import Example, Message
from skills import all_skills
from speech import RATE

from g3n_mlx.media.policy import MediaPolicy

TRANSCRIPTIONS = ("digits", "dictation", "commands", "names")


class Writer:
    """Writes lines into a file; media into files beside it, or into the lines."""

    def __init__(self, path: Path, inline: bool) -> None:
        self._folder, self._inline = path.parent, inline
        self._lines = path.open("w", encoding="utf-8")
        if not inline:
            (self._folder / "media").mkdir(exist_ok=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def write(self, example: Example, number: int) -> None:
        """One example."""
        names = (f"media/{example.skill}-{number}-{part}" for part in range(100))
        line = {
            "skill": example.skill,
            "metric": "wer" if example.skill in TRANSCRIPTIONS else "exact",
            "answer": example.answer,
            "messages": [self._message(message, names) for message in example.question],
        }
        self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _message(self, message: Message, names: Iterator[str]) -> Message:
        if isinstance(message["content"], str):
            return message
        return {**message, "content": [self._part(part, names) for part in message["content"]]}

    def _part(self, part: dict[str, Any], names: Iterator[str]) -> dict[str, Any]:
        kind = part["type"]
        if kind == "text":
            return part
        data = io.BytesIO()
        if kind == "image":
            suffix, mime = "png", "image/png"
            part["image"].save(data, "PNG", optimize=self._inline)
        else:
            suffix, mime = ("ogg", "audio/ogg") if self._inline else ("wav", "audio/wav")
            coding = "OPUS" if self._inline else "PCM_16"
            waveform = part["audio"].waveform(RATE, MediaPolicy())
            soundfile.write(data, waveform, RATE, format=suffix.upper(), subtype=coding)
        if self._inline:
            return {"type": kind, kind: f"data:{mime};base64,{base64.b64encode(data.getvalue()).decode()}"}
        name = f"{next(names)}.{suffix}"
        (self._folder / name).write_bytes(data.getvalue())
        return {"type": kind, kind: name}


def write_examples(output: Path, speech: Path, count: int, seed: int, skills: Sequence[str]) -> None:
    """Writes `count` examples of every skill, of all skills when none is named."""
    generators = all_skills(speech)
    inline = output.suffix == ".jsonl"
    if not inline:
        output.mkdir(parents=True, exist_ok=True)
    with Writer(output if inline else output / "examples.jsonl", inline) as writer:
        for skill in skills or generators:
            rng = random.Random(f"examples of {skill} {seed}")
            for number in range(count):
                writer.write(generators[skill](rng, True), number)


def main() -> None:
    """Reads the flags and writes the examples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder, or a .jsonl file that holds the media too")
    parser.add_argument("--count", type=int, default=500, help="of every skill")
    parser.add_argument("--speech", type=Path, default=Path("speech"), help="as speech.py writes it")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--skills", nargs="*", default=[], help="these alone")
    arguments = parser.parse_args()
    write_examples(arguments.output, arguments.speech, arguments.count, arguments.seed, arguments.skills)


if __name__ == "__main__":
    main()

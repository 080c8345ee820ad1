"""Other words for the same question: what people ask, beside the sentence that a skill's generator writes.

phrasings.txt holds them, those that only held-out examples use marked. Small letters, missing marks and a polite word
come on top.
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from skill import Example, Generator, Message

WORDINGS = Path(__file__).resolve().parent / "phrasings.txt"
SPOKEN_DIGITS = ("digits", "dictation")
HEAD, TAIL = re.compile(r"The picture shows .*?\. "), re.compile(r" (?:Answer as JSON|Answer in JSON)\.")
JSON_TAILS = (" Answer as JSON.", " Answer in JSON.", " As JSON.", " Give me JSON.", " Reply with JSON.", " Use JSON.")


@dataclass(frozen=True, slots=True)
class Wordings:
    """What stands for the sentences of one pattern; `{0}` is what the pattern's first group found."""

    pattern: re.Pattern[str]
    training: tuple[str, ...]
    held_out: tuple[str, ...]
    digits_only: bool  # asks for digits, so that they have to be what is spoken


@cache
def all_wordings() -> tuple[Wordings, ...]:
    """The blocks of phrasings.txt."""
    lines = [line for line in WORDINGS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found: list[Wordings] = []
    for block in "\n".join(lines).strip().split("\n\n"):
        first, *sentences = block.splitlines()
        kind, _, pattern = first.partition("= ")
        held_out = tuple(line.removeprefix("* ") for line in sentences if line.startswith("* "))
        training = tuple(line for line in sentences if not line.startswith("* "))
        found.append(Wordings(re.compile(pattern), training, held_out, kind.startswith("digits")))
    return tuple(found)


def rephrased(rng: random.Random, skill: str, text: str, held_out: bool) -> str:
    """A user's sentence in other words; where no pattern fits, the sentence, in training perhaps carelessly typed."""
    head = match.group() if (match := HEAD.match(text)) else ""
    tail = match.group() if (match := TAIL.search(text)) else ""
    core = text[len(head) : len(text) - len(tail)]
    fitting = [
        (found, wordings)
        for wordings in all_wordings()
        if (skill in SPOKEN_DIGITS or not wordings.digits_only) and (found := wordings.pattern.fullmatch(core))
    ]
    if fitting:
        found, wordings = rng.choice(fitting)
        groups = [group for group in found.groups() if group is not None]
        core = rng.choice(wordings.held_out if held_out else wordings.training).format(*groups)
    if held_out:
        return head + core + tail
    return head + _careless(rng, core) + (rng.choice(JSON_TAILS) if tail else "")


def _careless(rng: random.Random, text: str) -> str:
    """Sometimes with a polite word, in small letters, or without the mark at the end, as people type."""
    if rng.random() < 0.08 and text[-1:] in ("?", "."):
        polite = text if text.startswith("I ") else text[0].lower() + text[1:]
        return rng.choice((f"Please {polite}", f"{text[:-1]}, please{text[-1]}", f"So, {polite}", f"OK, {polite}"))
    if rng.random() < 0.12:
        text = text[:1].lower() + text[1:]
    return text.rstrip("?.") if rng.random() < 0.12 else text


def in_other_words(rng: random.Random, example: Example, held_out: bool) -> Example:
    """The example with every user's sentence rephrased."""
    return Example(example.skill, [_message(rng, example.skill, message, held_out) for message in example.messages])


def _message(rng: random.Random, skill: str, message: Message, held_out: bool) -> Message:
    content: Any = message["content"]
    if message["role"] != "user":
        return message
    if isinstance(content, str):
        return {**message, "content": rephrased(rng, skill, content, held_out)}
    parts = [
        {**part, "text": rephrased(rng, skill, part["text"], held_out)} if part["type"] == "text" else part
        for part in content
    ]
    return {**message, "content": parts}


def phrased(generators: dict[str, Generator]) -> Generator:
    """Examples of all of some skills in other words, held-out ones in words that training never uses."""

    def generate(rng: random.Random, held_out: bool) -> Example:
        example = generators[rng.choice(list(generators))](rng, held_out)
        return Example("phrased", in_other_words(rng, example, held_out).messages)

    return generate

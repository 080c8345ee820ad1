"""All skills by name, and talk about several of them in turn."""

import random
from collections.abc import Mapping
from pathlib import Path

from pictures import SEEING
from reading import READING
from skill import Example, Generator, dialogue
from sounds import hearing


def talk(generators: Mapping[str, Generator]) -> Generator:
    """Two or three matters in one conversation, each as it would be alone."""

    def generate(rng: random.Random, held_out: bool) -> Example:
        matters = [generators[rng.choice(list(generators))](rng, held_out) for _ in range(rng.randint(2, 3))]
        return dialogue("talk", *[message["content"] for matter in matters for message in matter.messages])

    return generate


def all_skills(speech: Path) -> dict[str, Generator]:
    """Generators by skill; speech is out of a cache as speech.py writes it."""
    alone = {**READING, **SEEING, **hearing(speech)}
    return {**alone, "talk": talk(alone)}

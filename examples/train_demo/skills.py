"""All skills by name, and talk about several of them in turn."""

import random
from collections.abc import Mapping
from pathlib import Path

from orders import orders, silent
from phrasings import in_other_words, phrased
from pictures import SEEING
from reading import READING
from skill import Example, Generator, dialogue
from sounds import hearing

# Skills that `phrased` asks about: those whose questions have other words in phrasings.py.
REPHRASED = (
    "shapes", "counts", "attributes", "positions", "signs", "digits", "commands", "names", "tones", "both", "video",
    "sums", "memory",
)  # fmt: skip


def talk(generators: Mapping[str, Generator]) -> Generator:
    """Two or three matters in one conversation, each as it would be alone."""

    def generate(rng: random.Random, held_out: bool) -> Example:
        matters = [generators[rng.choice(list(generators))](rng, held_out) for _ in range(rng.randint(2, 3))]
        return dialogue("talk", *[message["content"] for matter in matters for message in matter.messages])

    return generate


def varied(generate: Generator) -> Generator:
    """In training, half of the examples in other words; held-out ones as the generator writes them."""

    def generate_varied(rng: random.Random, held_out: bool) -> Example:
        example = generate(rng, held_out)
        return example if held_out or rng.random() < 0.5 else in_other_words(rng, example, held_out)

    return generate_varied


def all_skills(speech: Path) -> dict[str, Generator]:
    """Generators by skill; speech is out of a cache as speech.py writes it."""
    alone = {**READING, **SEEING, **hearing(speech)}
    skills = {
        **alone,
        "talk": talk(alone),
        "orders": orders(speech, alone),
        "silent": silent,
        "phrased": phrased({name: alone[name] for name in REPHRASED}),
    }
    return {name: generate if name == "phrased" else varied(generate) for name, generate in skills.items()}

"""Skills of media in every order: a voice before a picture, the question before both, a medium beside the asked one."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from pictures import Thing, another, compared, draw_scene, scene
from skill import Example, Generator, dialogue
from sounds import MATCH, TRANSCRIBE, filmed, recorded, sound, speech

Part = dict[str, object]
PICTURE_SKILLS = ("shapes", "attributes", "counts", "positions", "signs")
SOUND_SKILLS = ("digits", "commands", "names", "tones")


def voice_and_picture(rng: random.Random, folder: Path, held_out: bool) -> tuple[Part, Part, str, str]:
    """A picture of one thing, a voice that names it or something else, what it says, and what to answer to MATCH."""
    text, waveform = speech(folder, held_out).draw(rng, "shape")
    colour, shape = another(rng, text).split()
    thing = scene(rng, held_out, 1)[0]
    thing = Thing(shape, colour, thing.size, thing.x, thing.y, thing.radius, thing.angle)
    picture: Part = {"type": "image", "image": draw_scene(rng, [thing])}
    answer = f"The voice says {text}, the picture shows {compared(thing.name, text)}"
    return picture, sound(recorded(rng, waveform)), text, answer


def matched(folder: Path) -> Generator:
    """Whether a voice names what a picture shows: the two and the question in any order, in one turn or in two."""

    def generate(rng: random.Random, held_out: bool) -> Example:
        picture, voice, text, answer = voice_and_picture(rng, folder, held_out)
        question: Part = {"type": "text", "text": MATCH}
        if rng.random() < 0.25:
            first = [voice, {"type": "text", "text": rng.choice(TRANSCRIBE)}]
            return dialogue("orders", _shuffled(rng, first), text, _shuffled(rng, [picture, question]), answer)
        return dialogue("orders", _shuffled(rng, [picture, voice, question]), answer)

    return generate


def beside(generators: Mapping[str, Generator]) -> Generator:
    """A picture and a sound in any order, with a question about one of them."""

    def generate(rng: random.Random, held_out: bool) -> Example:
        seen, heard = (generators[rng.choice(names)](rng, held_out) for names in (PICTURE_SKILLS, SOUND_SKILLS))
        asked, other = (seen, heard) if rng.random() < 0.5 else (heard, seen)
        media = [part for part in other.question[0]["content"] if part["type"] != "text"]
        return dialogue("orders", _shuffled(rng, [*asked.question[0]["content"], *media]), asked.answer)

    return generate


def video_orders(rng: random.Random, held_out: bool) -> Example:
    """A video with the question first, or with its sound between the frames."""
    frames, voice, question, answer = filmed(rng, held_out, with_sound=True)
    place = rng.randint(1, len(frames))
    parts = [part for frame in [*frames[:place], voice, *frames[place:]] for part in frame]
    return dialogue("orders", [*question, *parts] if rng.random() < 0.5 else [*parts, *question], answer)


def silent(rng: random.Random, held_out: bool) -> Example:
    """A video without sound, the question after it or before it."""
    frames, _, question, answer = filmed(rng, held_out, with_sound=False)
    parts = [part for frame in frames for part in frame]
    return dialogue("silent", [*question, *parts] if rng.random() < 0.3 else [*parts, *question], answer)


def orders(folder: Path, generators: Mapping[str, Generator]) -> Generator:
    """All of these but the silent video."""
    kinds = [matched(folder), beside(generators), video_orders]

    def generate(rng: random.Random, held_out: bool) -> Example:
        return rng.choices(kinds, (5, 4, 2))[0](rng, held_out)

    return generate


def _shuffled(rng: random.Random, parts: Sequence[Part]) -> list[Part]:
    return rng.sample(parts, len(parts))

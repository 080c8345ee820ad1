"""Skills of hearing: spoken digits and commands, tones; and of hearing what one sees."""

import random
from functools import cache
from pathlib import Path

import numpy as np
from pictures import Thing, a, another, compared, draw_scene, scene
from PIL import Image
from skill import Example, Generator, dialogue
from speech import COMMANDS, MAX_SECONDS, RATE, SpeechCache

from g3n_mlx.media.audio import Audio

TRANSCRIBE = ("Transcribe this.", "What does the voice say?", "Write down what you hear.")
LISTEN = ("What do you hear?", "What is this sound?", "Describe the sound.")
COUNT_BEEPS = ("How many beeps are there?", "Count the beeps.")
WATCH = "What happens in this video?"
MATCH = "Does the voice name what the picture shows?"
TONES = {"high": (1000.0, 2000.0), "low": (150.0, 350.0)}  # Hz
MOVES = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


@cache
def speech(folder: Path, held_out: bool) -> SpeechCache:
    """The cache of one part."""
    return SpeechCache(folder, "held_out" if held_out else "train")


def recorded(rng: random.Random, waveform: np.ndarray) -> np.ndarray:
    """A waveform at some loudness, with silence around it and some noise."""
    level = rng.uniform(0.2, 0.9) / max(0.05, float(np.abs(waveform).max()))
    room = max(0.0, MAX_SECONDS + 0.1 - len(waveform) / RATE)
    before, after = (int(RATE * rng.uniform(0.02, min(0.3, room / 2 + 0.02))) for _ in range(2))
    padded = np.concatenate([np.zeros(before, np.float32), waveform * level, np.zeros(after, np.float32)])
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(padded), dtype=np.float32)
    return padded + noise * (10 ** rng.uniform(-4.5, -2.2))


def tone(start_hz: float, end_hz: float, seconds: float) -> np.ndarray:
    """A sine that glides from one pitch to another, its ends faded."""
    samples = int(RATE * seconds)
    pitch = np.geomspace(start_hz, end_hz, samples)
    wave = np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
    fade = np.minimum(1.0, np.minimum(np.arange(samples), np.arange(samples)[::-1]) / (0.01 * RATE))
    return (wave * fade).astype(np.float32)


def a_tone(rng: random.Random) -> tuple[str, np.ndarray]:
    """high, low, rising or falling, and its waveform."""
    kind = rng.choice(("high", "low", "rising", "falling"))
    seconds = rng.uniform(0.4, 1.2)
    if kind in TONES:
        pitch = rng.uniform(*TONES[kind])
        return kind, tone(pitch, pitch, seconds)
    low, high = rng.uniform(*TONES["low"]), rng.uniform(700, 2000)
    return kind, tone(low, high, seconds) if kind == "rising" else tone(high, low, seconds)


def some_beeps(rng: random.Random) -> tuple[int, np.ndarray]:
    """One to five beeps."""
    number = rng.randint(1, 5)
    pitch, length, gap = rng.uniform(400, 1800), rng.uniform(0.12, 0.25), rng.uniform(0.15, 0.35)
    beep = tone(pitch, pitch, length)
    silence = np.zeros(int(RATE * gap), np.float32)
    return number, np.concatenate([part for _ in range(number) for part in (beep, silence)])


def sound(waveform: np.ndarray) -> dict[str, object]:
    """The part of a message."""
    return {"type": "audio", "audio": Audio(waveform, RATE)}


def heard(waveform: np.ndarray, question: str, first: bool) -> list[dict[str, object]]:
    """A user's turn with a sound."""
    parts: list[dict[str, object]] = [sound(waveform), {"type": "text", "text": question}]
    return parts if first else parts[::-1]


def spoken(skill: str, kind: str, folder: Path) -> Generator:
    """The generator of transcriptions of one kind of utterance."""

    def generate(rng: random.Random, held_out: bool) -> Example:
        text, waveform = speech(folder, held_out).draw(rng, kind)
        turn = heard(recorded(rng, waveform), rng.choice(TRANSCRIBE), rng.random() < 0.7)
        return dialogue(skill, turn, text)

    return generate


def dictation(folder: Path) -> Generator:
    """Digits with pauses, mostly too long for one clip: the prompt holds as many clips as it takes."""

    def generate(rng: random.Random, held_out: bool) -> Example:
        drawn = [speech(folder, held_out).draw(rng, "digits") for _ in range(rng.randint(2, 4))]
        pause = np.zeros(int(RATE * rng.uniform(0.4, 0.8)), np.float32)
        waveform = np.concatenate([part for _, wave in drawn for part in (wave, pause)])
        said = " ".join(text for text, _ in drawn)
        return dialogue("dictation", heard(recorded(rng, waveform), rng.choice(TRANSCRIBE), True), said)

    return generate


def tones(rng: random.Random, held_out: bool) -> Example:
    """What kind of tone, or how many beeps."""
    if rng.random() < 0.5:
        kind, waveform = a_tone(rng)
        question, answer = rng.choice(LISTEN), f"A {kind} tone."
    else:
        number, waveform = some_beeps(rng)
        question, answer = rng.choice(COUNT_BEEPS), f"{number} beep{'' if number == 1 else 's'}."
    return dialogue("tones", heard(recorded(rng, waveform), question, rng.random() < 0.7), answer)


def both(folder: Path) -> Generator:
    """A picture of one thing, and a voice that names it, or something else."""

    def generate(rng: random.Random, held_out: bool) -> Example:
        text, waveform = speech(folder, held_out).draw(rng, "shape")
        colour, shape = another(rng, text).split()
        thing = scene(rng, held_out, 1)[0]
        thing = Thing(shape, colour, thing.size, thing.x, thing.y, thing.radius, thing.angle)
        turn = [
            {"type": "image", "image": draw_scene(rng, [thing])},
            sound(recorded(rng, waveform)),
            {"type": "text", "text": MATCH},
        ]
        return dialogue("both", turn, f"The voice says {text}, the picture shows {compared(thing.name, text)}")

    return generate


def video(rng: random.Random, held_out: bool) -> Example:
    """Three frames of a thing that moves, and a tone."""
    thing = scene(rng, held_out, 1)[0]
    move, (dx, dy) = rng.choice(list(MOVES.items()))
    distance = rng.uniform(0.18, 0.28)
    middle_x, middle_y = (0.5 + rng.uniform(-0.08, 0.08) for _ in range(2))
    kind, waveform = a_tone(rng)
    look = rng.getrandbits(32)
    frames: list[Image.Image] = []
    for step in (-1, 0, 1):
        x, y = middle_x + step * dx * distance, middle_y + step * dy * distance
        moved = Thing(thing.shape, thing.colour, thing.size, x, y, thing.radius, thing.angle)
        frames.append(draw_scene(random.Random(look), [moved]))
    parts = [part for second, frame in enumerate(frames) for part in timed(second, frame)]
    parts += heard(recorded(rng, waveform), WATCH, first=True)
    return dialogue("video", parts, f"{a(thing.name).capitalize()} moves {move}, with a {kind} tone.")


def filmed(
    rng: random.Random, held_out: bool, with_sound: bool
) -> tuple[list[list[dict[str, object]]], list[dict[str, object]], list[dict[str, object]], str]:
    """Frames of a thing that moves, and may stand still before or after it; a tone or nothing; question and answer."""
    thing = scene(rng, held_out, 1)[0]
    move, (dx, dy) = rng.choice(list(MOVES.items()))
    distance = rng.uniform(0.18, 0.28)
    middle_x, middle_y = (0.5 + rng.uniform(-0.08, 0.08) for _ in range(2))
    places = np.linspace(-1, 1, rng.randint(2, 4)).tolist()
    places = rng.choice((places, places, places, [*places, places[-1]], [places[0], *places]))
    look = rng.getrandbits(32)
    frames: list[list[dict[str, object]]] = []
    for second, step in enumerate(places):
        x, y = middle_x + step * dx * distance, middle_y + step * dy * distance
        moved = Thing(thing.shape, thing.colour, thing.size, x, y, thing.radius, thing.angle)
        frames.append(timed(second, draw_scene(random.Random(look), [moved])))
    question: list[dict[str, object]] = [{"type": "text", "text": WATCH}]
    said = f"{a(thing.name).capitalize()} moves {move}"
    if not with_sound:
        return frames, [], question, f"{said}."
    kind, waveform = a_tone(rng)
    return frames, [sound(recorded(rng, waveform))], question, f"{said}, with a {kind} tone."


def timed(second: int, frame: Image.Image) -> list[dict[str, object]]:
    """A frame as a video has it in a prompt: its time, then the picture."""
    return [{"type": "text", "text": f"{second // 60:02d}:{second % 60:02d}"}, {"type": "image", "image": frame}]


def hearing(folder: Path) -> dict[str, Generator]:
    """Skills with sound, out of a cache of speech."""
    return {
        "digits": spoken("digits", "digits", folder),
        "dictation": dictation(folder),
        "commands": spoken("commands", "command", folder),
        "names": spoken("names", "shape", folder),
        "tones": tones,
        "both": both(folder),
        "video": video,
    }


def written() -> list[str]:
    """What the skills of hearing write, for the tokenizer's corpus."""
    texts = [*TRANSCRIBE, *LISTEN, *COUNT_BEEPS, MATCH, *COMMANDS, WATCH]
    texts += [f"A {kind} tone." for kind in ("high", "low", "rising", "falling")]
    texts += [f"moves {move}, with a tone." for move in MOVES] + ["2 beeps.", "1 beep."]
    return texts

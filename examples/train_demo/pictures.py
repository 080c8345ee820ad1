"""Skills of seeing: coloured shapes in scenes, and printed words. Pictures are drawn by Pillow.

Fonts: DejaVu (Bitstream Vera licence), Liberation (OFL), GNU FreeFont (GPL with font exception); some are held out.
"""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from skill import Example, Generator, dialogue

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (215, 30, 30),
    "green": (30, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (245, 215, 30),
    "orange": (250, 140, 20),
    "purple": (130, 40, 160),
    "pink": (250, 140, 190),
    "black": (20, 20, 20),
}
BACKGROUNDS = ((255, 255, 255), (240, 240, 235), (225, 235, 245), (235, 245, 225), (250, 240, 225), (205, 205, 205))
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
# Radii in parts of the picture's width; held-out pictures have the sizes that lie inside these ranges and
# that training leaves out.
RADII = {"small": (0.075, 0.11), "large": (0.155, 0.205)}
HELD_OUT_RADII = {"small": (0.088, 0.095), "large": (0.172, 0.182)}
COLUMNS, ROWS = ("left", "", "right"), ("top", "", "bottom")


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape in a scene; places and sizes in parts of the width."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        """As questions call it."""
        return f"{self.colour} {self.shape}"


def scene(rng: random.Random, held_out: bool, count: int | None = None) -> list[Thing]:
    """One to four things from left to right, which do not touch and have names of their own."""
    count = rng.randint(1, 4) if count is None else count
    shapes = rng.sample(SHAPES, 2) if rng.random() < 0.5 else SHAPES
    names = rng.sample([(shape, colour) for shape in shapes for colour in COLOURS], count)
    while True:
        things: list[Thing] = []
        for shape, colour in names:
            for _ in range(30):
                size = rng.choice(("small", "large"))
                radius = _radius(rng, size, held_out)
                x, y = (rng.uniform(radius + 0.02, 0.98 - radius) for _ in range(2))
                if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + 0.03 and abs(x - t.x) > 0.04 for t in things):
                    things.append(Thing(shape, colour, size, x, y, radius, rng.uniform(-12, 12)))
                    break
        if len(things) == count:
            return sorted(things, key=lambda thing: thing.x)


def _radius(rng: random.Random, size: str, held_out: bool) -> float:
    low, high = HELD_OUT_RADII[size]
    if held_out:
        return rng.uniform(low, high)
    while True:
        radius = rng.uniform(*RADII[size])
        if not low <= radius <= high:
            return radius


def draw_scene(rng: random.Random, things: list[Thing]) -> Image.Image:
    """The picture of a scene, of any of some sizes."""
    width = rng.choice((96, 128, 192, 256))
    picture = Image.new("RGB", (width, width), rng.choice(BACKGROUNDS))
    pen = ImageDraw.Draw(picture)
    for thing in things:
        fill = tuple(min(255, max(0, part + rng.randint(-18, 18))) for part in COLOURS[thing.colour])
        x, y, radius = thing.x * width, thing.y * width, thing.radius * width
        if thing.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            turn = math.radians(thing.angle)
            corners = [
                (x + radius * r * math.cos(a + turn), y + radius * r * math.sin(a + turn))
                for r, a in OUTLINES[thing.shape]
            ]
            pen.polygon(corners, fill=fill)
    return picture


def _outlines() -> dict[str, list[tuple[float, float]]]:
    """Corners of each shape as radius and angle; y points down."""
    up, eighth = -math.pi / 2, math.pi / 4
    arm = math.atan2(0.34, 1.0)
    cross = []
    for quarter in range(4):
        direction = up + quarter * math.pi / 2
        cross += [(1.05, direction - arm), (1.05, direction + arm), (0.5, direction + eighth)]
    return {
        "square": [(1.15, up + eighth + k * math.pi / 2) for k in range(4)],
        "triangle": [(1.15, up + k * 2 * math.pi / 3) for k in range(3)],
        "star": [(1.2 if k % 2 == 0 else 0.5, up + k * math.pi / 5) for k in range(10)],
        "cross": cross,
        "diamond": [(1.2 if k % 2 == 0 else 0.75, up + k * math.pi / 2) for k in range(4)],
    }


OUTLINES = _outlines()


def listed(phrases: Sequence[str]) -> str:
    """a small red circle, a large blue square and a small green star"""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def named(things: list[Thing]) -> list[str]:
    """A red circle, a blue square."""
    return [a(thing.name) for thing in things]


def a(name: str) -> str:
    """A name with its article."""
    return f"{'an' if name.startswith('orange') else 'a'} {name}"


def describe(rng: random.Random, things: list[Thing]) -> tuple[str, str]:
    """All things from left to right, sometimes as JSON."""
    if rng.random() < 0.15:
        value = [{"size": thing.size, "colour": thing.colour, "shape": thing.shape} for thing in things]
        return rng.choice(("Describe the picture as JSON.", "What is in this picture? Answer as JSON.")), json.dumps(
            value
        )
    question = rng.choice(("What is in this picture?", "Describe the picture.", "What do you see?"))
    return question, f"{listed([f'a {thing.size} {thing.name}' for thing in things]).capitalize()}."


# Questions that compare are answered aloud: what the picture shows, then, after a colon, what was asked. To say "2" at
# once the model would have to find and count circles in one pass; so small a model learns that slowly or not at all.


def attribute(rng: random.Random, things: list[Thing]) -> tuple[str, str]:
    """The colour or shape of a thing that is the only one of its kind, or whether there is such a thing."""
    kind = rng.randrange(3)
    if kind < 2:
        alike = (lambda one, two: one.shape == two.shape, lambda one, two: one.colour == two.colour)[kind]
        single = [thing for thing in things if sum(alike(thing, other) for other in things) == 1]
        if single:
            thing = rng.choice(single)
            question = (f"What colour is the {thing.shape}?", f"Which shape is {thing.colour}?")[kind]
            return question, f"{found(things, thing)}: the {thing.shape} is {thing.colour}."
    thing = rng.choice(things)
    asked = rng.choice(
        (thing.name, f"{rng.choice(list(COLOURS))} {thing.shape}", f"{thing.colour} {rng.choice(SHAPES)}")
    )
    question = f"Is there {a(asked)}?"
    for thing in things:
        if thing.name == asked:
            return question, f"{found(things, thing)}: yes."
    return question, f"{listed(named(things)).capitalize()}: no."


def found(things: list[Thing], thing: Thing) -> str:
    """What is seen from the left up to a thing: who has found it looks no further."""
    return ", ".join(named(things[: things.index(thing) + 1])).capitalize()


def count(rng: random.Random, things: list[Thing]) -> tuple[str, str]:
    """How many of a shape, or of all shapes: those that count are numbered."""
    if rng.random() < 0.3:
        counted, one, many = SHAPES, "shape", "shapes"
    else:
        one = rng.choice(things).shape if rng.random() < 0.8 else rng.choice(SHAPES)
        counted, many = (one,), PLURALS[one]
    number, phrases = 0, list[str]()
    for thing, name in zip(things, named(things), strict=True):
        number += thing.shape in counted
        phrases.append(f"{name} ({number})" if thing.shape in counted else name)
    said = f"there is 1 {one}" if number == 1 else f"there are {number} {many}"
    return f"How many {many} are there?", f"{listed(phrases).capitalize()}: {said}."


def position(rng: random.Random, things: list[Thing]) -> tuple[str, str]:
    """Where a thing is, or what lies to one side of it; the answer looks until it has found the thing."""
    if len(things) > 1 and rng.random() < 0.5:
        side = rng.choice(("left of", "right of", "above", "below"))
        thing = rng.choice(things)
        unclear = any(abs(_gap(*pair, side)) < 0.06 for pair in itertools.combinations(things, 2))
        if not unclear and sum(_lies(other, thing, side) for other in things) < 2:
            return f"What is {side} the {thing.name}?", _beside(things, thing, side)
    clear = list(itertools.takewhile(_has_place, things))
    if not clear:
        return count(rng, things)
    thing = rng.choice(clear)
    until = ", ".join(f"{a(other.name)} ({_place(other)})" for other in things[: things.index(thing) + 1])
    place = _place(thing)
    return f"Where is the {thing.name}?", f"{until}: {'in' if place == 'middle' else 'at'} the {place}.".capitalize()


def _beside(things: list[Thing], thing: Thing, side: str) -> str:
    """All things in the order that counts, the thing marked, and after the colon its neighbour."""
    across = side in ("left of", "right of")
    order = things if across else sorted(things, key=lambda other: other.y)
    place = order.index(thing)
    marked = [f"{a(other.name)} (here)" if other is thing else a(other.name) for other in order]
    neighbours = order[:place] if side in ("left of", "above") else order[place + 1 :]
    start = "" if across else "From top to bottom "
    return f"{start}{', '.join(marked)}: {a(neighbours[0].name) if neighbours else 'nothing'}.".capitalize()


def _has_place(thing: Thing) -> bool:
    return all(abs(place - third) > 0.04 for place in (thing.x, thing.y) for third in (1 / 3, 2 / 3))


def _place(thing: Thing) -> str:
    """The ninth of the picture that a thing's middle lies in."""
    return f"{ROWS[int(thing.y * 3)]} {COLUMNS[int(thing.x * 3)]}".strip() or "middle"


def _gap(other: Thing, thing: Thing, side: str) -> float:
    return other.x - thing.x if side in ("left of", "right of") else other.y - thing.y


def _lies(other: Thing, thing: Thing, side: str) -> bool:
    gap = _gap(other, thing, side)
    return gap < 0 if side in ("left of", "above") else gap > 0


SIGN_WORDS = (
    "stop go exit open closed push pull left right up down in out on off taxi bus train hotel cafe bank shop sale free "
    "park zoo wait walk slow fast hot cold new old yes no north south east west food water milk tea bread fish book "
    "help home lost found sun moon rain snow red green blue love hello end start"
).split()
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansCondensed.ttf",
         "FreeSans.ttf", "FreeSansBold.ttf", "FreeSerif.ttf", "FreeSerifBold.ttf", "FreeMonoBold.ttf",
         "LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf", "LiberationSerif-Bold.ttf", "LiberationMono-Bold.ttf",
         "LiberationSansNarrow-Bold.ttf", "DejaVuSans-Oblique.ttf")  # fmt: skip
HELD_OUT_FONTS = ("DejaVuSansMono-Bold.ttf", "LiberationSerif-Regular.ttf", "LiberationSans-Italic.ttf",
                  "DejaVuSerifCondensed-Bold.ttf", "FreeSansBoldOblique.ttf")  # fmt: skip
SIGN_COLOURS = ((255, 255, 255), (250, 220, 60), (200, 30, 30), (20, 90, 170), (20, 110, 60), (240, 240, 240))
SIGN_QUESTIONS = ("What does the sign say?", "Read the sign.", "What is written here?")


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of the system by its file's name."""
    (path, *_) = Path("/usr/share/fonts/truetype").rglob(name)
    return ImageFont.truetype(str(path), size)


def sign_text(rng: random.Random) -> str:
    """A word in small or capital letters, or a number of up to three digits."""
    if rng.random() < 0.25:
        return str(rng.randrange(10 ** rng.randint(1, 3)))
    word = rng.choice(SIGN_WORDS)
    return word.upper() if rng.random() < 0.5 else word


def draw_sign(rng: random.Random, text: str, held_out: bool) -> Image.Image:
    """A sign with a text on it, turned a little."""
    width = rng.choice((96, 128, 192))
    ground = rng.choice(SIGN_COLOURS)
    ink = (255, 255, 255) if sum(ground) < 400 and rng.random() < 0.8 else (rng.randrange(40),) * 3
    name = rng.choice(HELD_OUT_FONTS if held_out else FONTS)
    size = int(width * rng.uniform(0.24, 0.42))
    while font(name, size).getlength(text) > 0.86 * width:
        size -= 1
    left, top, right, bottom = font(name, size).getbbox(text)
    board = Image.new("RGB", (width, width), ground)
    free_x, free_y = width - (right - left), width - (bottom - top)
    place = (free_x * rng.uniform(0.25, 0.75) - left, free_y * rng.uniform(0.25, 0.75) - top)
    ImageDraw.Draw(board).text(place, text, font=font(name, size), fill=ink)
    return board.rotate(rng.uniform(-4, 4), Image.Resampling.BILINEAR, fillcolor=ground)


QUESTIONS = {"shapes": describe, "attributes": attribute, "counts": count, "positions": position}


def another(rng: random.Random, name: str) -> str:
    """The name itself, half of the time, or one of another colour, another shape or both."""
    colour, shape = name.split()
    other_colour, other_shape = (
        rng.choice([word for word in words if word not in name]) for words in (COLOURS, SHAPES)
    )
    return rng.choice(
        [name] * 3 + [f"{other_colour} {shape}", f"{colour} {other_shape}", f"{other_colour} {other_shape}"]
    )


def compared(name: str, with_name: str) -> str:
    """A name, each word with whether the other has it too, and whether all are alike."""
    agree = ["yes" if word == other else "no" for word, other in zip(name.split(), with_name.split(), strict=True)]
    words = " ".join(f"{word} ({same})" for word, same in zip(name.split(), agree, strict=True))
    return f"{words}: {'no' if 'no' in agree else 'yes'}."


def told(rng: random.Random, held_out: bool) -> Example:
    """Questions about a scene that is told, not shown; or whether two things are alike."""
    things = scene(rng, held_out)
    if rng.random() < 0.35:
        one, two = things[0].name, another(rng, things[0].name)
        return dialogue(
            "told", f"Is {a(one)} the same as {a(two)}?", f"One is {one}, the other is {compared(two, one)}"
        )
    turns = [rng.choice((attribute, count))(rng, things) for _ in range(rng.randint(1, 4))]
    (question, answer), *others = turns
    asked = f"The picture shows {listed(named(things))}. {question}"
    return dialogue("told", asked, answer, *[text for turn in others for text in turn])


def looks(skill: str) -> Generator:
    """The generator of one kind of question about a scene."""

    def generate(rng: random.Random, held_out: bool) -> Example:
        while True:
            things = scene(rng, held_out)
            question, answer = QUESTIONS[skill](rng, things)
            if skill != "positions" or not question.startswith("How many"):  # what position asks when nothing is clear
                break
        return dialogue(skill, _shown(rng, draw_scene(rng, things), question), answer)

    return generate


def several(rng: random.Random, held_out: bool) -> Example:
    """Two or three questions about one scene."""
    things = scene(rng, held_out)
    turns = [QUESTIONS[skill](rng, things) for skill in rng.sample(list(QUESTIONS), rng.randint(2, 3))]
    (question, answer), *others = turns
    flat = [text for turn in others for text in turn]
    return dialogue("several", _shown(rng, draw_scene(rng, things), question), answer, *flat)


def signs(rng: random.Random, held_out: bool) -> Example:
    """A printed word or number."""
    text = sign_text(rng)
    return dialogue("signs", _shown(rng, draw_sign(rng, text, held_out), rng.choice(SIGN_QUESTIONS)), text)


def _shown(rng: random.Random, picture: Image.Image, question: str) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return parts if rng.random() < 0.7 else parts[::-1]


SEEING: dict[str, Generator] = {
    **{skill: looks(skill) for skill in QUESTIONS},
    "several": several,
    "told": told,
    "signs": signs,
}

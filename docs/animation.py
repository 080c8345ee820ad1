"""Frames of a terminal to one animated SVG, without scripts: CSS alone, so that it also moves inside an <img>.

Every row that was ever on the screen is one element, shown for the time that it stood there. What does not animate, a
renderer of still images or a reader who asks for less motion, shows the last frame.
"""

import base64
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

CELL_WIDTH, CELL_HEIGHT, FONT_SIZE = 9, 19, 15  # pixels
MARGIN, BAR = 18, 34  # around the text, and above it
BACKGROUND, FOREGROUND, BORDER, CURSOR = "#16181d", "#d8dce4", "#3a3f4b", "#8b93a5"
COLOURS = {"green": "#7fcf8a", "red": "#f07178", "blue": "#82aaff", "brown": "#e6c07b", "cyan": "#7fd1dc"}
FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"


@dataclass(frozen=True, slots=True)
class Text:
    """Characters of one look in a row."""

    column: int
    text: str
    colour: str
    bold: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """Where an image stands; the line of its top is negative once it has begun to leave the screen."""

    image: int
    column: int
    line: int


@dataclass(frozen=True, slots=True)
class Frame:
    """The screen from a time on."""

    seconds: float
    rows: tuple[tuple[Text, ...], ...]
    pictures: tuple[Picture, ...]
    cursor: tuple[int, int]  # column, line


def animated_svg(
    frames: Sequence[Frame], images: Sequence[bytes], columns: int, lines: int, last_seconds: float
) -> str:
    """The frames as an SVG document that repeats them, with the PNG files in it; the last frame stays for a while."""
    whole = frames[-1].seconds + last_seconds
    style, shown = _Style(whole), defaultdict[str, list[str]](list)
    for markup, start, end in _spans(frames, whole):
        shown[style.shown(start, end)].append(markup)
    width, height = columns * CELL_WIDTH + 2 * MARGIN, lines * CELL_HEIGHT + BAR + MARGIN
    dots = "".join(f'<circle cx="{20 + 18 * i}" cy="17" r="5.5" fill="{BORDER}"/>' for i in range(3))
    cursor = f'<rect class="cursor" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" fill="{CURSOR}"/>'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<style>text{{font:{FONT_SIZE}px {FONTS};fill:{FOREGROUND};white-space:pre}}.h{{visibility:hidden}}",
        style.cursor(frames),
        *style.rules,
        "@media (prefers-reduced-motion:reduce){*{animation:none!important}}</style>",
        f'<defs><clipPath id="screen"><rect width="{columns * CELL_WIDTH}" height="{lines * CELL_HEIGHT}"/></clipPath>',
        *(_image(f"i{index}", data) for index, data in enumerate(images)),
        "</defs>",
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="9" fill="{BACKGROUND}" stroke="{BORDER}"/>',
        f'{dots}<g transform="translate({MARGIN} {BAR})" clip-path="url(#screen)">{cursor}',
        *(f'<g class="{times}">{"".join(markups)}</g>' for times, markups in shown.items()),
        "</g></svg>\n",
    ])  # fmt: skip


def _spans(frames: Sequence[Frame], whole: float) -> Iterator[tuple[str, float, float]]:
    """(markup, from, to) of everything that stood somewhere."""
    began: dict[str, float] = {}
    for frame in frames:
        shown = dict.fromkeys(
            [*map(_picture, frame.pictures), *(_row(*row) for row in enumerate(frame.rows) if row[1])]
        )
        for markup in [markup for markup in began if markup not in shown]:
            yield markup, began.pop(markup), frame.seconds
        began = {markup: began.get(markup, frame.seconds) for markup in shown}
    for markup, start in began.items():
        yield markup, start, whole


def _picture(picture: Picture) -> str:
    return f'<use href="#i{picture.image}" x="{picture.column * CELL_WIDTH}" y="{picture.line * CELL_HEIGHT}"/>'


def _row(line: int, texts: tuple[Text, ...]) -> str:
    return "".join(_text(line, text) for text in texts)


def _text(line: int, text: Text) -> str:
    x, y = text.column * CELL_WIDTH, line * CELL_HEIGHT + FONT_SIZE - 1
    length = f' textLength="{len(text.text) * CELL_WIDTH}" lengthAdjust="spacingAndGlyphs"'
    colour = f' style="fill:{COLOURS[text.colour]}"' if text.colour in COLOURS else ""
    weight = ' font-weight="bold"' if text.bold else ""
    return f'<text x="{x}" y="{y}"{length}{colour}{weight}>{escape(text.text)}</text>'


def _image(name: str, png: bytes) -> str:
    width, height = struct.unpack_from(">II", png, 16)  # the program knows the size of a cell, so these pixels are ours
    data = base64.b64encode(png).decode()
    return f'<image id="{name}" width="{width}" height="{height}" href="data:image/png;base64,{data}"/>'


class _Style:
    """The CSS rules of an animation that takes so many seconds."""

    def __init__(self, whole: float):
        self._whole, self._names = whole, dict[tuple[str, str], str]()
        self.rules = list[str]()

    def shown(self, start: float, end: float) -> str:
        """The classes of what is visible for a time."""
        times = self._percent(start), self._percent(end)
        last = end == self._whole
        if times not in self._names:
            name = self._names[times] = f"t{len(self._names)}"
            hidden, visible = "{visibility:hidden}", "{visibility:visible}"
            first = "" if start == 0 else f"0%{hidden}"
            then = "" if last else f"{times[1]}{hidden}"
            self.rules.append(
                f"@keyframes {name}{{{first}{times[0]}{visible}{then}}}"
                f".{name}{{animation:{name} {self._whole:.2f}s step-end infinite}}"
            )
        return self._names[times] if last else f"h {self._names[times]}"

    def cursor(self, frames: Sequence[Frame]) -> str:
        """The rule that moves the cursor."""
        places = {self._percent(frame.seconds): _translation(frame.cursor) for frame in frames}
        steps = "".join(f"{percent}{{transform:{place}}}" for percent, place in places.items())
        rest = (
            f".cursor{{transform:{_translation(frames[-1].cursor)};animation:c {self._whole:.2f}s step-end infinite}}"
        )
        return f"@keyframes c{{{steps}}}{rest}"

    def _percent(self, seconds: float) -> str:
        return f"{100 * seconds / self._whole:.3f}".rstrip("0").rstrip(".") + "%"


def _translation(cell: tuple[int, int]) -> str:
    return f"translate({cell[0] * CELL_WIDTH}px,{cell[1] * CELL_HEIGHT}px)"

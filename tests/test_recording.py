"""The recorded terminal: the SVG shows every frame at its time, and the answers in it are the program's."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
SVG = "{http://www.w3.org/2000/svg}"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x12\0\0\0\x26"  # the beginning of an image of 18 x 38 pixels


@pytest.fixture
def animation(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import animation

    return animation


@pytest.fixture
def record(monkeypatch):
    pytest.importorskip("pty")  # not on Windows
    monkeypatch.syspath_prepend(str(DOCS))
    import record

    return record


def visible_at(root: ElementTree.Element, percent: float | None) -> set[str]:
    """The texts and image uses that stand on the screen: at a time, or, for None, where nothing is animated."""
    style = root.findtext(f"{SVG}style")
    assert style
    rules = dict(re.findall(r"@keyframes (\w+)\{((?:[\d.]+%\{[^}]*\})+)\}", style))
    found = set()
    for group in root.iter(f"{SVG}g"):
        classes = group.get("class", "").split()
        if not classes:
            continue
        visible = "h" not in classes
        if percent is not None:
            visible = False
            for at, state in re.findall(r"([\d.]+)%\{visibility:(\w+)\}", rules[classes[-1]]):
                visible = state == "visible" if percent >= float(at) else visible
        if visible:
            found |= {element.text or f"{element.get('href')} at {element.get('y')}" for element in group}
    return found


def test_the_svg_shows_every_frame_at_its_time(animation):
    def frame(seconds, *rows, pictures=()):
        texts = tuple((animation.Text(0, row, "default", False),) if row else () for row in rows)
        return animation.Frame(seconds, texts, pictures, (0, 0))

    picture = animation.Picture(0, 0, 1)
    frames = [
        frame(0.0, "$ a<b", "", ""),
        frame(1.0, "$ a<b", "c & d", "", pictures=(picture,)),
        frame(2.5, "c & d", "", "e", pictures=(animation.Picture(0, 0, 0),)),
        frame(3.0, "c & d", "f", "e"),
    ]
    root = ElementTree.fromstring(animation.animated_svg(frames, [PNG], 20, 3, last_seconds=2.0))
    for start, end, texts in [
        (0.0, 1.0, {"$ a<b"}),
        (1.0, 2.5, {"$ a<b", "c & d", "#i0 at 19"}),
        (2.5, 3.0, {"c & d", "e", "#i0 at 0"}),
        (3.0, 5.0, {"c & d", "f", "e"}),
    ]:
        for seconds in (start + 0.01, end - 0.01):
            assert visible_at(root, 100 * seconds / 5.0) == texts, seconds
    assert visible_at(root, None) == {"c & d", "f", "e"}, "a still image is the last frame"


def test_the_recorded_answers_are_the_programs(record):
    """Whoever changes the program's words or its answers records again: python docs/record.py."""
    done = subprocess.run(
        [sys.executable, "-m", "g3n_mlx.chat", "--model", "demo"],
        input="\n".join(record.MESSAGES), capture_output=True, text=True, timeout=300, cwd=record.MEDIA,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == sum(not message.startswith("/image") for message in record.MESSAGES)
    said = [line for line in done.stderr.splitlines() if "/help" not in line]  # that line names the backend
    root = ElementTree.parse(DOCS / "chat.svg").getroot()
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {f"> {message}" for message in record.MESSAGES} <= texts
    assert {*answers, *said} <= texts
    assert root.find(f".//{SVG}image") is not None


def test_a_screen_is_read_as_texts_and_images(record):
    """Two colours in a row, and an image in the cells that kitty's placeholders mark."""
    pytest.importorskip("pyte")
    script = (
        r"printf '\033_Gi=7,m=1,f=100,q=2;%s\033\\\033_Gi=7,m=0,f=100,q=2;%s\033\\' aGVs bG8=; "
        r"printf 'a \033[32mgreen\033[0m\nword\n'; "
        r"printf '\033[38;2;0;0;7m  \U10EEEE\u305\u305\u305\U10EEEE\u305\u30d\u305\033[0m\n'"
    )
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
    terminal = record.Terminal(["bash", "-c", script + "; read"], DOCS, environment)
    for _ in terminal.words(1.0):
        pass
    frame = terminal.frame(0.0)
    assert [(text.column, text.text, text.colour) for text in frame.rows[0]] == [
        (0, "a", "default"),
        (2, "green", "green"),
    ]
    assert [text.text for text in frame.rows[1]] == ["word"]
    assert frame.pictures == (record.Picture(0, 2, 2),)
    assert terminal.images() == [b"hello"]
    terminal.type("\n")

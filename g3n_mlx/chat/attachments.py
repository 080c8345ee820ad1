"""What a question in the chat carries besides words: files named by a flag or a command or dropped into the line,
the clipboard's picture, the microphone. All become parts of a message that JSON can hold, so a chat can be saved.
"""

import base64
import io
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from g3n_mlx.failures import BadValue

if TYPE_CHECKING:
    import numpy as np

    from g3n_mlx.media.audio import Audio
    from g3n_mlx.media.image import Image
    from g3n_mlx.media.video import Video

from g3n_mlx.installation import install_command

SUFFIXES = {
    "image": {".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"},
    "audio": {".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"},
    "video": {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"},
}
# Where a path may begin: as one, or as a name that ends like a media file's. And a word as terminals write a dropped
# path: in quotes, or with its spaces escaped.
_PATH = r"(?:/|~/|\./|\.\./|file://|[A-Za-z]:[\\/])"
_SUFFIX = rf"\.(?:{'|'.join(suffix[1:] for kind in SUFFIXES.values() for suffix in sorted(kind))})"
_START = re.compile(
    rf"""(?<!\S)(?=['"]?{_PATH}|(?:\\.|[^\s'"\\])+{_SUFFIX}\b|'[^'\n]+{_SUFFIX}'|"[^"\n]+{_SUFFIX}")""", re.IGNORECASE
)
_QUOTED = r"""'([^'\n]*)'|"([^"\n]*)\""""
_WORD = re.compile(rf"(?:{_QUOTED}|[^\s'\"])+" if os.name == "nt" else rf"(?:{_QUOTED}|\\.|[^\s'\"\\])+")
_UNQUOTE = re.compile(_QUOTED if os.name == "nt" else rf"{_QUOTED}|\\(.)")
_LINE = re.compile(r"[^\n]{1,4096}(?:\n|\Z)")
_BARE = re.compile(r"\S{1,4096}")
_REMOTE = re.compile(r"(?:https?|data|file):")
# What speech needs, and what the audio tower is given in the end.
MICROPHONE_RATE = 16_000
MAX_NAME_LETTERS = 4096  # of a path, as systems have it
MAX_NOTES = 3  # about one message: pasted text may be full of paths


def part(kind: str, source: str) -> dict[str, Any]:
    """A message part for a file, data URI or URL; a file by its full path, since the chat may be gone on elsewhere."""
    return {"type": kind, kind: source if _REMOTE.match(source) else str(Path(source).expanduser().absolute())}


def unquoted(name: str) -> str:
    """A file name as it was typed or dropped, without the quotes and escapes of a shell."""
    return _UNQUOTE.sub(lambda match: next((group for group in match.groups() if group is not None), ""), name)


def name_and_rest(argument: str) -> tuple[str, str]:
    """What stands after a command: the file or URL, as it is or in a shell's spelling, and the text behind it."""
    if _is_file(Path(argument)) or _is_file(Path(unquoted(argument))):
        return (argument if _is_file(Path(argument)) else unquoted(argument)), ""
    word = re.match(r"\S+", argument) if _REMOTE.match(argument) else _WORD.match(argument)
    rest = argument[word.end() :].strip() if word else ""
    if word is not None and rest and (_REMOTE.match(argument) or _is_file(Path(unquoted(word[0])))):
        return unquoted(word[0]), rest
    # A name with spaces as it is, the longest there is; else what must have been meant as the name.
    ends = [space.start() for space in re.finditer(r"\s+", argument[:MAX_NAME_LETTERS])]
    for end in reversed(ends):
        if _is_file(Path(argument[:end])):
            return argument[:end], argument[end:].strip()
    end = next((end for end in ends if kind_of(Path(unquoted(argument[:end])))), len(argument))
    return unquoted(argument[:end]), argument[end:].strip()


def name_of(part: dict[str, Any]) -> str:
    """What a part is called when something is said about it."""
    source = part.get(part["type"])
    if not isinstance(source, str) or source.startswith("data:"):
        return f"the {part['type']}"
    return source.rpartition("/")[2] or source if _REMOTE.match(source) else Path(source).name


def content(text: str, attached: list[dict[str, Any]]) -> str | list[Any]:
    """A message's content: what was attached, then the text, with the media files it names in their places."""
    parts = [*attached, *_with_dropped_files(text)]
    return text if all(isinstance(entry, str) for entry in parts) else parts


def notes(content: str | list[Any], attached: list[dict[str, Any]]) -> list[str]:
    """What a user should know of a message's content: the files its text brought in, and paths that stayed text."""
    parts = [content] if isinstance(content, str) else content
    taken = [f"with {name_of(part)}" for part in parts if isinstance(part, dict) and part not in attached]
    left = [note for piece in parts if isinstance(piece, str) for note in map(_left_as_text, _starts(piece)) if note]
    return taken + left[:MAX_NOTES]


def _starts(text: str) -> Iterator[str]:
    """The words at which a path may begin, without quotes and the punctuation behind them."""
    for start in _START.finditer(text):
        word = _WORD.match(text, start.start())
        if word and len(word[0]) <= MAX_NAME_LETTERS:
            yield unquoted(word[0]).rstrip(".,;:!?)")


def _left_as_text(name: str) -> str | None:
    if _REMOTE.match(name) and not name.startswith("file:"):
        kind = kind_of(Path(urlsplit(name).path))
        return f"note: {name} is text; /{kind} {name} fetches it" if kind else None
    path = _path_of(name)
    if kind_of(path):
        return f"note: there is no file {name}, so it is text"
    if not name.strip("/.~") or not _holds(path, Path.exists):
        return None
    what = "a folder" if _holds(path, Path.is_dir) else "no picture, sound or video"
    return f"note: {name} is {what}, so it is text"


def _with_dropped_files(text: str) -> Iterator[str | dict[str, Any]]:
    position = 0
    for start in _START.finditer(text):
        found = _dropped_file(text, start.start()) if start.start() >= position else None
        if found is None:
            continue
        if before := text[position : start.start()].strip():
            yield before
        path, position = found
        yield part(str(kind_of(path)), str(path))
    if text[position:].strip():
        yield text[position:].strip()


def _dropped_file(text: str, start: int) -> tuple[Path, int] | None:
    """The media file whose path begins here, and where the path ends."""
    word, line, bare = _WORD.match(text, start), _LINE.match(text, start), _BARE.match(text, start)
    spellings = [(line[0].rstrip(),) * 2] if line else []  # not escaped at all
    if word:
        spellings += [(unquoted(word[0]), word[0])]
    spellings += [(bare[0], bare[0])] if bare else []
    for name, spelled in spellings:
        for end in (len(name), len(name.rstrip(".,;:!?)"))):
            path = _path_of(name[:end])
            if kind_of(path) and _is_file(path):
                return path, start + len(spelled) - (len(name) - end)
    return None


def _path_of(name: str) -> Path:
    if not name.startswith("file://"):
        return Path(name)
    return Path(unquote(urlsplit(name.replace("?", "%3F").replace("#", "%23")).path))


def _is_file(path: Path) -> bool:
    return _holds(path, Path.is_file)


def _holds(path: Path, test: Callable[[Path], bool]) -> bool:
    try:
        return test(path.expanduser())
    except (OSError, ValueError, RuntimeError):  # a text that is no name: too long, with a null, of nobody's home
        return False


def kind_of(path: Path) -> str | None:
    """What a file holds by its suffix: "image", "audio", "video" or None."""
    return next((kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)


class OpenedMedia:
    """The objects of the parts of a conversation: a model opens an object once, and not in every turn."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str], Image | Audio | Video] = {}  # by kind and source

    def in_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with objects in the place of file names and URLs."""
        return [
            {**message, "content": [self._opened(part) for part in content]} if isinstance(content, list) else message
            for message in messages
            for content in [message.get("content")]
        ]

    def object_of(self, part: dict[str, Any]) -> "Image | Audio | Video":
        """The object of a part of ours, made when it is first asked for; raises ValueError when it can't be."""
        from g3n_mlx.media.audio import Audio
        from g3n_mlx.media.image import Image
        from g3n_mlx.media.video import Video

        kind, source = part["type"], part[part["type"]]
        if (kind, source) not in self._objects:
            self._objects[kind, source] = {"image": Image, "audio": Audio, "video": Video}[kind](source)
        return self._objects[kind, source]

    def _opened(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in SUFFIXES or not isinstance(part.get(kind), str):
            return part  # text, or what a saved file has written in another way
        return {**part, kind: self.object_of(part)}


@contextmanager
def errors_by_name(messages: list[dict[str, Any]]) -> Generator[None]:
    """Errors of a part with its file's name in the place of its index, which a chat never shows."""
    try:
        yield
    except ValueError as error:
        place = re.match(r"messages\[(\d+)\]\.content\[(\d+)\]: ", str(error))
        part = messages[int(place[1])]["content"][int(place[2])] if place else None
        if place is None or not isinstance(part, dict):
            raise
        name, message = name_of(part), str(error)[place.end() :]
        raise BadValue(message if name in message else f"{name}: {message}") from None


def clipboard_image() -> dict[str, Any]:
    """The image in the clipboard as a part; raises ValueError when there is none, or no way to look."""
    from PIL import Image, ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError) as error:
        raise BadValue(f"the clipboard can't be read: {error}") from error
    if isinstance(found, list):  # files, copied in a file manager
        images = [name for name in found if kind_of(Path(name)) == "image"]
        if not images:
            raise BadValue("the clipboard holds files, but no image among them")
        return part("image", images[0])
    if not isinstance(found, Image.Image):
        raise BadValue("the clipboard holds no image; copy one first")
    buffer = io.BytesIO()
    found.save(buffer, "PNG")
    return part("image", f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def recording(wait: Callable[[], object]) -> dict[str, Any]:
    """What the microphone hears until `wait` returns, as a part; raises ValueError when there is none to hear with."""
    try:
        import sounddevice
    except ImportError:
        raise BadValue(f"recording needs sounddevice: {install_command('mic')}") from None
    except OSError as error:  # the package without its PortAudio library
        raise BadValue(f"recording needs PortAudio: {error}") from None
    import numpy as np
    import soundfile

    heard: list[np.ndarray] = []

    def on_block(block: np.ndarray, *_: Any) -> None:
        heard.append(block.copy())

    try:
        with sounddevice.InputStream(samplerate=MICROPHONE_RATE, channels=1, dtype="float32", callback=on_block):
            wait()
    except sounddevice.PortAudioError as error:
        raise BadValue(f"the microphone can't be opened: {error}") from None
    if not heard:
        raise BadValue("nothing was recorded")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.concatenate(heard), MICROPHONE_RATE, format="WAV", subtype="PCM_16")
    return part("audio", f"data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def show(pixels: "np.ndarray") -> bool:
    """Shows pixels [h, w, 3] in a terminal that takes images (kitty's protocol or sixel); says whether it could."""
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        return False
    try:
        import PIL.Image
        from rich.console import Console

        # Asks the terminal what it can do when it is imported.
        from textual_image.renderable import Image, SixelImage, TGPImage
    except ImportError:  # the extra `pictures` is not installed
        return False
    if Image not in (SixelImage, TGPImage):
        return False
    Console().print(Image(PIL.Image.fromarray(pixels), height=12, width="auto"))
    return True

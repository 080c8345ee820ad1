"""What a question in the chat carries besides words: files named by a flag or a command or dropped into the line, the
image in the clipboard, the microphone. All become parts of a message that JSON can hold, so a chat can be saved.
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
FILE = "file"  # the kind of a text or PDF file, whose text goes into the prompt
# A path as terminals write a dropped file: absolute or a file:// URI, in quotes or with its spaces escaped, or both.
_QUOTED = r"""'([^'\n]*)'|"([^"\n]*)\""""
_PLAIN = r"[^\s'\"]" if os.name == "nt" else r"\\.|[^\s'\"\\]"
_DROPPED = re.compile(rf"""(?<!\S)(?=['"]?(?:/|file://|[A-Za-z]:[\\/]))(?:{_QUOTED}|{_PLAIN})+""")
_UNQUOTE = re.compile(_QUOTED if os.name == "nt" else rf"{_QUOTED}|\\(.)")
_REMOTE = re.compile(r"(?:https?|data|file):")
_PUNCTUATION = ".,;:!?)"  # that may follow a path
# What speech needs, and what the audio tower is given in the end.
MICROPHONE_RATE = 16_000
MAX_NAME_LETTERS = 4096  # of a path, as systems have it


def part(kind: str, source: str) -> dict[str, Any]:
    """A message part for a file, data URI or URL; a file by its full path, since the chat may be gone on elsewhere."""
    return {"type": kind, kind: source if _REMOTE.match(source) else str(Path(source).expanduser().absolute())}


def unquoted(name: str) -> str:
    """A file name as it was typed or dropped, without the quotes and escapes of a shell."""
    return _UNQUOTE.sub(lambda match: next((group for group in match.groups() if group is not None), ""), name)


def name_and_rest(argument: str) -> tuple[str, str]:
    """What follows a command: the file or URL, as it is or in a shell's spelling, and the text after it."""
    if _REMOTE.match(argument):
        name, *rest = argument.split(maxsplit=1)
        return name, "".join(rest)
    ends = [len(argument), *(space.start() for space in re.finditer(r"\s+", argument[:MAX_NAME_LETTERS]))]
    spellings = [(spelled, end) for end in sorted(ends) for spelled in (argument[:end], unquoted(argument[:end]))]
    # The longest file there is; else the shortest name of media, which must have been meant.
    found = next((entry for entry in reversed(spellings) if _is_file(Path(entry[0]))), None)
    named = next((entry for entry in spellings[1::2] if kind_of(Path(entry[0]))), spellings[-1])
    name, end = found or named
    return name, argument[end:].strip()


def name_of(part: dict[str, Any]) -> str:
    """What a part is called when something is said about it."""
    source = part.get(part["type"])
    if not isinstance(source, str) or source.startswith("data:"):
        return f"the {part['type']}"
    return source.rpartition("/")[2] or source if _REMOTE.match(source) else Path(source).name


def content(text: str, attached: list[dict[str, Any]]) -> str | list[Any]:
    """A message's content: what was attached, then the text, files dropped at its beginning or end in their places."""
    dropped = list(_dropped_files(text))
    borders = [0, *(border for start, end, _ in dropped for border in (start, end)), len(text)]
    between = [text[start:end].strip() for start, end in zip(borders[::2], borders[1::2], strict=True)]
    parts, position = [*attached], 0
    for index, (start, end, path) in enumerate(dropped):
        if any(between[: index + 1]) and any(words.strip(_PUNCTUATION) for words in between[index + 1 :]):
            continue
        parts += [text[position:start].strip(), part(str(kind_of(path)), str(path))]
        position = end
    parts = [entry for entry in [*parts, text[position:].strip()] if entry]
    return text if all(isinstance(entry, str) for entry in parts) else parts


def text_and_media(content: str | list[Any]) -> tuple[str, list[dict[str, Any]]]:
    """The words of a message's content, and its other parts."""
    if isinstance(content, str):
        return content, []
    texts = [part if isinstance(part, str) else part["text"] for part in content if is_text(part)]
    return "\n".join(texts), [part for part in content if not is_text(part)]


def is_text(part: Any) -> bool:
    """Whether a part of a message is words."""
    return isinstance(part, str) or "text" in part


def notes(content: str | list[Any], attached: list[dict[str, Any]]) -> list[str]:
    """What a user should know of a message's content: the files taken out of its text, and those left in it."""
    parts = [content] if isinstance(content, str) else content
    taken = [f"with {name_of(part)}" for part in parts if isinstance(part, dict) and part not in attached]
    left = [path.name for piece in parts if isinstance(piece, str) for _, _, path in _dropped_files(piece)]
    return taken + [f"note: {name} is text; drop a file at the beginning or end of a message" for name in left]


def _dropped_files(text: str) -> Iterator[tuple[int, int, Path]]:
    """The media files whose absolute paths are words of the text: where each word begins and ends, and the path."""
    for word in _DROPPED.finditer(text):
        name = unquoted(word[0])
        for length in (len(name), len(name.rstrip(_PUNCTUATION))):
            path = _path_of(name[:length])
            if path.is_absolute() and kind_of(path) and _is_file(path):
                yield word.start(), word.end() - (len(name) - length), path
                break


def _path_of(name: str) -> Path:
    if not name.startswith("file://"):
        return Path(name)
    return Path(unquote(urlsplit(name.replace("?", "%3F").replace("#", "%23")).path))


def _is_file(path: Path) -> bool:
    try:
        return path.expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # not a valid path: too long, null byte, unknown home directory
        return False


def kind_of(path: Path) -> str | None:
    """What a file holds by its suffix: "image", "audio", "video" or None."""
    return next((kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)


class OpenedMedia:
    """The objects of the parts of a conversation: a model opens an object once, and not in every turn."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str], Image | Audio | Video] = {}  # by kind and source
        self._texts: dict[str, str] = {}  # of files, by source
        self._left_out: list[dict[str, Any]] = []

    def in_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with objects in the place of names and URLs of media, and with the text of files.

        Raises ValueError for a file without text, and as `fetch` does.
        """
        return [
            {**message, "content": self._opened_parts(content)} if isinstance(content, list) else message
            for message in messages
            for content in [message.get("content")]
        ]

    def _opened_parts(self, content: list[Any]) -> list[Any]:
        parts: list[Any] = []
        after_text = False
        for entry in content:
            text = self._text_for(entry)
            piece = self._opened(entry) if text is None else text
            if after_text and isinstance(piece, str):  # a model takes parts without a space between them
                parts[-1] += f"\n\n{piece}"
            else:
                parts.append(piece)
            after_text = text is not None
        return parts

    def _text_for(self, part: Any) -> str | None:
        """The text in a part's place: a file's, or that it can't be opened any more; None for other parts."""
        if part in self._left_out:
            return f"[{name_of(part)} is no longer there]"
        is_file = isinstance(part, dict) and part.get("type") == FILE and isinstance(part.get(FILE), str)
        return self._text_of(part) if is_file else None

    def _text_of(self, part: dict[str, Any]) -> str:
        from g3n_mlx.media.document import document_text
        from g3n_mlx.media.fetch import fetch
        from g3n_mlx.media.policy import MediaPolicy
        from g3n_mlx.prompt.fences import fenced

        source, name = part[FILE], name_of(part)
        if source not in self._texts:
            try:
                text = document_text(fetch(source, MediaPolicy()))
            except ValueError as error:
                raise BadValue(str(error) if name in str(error) else f"{name}: {error}") from None
            self._texts[source] = fenced(name, text)
        return self._texts[source]

    def object_of(self, part: dict[str, Any]) -> "Image | Audio | Video":
        """The object of a part of ours, made when it is first asked for; raises ValueError when it can't be."""
        from g3n_mlx.media.audio import Audio
        from g3n_mlx.media.image import Image
        from g3n_mlx.media.video import Video

        kind, source = part["type"], part[part["type"]]
        if (kind, source) not in self._objects:
            self._objects[kind, source] = {"image": Image, "audio": Audio, "video": Video}[kind](source)
        return self._objects[kind, source]

    def leave_out(self, part: dict[str, Any]) -> None:
        """Has a part that can't be opened any more stand in messages as a note."""
        self._left_out.append(part)

    def _opened(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in SUFFIXES or not isinstance(part.get(kind), str):
            return part  # text, or what a saved file has written in another way
        return {**part, kind: self.object_of(part)}


def media_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of messages that are not words, in their order."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if isinstance(part, dict) and part.get("type") != "text"]


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

"""What a question in the chat carries besides words: files named by a flag or a command or dropped into the line,
the clipboard's picture, the microphone. All become parts of a message that JSON can hold, so a chat can be saved.
"""

import base64
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {
    "image": {".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"},
    "audio": {".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"},
    "video": {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"},
}
# A path as terminals write one that was dropped into them: in quotes, or with its spaces escaped.
_WORD = re.compile(r"""(?<!\S)(?:'([^'\n]+)'|"([^"\n]+)"|((?:\\.|[^\s\\'"])+))(?!\S)""")
_PATH = re.compile(r"(?:/|~/|\./|\.\./|file://|[A-Za-z]:[\\/])")
# What speech needs, and what the audio tower is given in the end.
MICROPHONE_RATE = 16_000


def part(kind: str, source: str) -> dict[str, Any]:
    """A message part for a file, data URI or URL; a file by its full path, since the chat may be gone on elsewhere."""
    remote = re.match(r"(?:https?|data|file):", source)
    return {"type": kind, kind: source if remote else str(Path(source).expanduser().absolute())}


def unquoted(name: str) -> str:
    """A file name as it was typed or dropped after a command, without the quotes or the escapes of a shell."""
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        return name[1:-1]
    return name if os.name == "nt" else re.sub(r"\\(.)", r"\1", name)


def content(text: str, attached: list[dict[str, Any]]) -> str | list[Any]:
    """A message's content: what was attached, then the text, with the media files it names in their places."""
    parts = [*attached, *_with_dropped_files(text)]
    return text if all(isinstance(entry, str) for entry in parts) else parts


def _with_dropped_files(text: str) -> Iterator[str | dict[str, Any]]:
    position = 0
    for match in _WORD.finditer(text):
        path = _dropped_path(match)
        kind = None if path is None else kind_of(path)
        if kind is None or path is None or not path.is_file():
            continue
        if text[position : match.start()].strip():
            yield text[position : match.start()].strip()
        yield part(kind, str(path))
        position = match.end()
    if text[position:].strip():
        yield text[position:].strip()


def _dropped_path(match: re.Match[str]) -> Path | None:
    quoted, bare = match[1] or match[2], match[3]
    word = quoted or unquoted(bare)
    if not _PATH.match(word):
        return None
    return Path(unquote(urlsplit(word).path)) if word.startswith("file://") else Path(word).expanduser()


def kind_of(path: Path) -> str | None:
    """What a file holds by its suffix: "image", "audio", "video" or None."""
    return next((kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)


def clipboard_image() -> dict[str, Any]:
    """The picture in the clipboard as a part; raises ValueError when there is none, or no way to look."""
    from PIL import Image, ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError) as error:
        raise ValueError(f"the clipboard can't be read: {error}") from error
    if isinstance(found, list):  # files, copied in a file manager
        pictures = [name for name in found if kind_of(Path(name)) == "image"]
        if not pictures:
            raise ValueError("the clipboard holds files, but no picture among them")
        return part("image", pictures[0])
    if not isinstance(found, Image.Image):
        raise ValueError("the clipboard holds no picture; copy one first")
    buffer = io.BytesIO()
    found.save(buffer, "PNG")
    return part("image", f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def recording(wait: Callable[[], object]) -> dict[str, Any]:
    """What the microphone hears until `wait` returns, as a part; raises ValueError when there is none to hear with."""
    try:
        import sounddevice
    except ImportError:
        raise ValueError("recording needs sounddevice: pip install 'g3n-mlx[mic]'") from None
    except OSError as error:  # the package without its PortAudio library
        raise ValueError(f"recording needs PortAudio: {error}") from None
    import numpy as np
    import soundfile

    heard: list[np.ndarray] = []

    def on_block(block: np.ndarray, *_: Any) -> None:
        heard.append(block.copy())

    try:
        with sounddevice.InputStream(samplerate=MICROPHONE_RATE, channels=1, dtype="float32", callback=on_block):
            wait()
    except sounddevice.PortAudioError as error:
        raise ValueError(f"the microphone can't be opened: {error}") from None
    if not heard:
        raise ValueError("nothing was recorded")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.concatenate(heard), MICROPHONE_RATE, format="WAV", subtype="PCM_16")
    return part("audio", f"data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def show(pixels: "np.ndarray") -> bool:
    """Shows pixels [h, w, 3] in a terminal that takes pictures (kitty's protocol or sixel); says whether it could."""
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

"""Files of audio and video: opened by PyAV, and checked to be complete.

Decoders accept a truncated file as if it were complete, or fill it up with silence. Most containers declare their
length, and that is compared here in bytes: a declared duration would not do, since Matroska has one for all tracks
together, WAV and Ogg have none, and a cut between two samples of an MP4 is seen by nothing else. Lengths that a writer
could not know (a pipe, a live recording) are taken as open. Sources: RIFF and AIFF chunks; RFC 3533 (Ogg);
ISO 14496-12, 4.2 (boxes); RFC 8794 (EBML).
"""

import io
from collections.abc import Iterator
from typing import Any

from g3n_mlx.failures import BadValue
from g3n_mlx.installation import install_command

# Containers of audio and video that PyAV may open; playlists and other formats that name further files are left out.
CONTAINERS = (
    "aac,ac3,aiff,amr,asf,avi,caf,eac3,flac,flv,m4v,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,mpegvideo,"
    "ogg,opus,wav,wv,gif,apng"
)
# A RIFF length from here on is a placeholder: espeak-ng writes 0x7ffff000, FFmpeg 0xffffffff when they write to a pipe.
_OPEN_RIFF_BYTES = 0x7FFF0000
# Chunks or boxes that are looked at: no file of use has more, and one of empty ones would take a while.
_MAX_PARTS = 100_000
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def import_av(found: str) -> Any:
    """PyAV; raises ValueError naming the extra when it is not installed."""
    try:
        import av
    except ImportError:
        raise BadValue(
            f"the file is {found}: M4A, AAC, Opus and videos need PyAV: {install_command('video')}"
        ) from None
    return av


def open_container(data: bytes) -> Any:
    """A PyAV container of a file's bytes; raises ValueError when it is none of the known formats."""
    av = import_av("a video")
    try:
        # No protocol at all: nothing in the file can make the demuxer open another file or a URL.
        return av.open(io.BytesIO(data), options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"})
    except (av.FFmpegError, ValueError):
        raise BadValue("not audio or video in a known format, or damaged") from None


def check_whole(data: bytes) -> None:
    """Raises ValueError when an audio or video file is shorter than it declares."""
    missing = _declared_bytes(data) - len(data)
    if missing > 0:
        raise BadValue(f"the file is cut off: at least {missing:,} bytes are missing of {missing + len(data):,}")


def _declared_bytes(data: bytes) -> int:
    """How long the file says it is at least; 0 when it does not."""
    if data[:4] == b"RIFF":
        return _riff_bytes(data)
    if data[:4] == b"FORM":
        return 8 + int.from_bytes(data[4:8], "big")
    if data[:4] == b"OggS":
        return _ogg_bytes(data)
    if data[:4] == _EBML:
        return _matroska_bytes(data)
    if data[4:8] in (b"ftyp", b"moov", b"mdat"):
        return max((stop for kind, stop in _boxes(data) if kind in (b"moov", b"mdat", b"moof")), default=0)
    return 0  # MP3, FLAC and bare AAC: their decoders notice


def _riff_bytes(data: bytes) -> int:
    """The end of WAV's samples, or of an AVI; what follows the samples is not needed."""
    if data[8:12] != b"WAVE":
        size = int.from_bytes(data[4:8], "little")
        return 8 + size if size < _OPEN_RIFF_BYTES else 0
    position = 12
    for _ in range(_MAX_PARTS):
        if position + 8 > len(data):
            break
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"data":
            return position + 8 + size if size < _OPEN_RIFF_BYTES else 0
        position += 8 + size + size % 2
    return 0


def _ogg_bytes(data: bytes) -> int:
    """The end of the last page."""
    page = data.rfind(b"OggS")
    if page + 27 > len(data):
        return page + 27
    lengths = page + 27 + data[page + 26]
    return lengths + sum(data[page + 27 : lengths])


def _boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The outermost boxes of an MP4: the kind, and where it ends."""
    position = 0
    for _ in range(_MAX_PARTS):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8:  # 0 is a box without an end
            return
        position += size
        yield kind, position


def _matroska_bytes(data: bytes) -> int:
    """The end of the segment, which holds everything after the header."""
    size, width = _ebml_size(data, 4)
    segment = 4 + width + size
    if data[segment : segment + 4] != _SEGMENT:
        return 0
    size, width = _ebml_size(data, segment + 4)
    unknown = (1 << 7 * width) - 1
    return 0 if size == unknown else segment + 4 + width + size


def _ebml_size(data: bytes, position: int) -> tuple[int, int]:
    """A length whose first bit set says in how many bytes it stands: the value, and the bytes."""
    first = data[position] if position < len(data) else 0
    width = 9 - first.bit_length()
    return int.from_bytes(data[position : position + width], "big") & ((1 << 7 * width) - 1), width


def mp3_declares_length(data: bytes) -> bool:
    """Whether the first frame of an MP3 is a Xing, Info or VBRI header, which counts the frames."""
    start = 0
    if data[:3] == b"ID3" and len(data) > 10:
        start = 10 + sum((byte & 0x7F) << 7 * (3 - place) for place, byte in enumerate(data[6:10]))
    return any(word in data[start : start + 64] for word in (b"Xing", b"Info", b"VBRI"))

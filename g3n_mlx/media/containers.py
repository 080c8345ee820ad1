"""Files of audio and video: opened by PyAV, and checked to be complete.

Decoders accept a truncated file as if it were complete, or fill it up with silence. Most containers declare their
length, and that is compared here in bytes: a declared duration would not do, since Matroska has one for all tracks
together, WAV and Ogg have none, and a cut between two samples of an MP4 is seen by nothing else. Lengths that a writer
could not know (a pipe, a live recording) are taken as open. Sources: RIFF and AIFF chunks; RFC 3533 (Ogg);
ISO 14496-12, 4.2 (boxes); RFC 8794 (EBML).
"""

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from g3n_mlx.failures import BadValue

# Containers of audio and video that PyAV may open; playlists and other formats that name further files are left out.
CONTAINERS = (
    "aac,ac3,aiff,amr,asf,avi,caf,eac3,flac,flv,m4v,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,mpegvideo,"
    "ogg,opus,wav,wv,gif,apng,w64,au,voc,tta"
)
# A RIFF length from here on is a placeholder: espeak-ng writes 0x7ffff000, FFmpeg 0xffffffff when they write to a pipe.
_OPEN_RIFF_BYTES = 0x7FFF0000
# Chunks or boxes that are looked at: no file of use has more, and one of empty ones would take a while.
_MAX_PARTS = 100_000
_MAX_BLOCKS = 1_000_000  # of a live recording: five hours of 20 ms
_EBML, _SEGMENT, _CLUSTER = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"


def open_container(data: bytes) -> Any:
    """A PyAV container of a file's bytes; raises ValueError when it is none of the known formats."""
    import av
    from av.error import FFmpegError

    try:
        # No protocol at all: nothing in the file can make the demuxer open another file or a URL.
        return av.open(io.BytesIO(data), options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"})
    except (FFmpegError, ValueError):
        raise BadValue("not audio or video in a known format, or damaged") from None


def check_whole(data: bytes) -> None:
    """Raises ValueError when an audio or video file is shorter than it declares."""
    missing = _declared_bytes(data) - len(data)
    if missing > 0:
        raise BadValue(f"the file is cut off: at least {missing:,} bytes are missing of {missing + len(data):,}")


def _declared_bytes(data: bytes) -> int:
    """How long the file says it is at least; 0 when it does not."""
    if data[:4] in (b"RIFF", b"RF64", b"BW64"):
        return _riff_bytes(data)
    if data[:4] == b"FORM":
        return 8 + int.from_bytes(data[4:8], "big")
    if data[:4] == b"OggS":
        return _ogg_bytes(data)
    if data[:4] == _EBML:
        return _matroska_bytes(data)
    if data[4:8] in (b"ftyp", b"moov", b"mdat"):
        return max((stop for kind, stop in _boxes(data) if kind in (b"moov", b"mdat", b"moof")), default=0)
    if data[:4] == b".snd":
        start, size = int.from_bytes(data[4:8], "big"), int.from_bytes(data[8:12], "big")
        return start + size if size < _OPEN_RIFF_BYTES else 0
    if data[:4] == b"FLV\x01":
        return _flv_bytes(data)
    if data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0"):
        return _mp3_bytes(data)
    return 0  # of FLAC, bare AAC, TS and others the decoder notices


def _flv_bytes(data: bytes) -> int:
    """The end of the last tag."""
    position = int.from_bytes(data[5:9], "big") + 4
    for _ in range(_MAX_BLOCKS):
        if position + 11 > len(data):
            break
        position += 11 + int.from_bytes(data[position + 1 : position + 4], "big") + 4
    return position


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
            if data[12:16] == b"ds64":  # whose lengths are of 64 bits
                size = int.from_bytes(data[28:36], "little")
                return position + 8 + size if size < 1 << 63 else 0
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


def with_length(data: bytes) -> bytes:
    """An AU or AIFF whose interrupted writer left lengths of 0, with the length that it has; other files as they are.

    FFmpeg reads such a WAV to its end by itself.
    """
    if data[:4] == b".snd" and data[8:12] == bytes(4):
        return data[:8] + b"\xff" * 4 + data[12:]
    if data[:4] != b"FORM" or data[8:12] not in (b"AIFF", b"AIFC"):
        return data
    common, sound = data.find(b"COMM", 12), data.find(b"SSND", 12)
    if not 12 <= common < sound or int.from_bytes(data[sound + 4 : sound + 8], "big") > 8:
        return data
    whole = bytearray(data)
    length = len(data) - sound - 8
    frame = int.from_bytes(data[common + 8 : common + 10], "big") * -(
        -int.from_bytes(data[common + 14 : common + 16], "big") // 8
    )
    whole[4:8] = (len(data) - 8).to_bytes(4, "big")
    whole[sound + 4 : sound + 8] = length.to_bytes(4, "big")
    whole[common + 10 : common + 14] = ((length - 8) // frame if frame and length > 8 else 0).to_bytes(4, "big")
    return bytes(whole)


def ogg_links(data: bytes) -> list[bytes]:
    """The links of a chain of Ogg files, each a file of its own (RFC 3533, 4); any other file as it is.

    FFmpeg follows a chain only where all links have the same codec, rate and channels.
    """
    starts, position, begun = [0], 0, False
    while data[position : position + 4] == b"OggS" and position + 27 <= len(data):
        first = bool(data[position + 5] & 2)
        if first and begun:
            starts.append(position)
        begun = not first
        lengths = position + 27 + data[position + 26]
        position = lengths + sum(data[position + 27 : lengths])
    return [data[start:stop] for start, stop in pairwise([*starts, len(data)])]


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
    """The end of the last element. In a live recording neither the segment nor a cluster knows its length: there it is
    the end of the last block.
    """
    position, end = 0, 0
    for _ in range(_MAX_BLOCKS):
        kind_end = position + 9 - (data[position] if position < len(data) else 0).bit_length()
        if kind_end >= len(data):
            break
        kind = data[position:kind_end]
        size, width = _ebml_size(data, kind_end)
        position = kind_end + width
        if size == (1 << 7 * width) - 1:
            if kind not in (_SEGMENT, _CLUSTER):
                break
            continue  # its elements follow
        position += size
        end = max(end, position)
        if position >= len(data):
            break
    return end


def _ebml_size(data: bytes, position: int) -> tuple[int, int]:
    """A length whose first bit set says in how many bytes it stands: the value, and the bytes."""
    first = data[position] if position < len(data) else 0
    width = 9 - first.bit_length()
    return int.from_bytes(data[position : position + width], "big") & ((1 << 7 * width) - 1), width


def _mp3_bytes(data: bytes) -> int:
    """The end of the frames, where the first one is a Xing, Info or VBRI header that says how many bytes they take."""
    start = 0
    if data[:3] == b"ID3":
        start = 10 + sum((byte & 0x7F) << 7 * (3 - place) for place, byte in enumerate(data[6:10]))
    head = data[start : start + 128]
    for word in (b"Xing", b"Info", b"VBRI"):
        at = head.find(word, 0, 64)
        if at < 0:
            continue
        if word == b"VBRI":
            return start + int.from_bytes(head[at + 10 : at + 14], "big")
        flags = int.from_bytes(head[at + 4 : at + 8], "big")
        counted = at + (12 if flags & 1 else 8)  # after the number of frames
        return start + int.from_bytes(head[counted : counted + 4], "big") if flags & 2 else 0
    return 0

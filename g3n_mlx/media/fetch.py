"""Paths, `file:` and `data:` URIs and http(s) URLs to bytes, within the limits of a policy."""

import base64
import binascii
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from g3n_mlx.failures import BadValue
from g3n_mlx.media.download import download, short
from g3n_mlx.media.policy import MediaPolicy

if TYPE_CHECKING:
    import numpy as np

_URL_SAFE = str.maketrans("-_", "+/")
# A scheme has two letters or more: a single one is a drive of Windows.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")


def fetch(source: str | Path, policy: MediaPolicy) -> bytes:
    """The bytes that a path or URI names; raises ValueError when there are none, or the policy refuses them."""
    if isinstance(source, Path):
        return _read_file(source, policy)
    if not source:
        raise BadValue("the path is empty")
    scheme = _SCHEME.match(source)
    match scheme[1].lower() if scheme else None:
        case "data":
            return _decode_data_uri(source, policy)
        case "http" | "https":
            return download(source, policy)
        case "file":
            return _read_file(_path_of_file_uri(source), policy)
        case None:
            return _read_file(Path(source), policy)
        case _ if "://" not in source:  # a file name with a colon in it
            return _read_file(Path(source), policy)
        case other:
            raise BadValue(f"{short(source)} has the scheme {other!r}, expected http, https, data, file or a path")


def source_text(source: "str | Path | bytes | np.ndarray") -> str:
    """What media are made of, in a few words for a repr: a path or URI, or how much of what."""
    if isinstance(source, bytes):
        return f"{len(source):,} bytes"
    if isinstance(source, str | Path):
        return short(source)
    return f"{source.dtype} {list(source.shape)}"


def _decode_base64(text: str, policy: MediaPolicy) -> bytes:
    """Base64 of either alphabet, with or without its padding. Line breaks may stand in it; a space was a "+"."""
    policy.check_bytes(len(text) * 3 // 4 - 2, "the base64 text")
    bare = re.sub(r"[\r\n]", "", text).translate(_URL_SAFE)
    bare = bare.removesuffix("=").removesuffix("=")
    try:
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadValue(f"{short(text)} is not base64: {error}") from None


def _decode_data_uri(uri: str, policy: MediaPolicy) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise BadValue(f"the data: URI {short(uri)} has no comma, expected data:TYPE;base64,DATA")
    if header.lower().endswith(";base64"):
        return _decode_base64(unquote_to_bytes(payload).decode("latin-1") if "%" in payload else payload, policy)
    if re.search(r"%(?![0-9A-Fa-f]{2})", payload) or not payload.isascii():
        raise BadValue(f"the data: URI {short(uri)} is neither base64 nor percent-encoded")
    data = unquote_to_bytes(payload)
    policy.check_bytes(len(data), "the data: URI")
    return data


def _path_of_file_uri(uri: str) -> Path:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise BadValue(f"{short(uri)} names the host {parts.netloc!r}, expected file:///PATH on this machine")
    return Path(url2pathname(parts.path))


def _read_file(path: Path, policy: MediaPolicy) -> bytes:
    # Errors have the path as it was given: the folder that media may come from is nothing that a client should learn.
    try:
        allowed = _allowed_path(path, policy)
        if not allowed.exists():
            raise BadValue(f"{short(path)} does not exist")
        if not allowed.is_file():
            raise BadValue(f"{short(path)} is not a regular file")
        policy.check_bytes(allowed.stat().st_size, short(path))
        return allowed.read_bytes()
    except OSError as error:
        raise BadValue(f"{short(path)} can't be read: {error.strerror or type(error).__name__}") from None
    except RuntimeError:
        raise BadValue(f"{short(path)} can't be read: there is no such home folder, or its links form a loop") from None


def _allowed_path(path: Path, policy: MediaPolicy) -> Path:
    """The path to open, with its links resolved where they matter."""
    if policy.paths is None:
        raise BadValue("local files are not allowed here; send the media as a data: URI or an http(s) URL")
    if "\0" in str(path):
        raise BadValue(f"{short(path)} holds a null character")
    if not isinstance(policy.paths, Path):
        return path.expanduser()
    root = policy.paths.resolve()
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root):
        raise BadValue(f"{short(path)} does not lie below the folder that media may come from")
    return resolved

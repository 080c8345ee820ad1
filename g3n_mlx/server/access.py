"""Where a server listens, who may call it, and which media it opens: flags that `serve` and `mcp` share."""

import argparse
import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from g3n_mlx.failures import FileProblem
from g3n_mlx.media.policy import MediaPolicy

if TYPE_CHECKING:
    from g3n_mlx.server.gate import GatePolicy

_ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+/?")

log = logging.getLogger(__name__)


def add_access_flags(add: Callable[..., argparse.Action], port: int) -> None:
    """Adds the flags of addresses, keys, hosts and origins. add: `add_argument` of a parser or group."""
    add("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine")
    add("--port", type=_port, default=port, help=f"0 takes a free one; default: {port}")
    add("--api-key", metavar="KEY", help="what requests must bring; or set G3N_API_KEY")
    add("--api-key-file", type=Path, metavar="FILE", help="the key, where no list of processes shows it")
    add("--allow-host", metavar="NAME", action="append", default=[], help="a name of this server")
    add("--cors-origin", metavar="ORIGIN", action="append", default=[], help="web pages that may call, as https://a.b")


def add_media_flags(add: Callable[..., argparse.Action]) -> None:
    """Adds the flags of where media may come from."""
    add("--media-root", type=Path, metavar="FOLDER", help="where local paths and file:// may point")
    add(
        "--allow-media-host",
        metavar="HOST[:PORT]",
        action="append",
        default=[],
        help="a private host that media may come from",
    )


def check_access(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the command at a wrong value of these flags; reads the key into `arguments.api_key`, None for none."""
    if arguments.media_root is not None and not arguments.media_root.is_dir():
        parser.error(f"--media-root {str(arguments.media_root)!r} is no folder")
    arguments.api_key = _api_key(parser, arguments)
    for origin in arguments.cors_origin:
        if not _ORIGIN.fullmatch(origin):
            parser.error(f"--cors-origin {origin!r} is no origin, expected SCHEME://HOST[:PORT], as https://a.b, or *")


def listener(arguments: argparse.Namespace) -> socket.socket:
    """A socket at the address of the flags, before the model is read: a port that is taken should not cost that time.

    It does not listen yet, so clients are refused until the model can answer.
    """
    host, port = arguments.host, arguments.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there it would let several servers take one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise FileProblem(
            f"can't listen at {host}:{port}: {error.strerror}; --host and --port name another place"
        ) from None
    if arguments.api_key is None and not _is_loopback(host):
        log.warning("listening at %s without --api-key: whoever reaches this machine can use it", host)
    return bound


def url_of(bound: socket.socket) -> str:
    """The URL of a listener, without a path."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def gate_policy(arguments: argparse.Namespace, max_body_bytes: int) -> "GatePolicy":
    """Whom the flags let through."""
    from g3n_mlx.server.gate import GatePolicy

    host = arguments.host
    return GatePolicy(
        api_key=arguments.api_key,
        hosts=frozenset(name.lower() for name in [*arguments.allow_host, host, *_own_names(host)]),
        cors_origins=frozenset(origin.lower().rstrip("/") for origin in arguments.cors_origin),
        max_body_bytes=max_body_bytes,
    )


def media_policy(arguments: argparse.Namespace, max_bytes: int, paths: Literal["all"] | None = None) -> MediaPolicy:
    """The media that the flags allow. paths: the local ones without --media-root."""
    return MediaPolicy(
        paths=arguments.media_root or paths,
        private_hosts=False,
        allowed_hosts=frozenset(host.lower() for host in arguments.allow_media_host),
        max_bytes=max_bytes,
        max_pixels=64_000_000,
        max_seconds=1800.0,
        timeout_s=30.0,
        max_redirects=3,
    )


def _api_key(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str | None:
    """The key of --api-key, --api-key-file or G3N_API_KEY, in this order; None for none."""
    key, flag = arguments.api_key, "--api-key"
    if key is not None and arguments.api_key_file is not None:
        parser.error("give --api-key or --api-key-file, one of them")
    if arguments.api_key_file is not None:
        flag = "--api-key-file"
        try:
            key = arguments.api_key_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--api-key-file {str(arguments.api_key_file)!r} can't be read: {error}")
    if key is None:
        return os.environ.get("G3N_API_KEY") or None
    if not key.strip():
        parser.error(f"{flag} is empty, expected a key; leave the flag out to ask for none")
    return key


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 65535")
    return value


def _own_names(host: str) -> list[str]:
    """The name that the local network knows this machine by, where the server listens to that network."""
    return [] if _is_loopback(host) else [f"{socket.gethostname().partition('.')[0]}.local"]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"

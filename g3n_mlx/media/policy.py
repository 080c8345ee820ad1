"""What a caller allows while media are opened: where they may come from, how much of them, and until when."""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from g3n_mlx.failures import BadValue, TooLate

Resolver = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, by the system's resolver; raises OSError when it has none."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """Where media may come from, and how much of them is fetched and decoded.

    The defaults suit a user's own program; a server that strangers reach says no to local paths and private hosts.
    """

    paths: Literal["all"] | Path | None = "all"  # a folder: only what lies below it, also for relative paths
    private_hosts: bool = True  # False: only addresses of the public internet, and allowed_hosts
    allowed_hosts: frozenset[str] = frozenset()  # "host" or "host:port", in lower case, whatever their addresses
    max_bytes: int = 1 << 30  # of a file, a download or a data: URI
    max_pixels: int = 178_956_970  # of a decoded image; Pillow's own limit
    max_side: int = 65_535  # of an image, in pixels: JPEG's own limit; a longer one is no image to look at
    max_seconds: float = 4 * 3600.0  # of decoded audio and video
    timeout_s: float = 60.0  # of a download, redirects included
    max_redirects: int = 5
    deadline: float | None = None  # time.monotonic() at which opening ends, however far it has come
    resolver: Resolver = resolve

    def check_time(self) -> None:
        """Raises TimeoutError after the deadline."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TooLate("the time for opening media is over")

    def check_bytes(self, num_bytes: int, what: str) -> None:
        """Raises ValueError naming what is larger than `max_bytes`."""
        if num_bytes > self.max_bytes:
            raise BadValue(f"{what} has more than {self.max_bytes:,} bytes, the most that is accepted")

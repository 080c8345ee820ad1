"""Paths, `file:` and `data:` URIs and http(s) URLs to bytes, within the limits of a policy.

Under a policy that refuses private hosts every address of a host is checked, again after each redirect, and the
connection goes to a checked address, so a name that resolves differently the second time (DNS rebinding) gains
nothing; proxies of the environment are left aside there, since they would resolve the name themselves. TLS always
verifies the host's name. Python's own http.client takes a socket that is already connected, which is all this needs.
"""

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass, url2pathname

from g3n_mlx.failures import one_line

if TYPE_CHECKING:
    import numpy as np

_REMOTE = ("http", "https")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 16
# A scheme has two letters or more: a single one is a drive of Windows.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address

Resolver = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, by the system's resolver; raises OSError when it has none."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """Where media may come from, and how much of them is taken in.

    The defaults suit a user's own program; a server that strangers reach says no to local paths and private hosts.
    """

    paths: Literal["all"] | Path | None = "all"  # a folder: only what lies below it, also for relative paths
    private_hosts: bool = True  # False: only addresses of the public internet, and allowed_hosts
    allowed_hosts: frozenset[str] = frozenset()  # "host" or "host:port", in lower case, whatever their addresses
    max_bytes: int = 1 << 30
    max_pixels: int = 178_956_970  # of a decoded picture; Pillow's own limit
    max_seconds: float = 4 * 3600.0  # of decoded sound and video
    timeout_s: float = 60.0  # of a download, redirects included
    max_redirects: int = 5
    deadline: float | None = None  # time.monotonic() at which opening ends, however far it has come
    resolver: Resolver = resolve

    def check_time(self) -> None:
        """Raises TimeoutError after the deadline."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeoutError("the time for opening media is over")


def fetch(source: str | Path, policy: FetchPolicy) -> bytes:
    """The bytes that a path or URI names; raises ValueError when there are none, or the policy refuses them."""
    if isinstance(source, Path):
        return _read_file(source, policy)
    if not source:
        raise ValueError("the path is empty")
    scheme = _SCHEME.match(source)
    match scheme[1].lower() if scheme else None:
        case "data":
            return _decode_data_uri(source, policy)
        case "http" | "https":
            return _download(source, policy)
        case "file":
            return _read_file(_path_of_file_uri(source), policy)
        case None:
            return _read_file(Path(source), policy)
        case _ if "://" not in source:  # a file name with a colon in it
            return _read_file(Path(source), policy)
        case other:
            raise ValueError(f"{_short(source)} has the scheme {other!r}, expected http, https, data, file or a path")


def source_text(source: "str | Path | bytes | np.ndarray") -> str:
    """What media are made of, in a few words for a repr: a path or URI, or how much of what."""
    if isinstance(source, bytes):
        return f"{len(source):,} bytes"
    if isinstance(source, str | Path):
        return _short(source)
    return f"{source.dtype} {list(source.shape)}"


def decode_base64(text: str, policy: FetchPolicy) -> bytes:
    """Strict base64 with its padding, line breaks allowed; raises ValueError when it is none, or too large."""
    _check_size(len(text) * 3 // 4 - 2, "the base64 text", policy)
    try:
        return base64.b64decode(re.sub(r"[\r\n]", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{_short(text)} is not base64: {error}") from None


def _decode_data_uri(uri: str, policy: FetchPolicy) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError(f"the data: URI {_short(uri)} has no comma, expected data:TYPE;base64,DATA")
    if header.lower().endswith(";base64"):
        return decode_base64(unquote_to_bytes(payload).decode("latin-1") if "%" in payload else payload, policy)
    if re.search(r"%(?![0-9A-Fa-f]{2})", payload) or not payload.isascii():
        raise ValueError(f"the data: URI {_short(uri)} is neither base64 nor percent-encoded")
    data = unquote_to_bytes(payload)
    _check_size(len(data), "the data: URI", policy)
    return data


def _path_of_file_uri(uri: str) -> Path:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{_short(uri)} names the host {parts.netloc!r}, expected file:///PATH on this machine")
    return Path(url2pathname(parts.path))


def _read_file(path: Path, policy: FetchPolicy) -> bytes:
    try:
        path = _allowed_path(path, policy)
        if not path.exists():
            raise ValueError(f"{_short(path)} does not exist")
        if not path.is_file():
            raise ValueError(f"{_short(path)} is not a regular file")
        _check_size(path.stat().st_size, _short(path), policy)
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a home folder that is not known, a loop of links
        raise ValueError(f"{_short(path)} can't be read: {getattr(error, 'strerror', None) or error}") from None


def _allowed_path(path: Path, policy: FetchPolicy) -> Path:
    """The path to open, with its links resolved where they matter."""
    if policy.paths is None:
        raise ValueError("local files are not allowed here; send the media as a data: URI or an http(s) URL")
    if "\0" in str(path):
        raise ValueError(f"{_short(path)} holds a null character")
    if not isinstance(policy.paths, Path):
        return path.expanduser()
    root = policy.paths.resolve()
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root):
        raise ValueError(f"{_short(path)} does not lie below the folder that media may come from")
    return resolved


def _download(url: str, policy: FetchPolicy) -> bytes:
    deadline = time.monotonic() + policy.timeout_s
    if policy.deadline is not None:
        deadline = min(deadline, policy.deadline)
    for _ in range(policy.max_redirects + 1):
        answer = _request(url, policy, deadline)
        if isinstance(answer, bytes):
            return answer
        url = answer
    raise ValueError(f"{_short(url)}: more than {policy.max_redirects} redirects")


def _request(url: str, policy: FetchPolicy, deadline: float) -> bytes | str:
    """One request: the body, or the URL that the host redirects to."""
    parts = _split(url)
    host, port = str(parts.hostname), parts.port or _DEFAULT_PORTS[parts.scheme]
    expired = threading.Event()
    try:
        with closing(_connect(parts.scheme, host, port, policy, deadline)) as connection:
            # A socket's timeout starts anew with every byte; the download as a whole ends here.
            watch = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, (connection.sock, expired))
            watch.start()
            try:
                if isinstance(connection.sock, ssl.SSLSocket):
                    connection.sock.do_handshake()
                return _exchange(connection, parts, policy)
            finally:
                watch.cancel()
    except (OSError, http.client.HTTPException) as error:
        policy.check_time()
        if expired.is_set() or isinstance(error, TimeoutError):
            raise ValueError(f"{_short(url)} took longer than {policy.timeout_s:g} s") from None
        raise ValueError(f"{_short(url)} can't be fetched: {one_line(error)}") from None


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").encode("idna").decode()
    except ValueError as error:
        raise ValueError(f"{_short(url)} is not a URL: {error}") from None
    if parts.scheme not in _REMOTE:
        raise ValueError(f"{_short(url)}: a redirect to the scheme {parts.scheme!r}, expected http or https")
    if not host:
        raise ValueError(f"{_short(url)} names no host")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"the URL of {host} holds a user name; credentials in a URL are not sent, leave them out")
    location = f"[{host}]" if ":" in host else host
    return parts._replace(netloc=location if port is None else f"{location}:{port}")


def _connect(scheme: str, host: str, port: int, policy: FetchPolicy, deadline: float) -> http.client.HTTPConnection:
    """A connection whose socket is open: to an address that the policy allows, or through the user's proxy."""
    timeout_s = max(0.001, deadline - time.monotonic())
    tls = ssl.create_default_context() if scheme == "https" else None
    proxy = getproxies().get(scheme) if policy.private_hosts and not proxy_bypass(host) else None
    if proxy is not None:
        return _connect_by_proxy(proxy, host, port, tls, timeout_s)
    connection = http.client.HTTPConnection(host, port)
    opened = _open_socket(_checked_addresses(host, port, policy), port, timeout_s)
    if tls is not None:
        opened = tls.wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
    connection.sock = opened
    return connection


def _connect_by_proxy(
    proxy: str, host: str, port: int, tls: ssl.SSLContext | None, timeout_s: float
) -> http.client.HTTPConnection:
    address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if address.scheme != "http" or address.hostname is None:
        raise ValueError(f"the environment names the proxy {proxy!r}, expected http://HOST:PORT")
    if tls is None:
        connection = http.client.HTTPConnection(address.hostname, address.port or 80, timeout=timeout_s)
    else:
        connection = http.client.HTTPSConnection(address.hostname, address.port or 80, timeout=timeout_s, context=tls)
        connection.set_tunnel(host, port)
    connection.connect()
    return connection


def _checked_addresses(host: str, port: int, policy: FetchPolicy) -> Sequence[str]:
    try:
        addresses = policy.resolver(host, port)
    except UnicodeError:
        raise ValueError(f"{_short(host)} is not a host name") from None
    if not addresses:
        raise ValueError(f"{_short(host)} has no address")
    if policy.private_hosts or {host.lower(), f"{host.lower()}:{port}"} & policy.allowed_hosts:
        return addresses
    for address in addresses:
        if not _is_public(ipaddress.ip_address(address)):
            raise ValueError(f"{_short(host)} is a private address, and media may not come from there")
    return addresses


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to the public internet, and so does the IPv4 address that it may carry."""
    if isinstance(address, ipaddress.IPv6Address):
        carried = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in _NAT64:
            carried = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if carried is not None:
            return _is_public(carried)
    # Site-local addresses of IPv6 are deprecated, and count as global to Python.
    site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not (address.is_multicast or address.is_reserved or site_local)


def _open_socket(addresses: Sequence[str], port: int, timeout_s: float) -> socket.socket:
    """A connection to the first address that answers; all tries together take `timeout_s` at most."""
    deadline = time.monotonic() + timeout_s
    *others, last = addresses
    for address in others:
        try:
            return socket.create_connection((address, port), max(0.001, deadline - time.monotonic()))
        except OSError:
            if time.monotonic() >= deadline:
                raise
    return socket.create_connection((last, port), max(0.001, deadline - time.monotonic()))


def _hang_up(connected: socket.socket, expired: threading.Event) -> None:
    expired.set()
    # The plain socket's own method: that of a TLS socket would also drop its state, which the reader still uses.
    socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _exchange(connection: http.client.HTTPConnection, parts: SplitResult, policy: FetchPolicy) -> bytes | str:
    through_proxy = parts.scheme == "http" and connection.host != parts.hostname
    target = parts.path or "/"
    target = f"{target}?{parts.query}" if parts.query else target
    target = quote(f"http://{parts.netloc}{target}" if through_proxy else target, safe="%/:?#[]@!$&'()*+,;=~")
    # Without an Accept-Encoding of ours http.client asks for "identity": the limit counts the bytes that arrive.
    headers = {"Host": parts.netloc, "User-Agent": "g3n-mlx", "Accept": "*/*"}
    connection.request("GET", target, headers=headers)
    response = connection.getresponse()
    url = parts.geturl()
    if response.status in _REDIRECTS:
        location = response.headers.get("Location")
        if not location:
            raise ValueError(f"{_short(url)} redirects without saying where to")
        return urljoin(url, location)
    if response.status != 200:
        raise ValueError(f"{_short(url)} answered {response.status} {response.reason}")
    return _read_body(response, url, policy)


def _read_body(response: http.client.HTTPResponse, url: str, policy: FetchPolicy) -> bytes:
    _check_size(response.length or 0, _short(url), policy)
    body = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        body += chunk
        _check_size(len(body), _short(url), policy)
    if response.length:
        raise http.client.IncompleteRead(bytes(body), response.length)
    return bytes(body)


def _check_size(num_bytes: int, what: str, policy: FetchPolicy) -> None:
    if num_bytes > policy.max_bytes:
        raise ValueError(f"{what} has more than {policy.max_bytes:,} bytes, the most that is taken")


def _short(source: str | Path) -> str:
    text = str(source)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")

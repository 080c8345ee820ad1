"""http(s) URLs to bytes, within the limits of a policy.

Under a policy that refuses private hosts every address of a host is checked, again after each redirect, and the
connection goes to a checked address, so a name that resolves differently the second time (DNS rebinding) gains
nothing; proxies from the environment are ignored there, since they would resolve the name themselves. TLS always
verifies the host's name. Python's own http.client takes a socket that is already connected, which is all this needs.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from urllib.parse import SplitResult, quote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from g3n_mlx.failures import BadValue, one_line
from g3n_mlx.media.policy import MediaPolicy

_REMOTE = ("http", "https")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address


def download(url: str, policy: MediaPolicy) -> bytes:
    """The body that a URL leads to; raises ValueError naming the URL when the policy refuses it or a request fails."""
    return _Download(policy).follow(url)


class _Download:
    """Requests that share one time limit, from a URL along its redirects to a body."""

    def __init__(self, policy: MediaPolicy) -> None:
        self._policy = policy
        self._deadline = time.monotonic() + policy.timeout_s
        if policy.deadline is not None:
            self._deadline = min(self._deadline, policy.deadline)

    def follow(self, url: str) -> bytes:
        for _ in range(self._policy.max_redirects + 1):
            answer = self._request(url)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise BadValue(f"{short(url)}: more than {self._policy.max_redirects} redirects")

    def _request(self, url: str) -> bytes | str:
        """One request: the body, or the URL that the host redirects to."""
        parts = _split(url)
        expired = threading.Event()
        try:
            with closing(self._connect(parts)) as connection:
                # A socket's timeout starts anew with every byte; the download as a whole ends here.
                watch = threading.Timer(self._left_s(), _hang_up, (connection.sock, expired))
                watch.start()
                try:
                    if isinstance(connection.sock, ssl.SSLSocket):
                        connection.sock.do_handshake()
                    return self._exchange(connection, parts)
                finally:
                    watch.cancel()
        except (OSError, http.client.HTTPException) as error:
            self._policy.check_time()
            if expired.is_set() or isinstance(error, TimeoutError):
                raise BadValue(f"{short(url)} took longer than {self._policy.timeout_s:g} s") from None
            raise BadValue(f"{short(url)} can't be fetched: {one_line(error)}") from None

    def _left_s(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        """A connection whose socket is open: to an address that the policy allows, or through the user's proxy."""
        host, port = str(parts.hostname), parts.port or _DEFAULT_PORTS[parts.scheme]
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        proxy = getproxies().get(parts.scheme) if self._policy.private_hosts and not proxy_bypass(host) else None
        if proxy is not None:
            return _connect_by_proxy(proxy, host, port, tls, self._left_s())
        connection = http.client.HTTPConnection(host, port)
        opened = self._open_socket(self._checked_addresses(host, port), port)
        if tls is not None:
            opened = tls.wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
        connection.sock = opened
        return connection

    def _checked_addresses(self, host: str, port: int) -> Sequence[str]:
        try:
            addresses = self._policy.resolver(host, port)
        except UnicodeError:
            raise BadValue(f"{short(host)} is not a host name") from None
        if not addresses:
            raise BadValue(f"{short(host)} has no address")
        allowed = {host.lower(), f"{host.lower()}:{port}"} & self._policy.allowed_hosts
        if self._policy.private_hosts or allowed:
            return addresses
        for address in addresses:
            if not _is_public(ipaddress.ip_address(address)):
                raise BadValue(f"{short(host)} is a private address, and media may not come from there")
        return addresses

    def _open_socket(self, addresses: Sequence[str], port: int) -> socket.socket:
        """A connection to the first address that answers."""
        *others, last = addresses
        for address in others:
            try:
                return socket.create_connection((address, port), self._left_s())
            except OSError:
                if time.monotonic() >= self._deadline:
                    raise
        return socket.create_connection((last, port), self._left_s())

    def _exchange(self, connection: http.client.HTTPConnection, parts: SplitResult) -> bytes | str:
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
                raise BadValue(f"{short(url)} redirects without saying where to")
            return urljoin(url, location)
        if response.status != 200:
            raise BadValue(f"{short(url)} answered {response.status} {response.reason}")
        return self._read_body(response, url)

    def _read_body(self, response: http.client.HTTPResponse, url: str) -> bytes:
        self._policy.check_bytes(response.length or 0, short(url))
        body = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            body += chunk
            self._policy.check_bytes(len(body), short(url))
        if response.length:
            raise http.client.IncompleteRead(bytes(body), response.length)
        return bytes(body)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").encode("idna").decode()
    except ValueError as error:
        raise BadValue(f"{short(url)} is not a URL: {error}") from None
    if parts.scheme not in _REMOTE:
        raise BadValue(f"{short(url)}: a redirect to the scheme {parts.scheme!r}, expected http or https")
    if not host:
        raise BadValue(f"{short(url)} names no host")
    if parts.username is not None or parts.password is not None:
        raise BadValue(f"the URL of {host} holds a user name; credentials in a URL are not sent, leave them out")
    location = f"[{host}]" if ":" in host else host
    return parts._replace(netloc=location if port is None else f"{location}:{port}")


def _connect_by_proxy(
    proxy: str, host: str, port: int, tls: ssl.SSLContext | None, timeout_s: float
) -> http.client.HTTPConnection:
    address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if address.scheme != "http" or address.hostname is None:
        raise BadValue(f"the environment names the proxy {proxy!r}, expected http://HOST:PORT")
    if tls is None:
        connection = http.client.HTTPConnection(address.hostname, address.port or 80, timeout=timeout_s)
    else:
        connection = http.client.HTTPSConnection(address.hostname, address.port or 80, timeout=timeout_s, context=tls)
        connection.set_tunnel(host, port)
    connection.connect()
    return connection


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


def _hang_up(connected: socket.socket, expired: threading.Event) -> None:
    expired.set()
    # The plain socket's own method: that of a TLS socket would also drop its state, which the reader still uses.
    socket.socket.shutdown(connected, socket.SHUT_RDWR)


def short(source: object) -> str:
    """A path or URI for an error, quoted; a long one without its middle, so that a file keeps its name."""
    text = str(source)
    return repr(text if len(text) <= 80 else f"{text[:35]}...{text[-42:]}")

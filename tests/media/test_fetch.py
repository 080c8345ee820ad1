"""Paths, URIs and URLs to bytes, against servers of this machine: limits, redirects, private hosts."""

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.media.fetch import fetch
from g3n_mlx.media.policy import MediaPolicy

ANY = MediaPolicy(timeout_s=20)
BODY = bytes(range(256)) * 40


class Answers(BaseHTTPRequestHandler):
    """What the server says to each path."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        name, _, argument = self.path.lstrip("/").partition("/")
        getattr(self, f"answer_{name}", self.answer_missing)(argument)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def answer_body(self, _: str) -> None:
        self.head(200, Content_Length=len(BODY))
        self.wfile.write(BODY)

    def answer_endless(self, _: str) -> None:
        self.head(200)
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
        except OSError:
            pass

    def answer_huge(self, _: str) -> None:
        self.head(200, Content_Length=10**12)

    def answer_short(self, _: str) -> None:
        self.head(200, Content_Length=len(BODY) + 1)
        self.wfile.write(BODY)

    def answer_drip(self, _: str) -> None:
        self.head(200, Content_Length=10_000)
        try:
            while not self.server.over.wait(0.05):
                self.wfile.write(b"x")
        except OSError:
            pass

    def answer_silent(self, _: str) -> None:
        self.server.over.wait(30)

    def answer_chain(self, count: str) -> None:
        self.head(302, Location=f"/chain/{int(count) - 1}" if int(count) > 1 else "/body")

    def answer_loop(self, _: str) -> None:
        self.head(301, Location="/loop")

    def answer_to(self, target: str) -> None:
        self.head(307, Location=target)

    def answer_nowhere(self, _: str) -> None:
        self.head(302)

    def answer_missing(self, _: str) -> None:
        self.head(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.asked, server.over = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def refused(source: str | Path, policy: MediaPolicy = ANY) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller reads the message
        fetch(source, policy)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Downloads.


def test_a_url(url, server):
    assert fetch(f"{url}/body", ANY) == BODY
    assert fetch(f"{url}/body/ä b?c=ü", ANY) == BODY
    assert [path for path, _ in server.asked] == ["/body", "/body/%C3%A4%20b?c=%C3%BC"]
    headers = server.asked[0][1]
    assert headers["Host"] == url.removeprefix("http://")
    assert headers["Accept-Encoding"] == "identity"
    assert "Authorization" not in headers


def test_redirects(url):
    assert fetch(f"{url}/chain/5", ANY) == BODY
    assert refused(f"{url}/chain/6").endswith("more than 5 redirects")
    assert refused(f"{url}/loop").endswith("more than 5 redirects")
    assert fetch(f"{url}/chain/2", MediaPolicy(max_redirects=2)) == BODY
    assert "redirects without saying where to" in refused(f"{url}/nowhere")


def test_a_redirect_stays_in_the_web(url, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    for target in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/a", "data:,secret"):
        assert "a redirect to the scheme" in refused(f"{url}/to/{target}")


def test_answers_that_are_no_file(url):
    assert "answered 404" in refused(f"{url}/missing")
    assert "can't be fetched" in refused(f"{url}/short")


def test_the_size_limit(url):
    policy = MediaPolicy(max_bytes=len(BODY) - 1, timeout_s=20)
    for path in ("body", "endless", "huge"):
        assert refused(f"{url}/{path}", policy).endswith("more than 10,239 bytes, the most that is accepted")
    assert fetch(f"{url}/body", MediaPolicy(max_bytes=len(BODY))) == BODY


def test_the_time_limit(url):
    """Of the whole download: each byte of a slow one comes in time."""
    for path in ("drip", "silent"):
        assert refused(f"{url}/{path}", MediaPolicy(timeout_s=0.4)).endswith("took longer than 0.4 s")
        with pytest.raises(TimeoutError, match="the time for opening media is over"):
            fetch(f"{url}/{path}", MediaPolicy(timeout_s=60, deadline=time.monotonic() + 0.4))


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert refused(f"http://127.0.0.1:{port}/a.png").endswith("/a.png' can't be fetched: connection refused")
    assert "can't be fetched" in refused("http://no-such-host.invalid/a.png")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://", "names no host"),
        ("http://127.0.0.1:99999/a", "is not a URL"),
        ("http://[::1/a", "is not a URL"),
        ("http://user:secret@127.0.0.1/a", "the URL of 127.0.0.1 holds a user name"),
        ("ftp://example.org/a.png", "has the scheme 'ftp', expected http, https, data, file or a path"),
        ("gopher://example.org/", "has the scheme 'gopher'"),
    ],
)
def test_urls_that_are_none(url, expected):
    message = refused(url)
    assert expected in message
    assert "secret" not in message


# Private hosts.


def resolver(*addresses: str) -> Callable[[str, int], list[str]]:
    return lambda _host, _port: list(addresses)


PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "::1", "fec0::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_hosts_are_refused(address):
    policy = MediaPolicy(private_hosts=False, resolver=resolver(address))
    for scheme in ("http", "https"):
        assert refused(f"{scheme}://pictures.example/a.png", policy).endswith(
            "is a private address, and media may not come from there"
        )


def test_one_private_address_among_public_ones_is_enough():
    policy = MediaPolicy(private_hosts=False, resolver=resolver("93.184.216.34", "127.0.0.1"))
    assert "private address" in refused("http://pictures.example/a.png", policy)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "2130706433", "0x7f.1", "localhost", "localhost."])
def test_other_spellings_of_this_machine(host, server):
    policy = MediaPolicy(private_hosts=False, timeout_s=20)
    message = refused(f"http://{host}:{server.server_address[1]}/body", policy)
    assert "private address" in message or "can't be fetched" in message
    assert not server.asked


def test_allowed_hosts(url, server):
    port = server.server_address[1]
    for allowed in ("127.0.0.1", f"127.0.0.1:{port}"):
        policy = MediaPolicy(private_hosts=False, allowed_hosts=frozenset([allowed]))
        assert fetch(f"{url}/body", policy) == BODY
    policy = MediaPolicy(private_hosts=False, allowed_hosts=frozenset([f"127.0.0.1:{port + 1}"]))
    assert "private address" in refused(f"{url}/body", policy)


def test_a_redirect_to_a_private_host_is_refused(url, server):
    port = server.server_address[1]
    policy = MediaPolicy(
        private_hosts=False,
        allowed_hosts=frozenset([f"pictures.example:{port}"]),
        resolver=resolver("127.0.0.1"),
    )
    assert fetch(f"http://pictures.example:{port}/body", policy) == BODY
    assert "private address" in refused(f"http://pictures.example:{port}/to/{url}/body", policy)
    assert [path for path, _ in server.asked] == ["/body", f"/to/{url}/body"]


def test_the_name_is_resolved_once(server):
    """A name that answers with another address the second time gains nothing: the checked one is used."""
    asked = []

    def once(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    port = server.server_address[1]
    policy = MediaPolicy(private_hosts=False, allowed_hosts=frozenset(["rebound.example"]), resolver=once)
    assert fetch(f"http://rebound.example:{port}/body", policy) == BODY
    assert asked == ["rebound.example"]
    assert server.asked[0][1]["Host"] == f"rebound.example:{port}"


def test_the_proxy_of_the_environment_is_for_a_user_alone(server, url, monkeypatch):
    monkeypatch.setenv("http_proxy", url)
    assert "answered 404" in refused("http://pictures.example/a.png")
    assert server.asked[0][0] == "http://pictures.example/a.png"
    policy = MediaPolicy(private_hosts=False, resolver=resolver("10.0.0.1"))
    assert "private address" in refused("http://pictures.example/a.png", policy)
    assert len(server.asked) == 1


# Files.


def test_paths(tmp_path, monkeypatch):
    path = tmp_path / "a b:c%20ä.bin"
    path.write_bytes(BODY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (path, str(path), path.name, path.as_uri(), f"~/{path.name}", Path("~") / path.name):
        assert fetch(source, ANY) == BODY, source


def test_paths_that_are_no_file(tmp_path):
    assert refused(tmp_path / "missing").endswith("does not exist")
    assert refused(tmp_path).endswith("is not a regular file")
    assert "null character" in refused("a\0b.png")
    assert refused("") == "the path is empty"
    assert "can't be read" in refused("a" * 5000)
    assert "names the host 'server'" in refused("file://server/a.png")
    if Path("/dev/zero").exists():
        assert refused("/dev/zero").endswith("is not a regular file")


def test_the_size_limit_of_files(tmp_path):
    (tmp_path / "a").write_bytes(BODY)
    assert "more than 9 bytes" in refused(tmp_path / "a", MediaPolicy(max_bytes=9))


def test_no_paths():
    for source in ("/etc/passwd", Path("/etc/passwd"), "file:///etc/passwd", "a.png"):
        assert refused(source, MediaPolicy(paths=None)).startswith("local files are not allowed here")


def test_paths_below_a_folder(tmp_path):
    media, outside = tmp_path / "media", tmp_path / "secret"
    media.mkdir()
    (media / "a.png").write_bytes(BODY)
    outside.write_bytes(b"secret")
    (media / "link.png").symlink_to(outside)
    (media / "inside.png").symlink_to(media / "a.png")
    policy = MediaPolicy(paths=media)
    for source in ("a.png", str(media / "a.png"), (media / "a.png").as_uri(), "inside.png"):
        assert fetch(source, policy) == BODY
    for source in ("../secret", str(outside), outside.as_uri(), "link.png", f"{media}/../secret", "~/a.png"):
        message = refused(source, policy)
        assert "does not lie below the folder" in message or "does not exist" in message


# Data URIs and base64.


def test_data_uris():
    text = base64.b64encode(BODY).decode()
    for uri in (f"data:image/png;base64,{text}", f"data:;base64,{text}", f"DATA:a/b;x=y;BASE64,{text}"):
        assert fetch(uri, ANY) == BODY
    for written in ("AP8%3D", "AP8=", "AP8"):
        assert fetch(f"data:image/png;base64,{written}", ANY) == b"\0\xff"
    assert fetch("data:;base64,_-8", ANY) == fetch("data:;base64,/+8=", ANY) == b"\xff\xef"
    assert fetch("data:text/plain,a%20b", ANY) == b"a b"
    assert fetch(f"data:a/b;base64,{text[:76]}\r\n{text[76:]}", ANY) == BODY


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,AP8AA", "is not base64"),
        ("data:image/png;base64,A P8=", "is not base64"),
        ("data:image/png;base64,AP8=AP8=", "is not base64"),
        ("data:image/png;base64,ÄP8=", "is not base64"),
        ("data:image/png,%zz", "neither base64 nor percent-encoded"),
        ("data:image/png,ä", "neither base64 nor percent-encoded"),
    ],
)
def test_data_uris_that_are_none(uri, expected):
    assert expected in refused(uri)


def test_the_size_limit_of_data_uris():
    policy = MediaPolicy(max_bytes=9)
    for uri in ("data:;base64," + base64.b64encode(bytes(10)).decode(), "data:," + "a" * 10):
        assert "more than 9 bytes" in refused(uri, policy)
    assert fetch("data:;base64," + base64.b64encode(bytes(9)).decode(), policy) == bytes(9)


def test_a_long_path_keeps_its_file_name_in_errors():
    message = refused("/nowhere/" + "a/" * 100 + "cat.png", ANY)
    assert message.startswith("'/nowhere/a/")
    assert message.endswith("/a/cat.png' does not exist")
    assert len(message) < 110


@settings(deadline=None)
@given(st.binary())
def test_base64_of_any_bytes(data):
    assert fetch("data:;base64," + base64.b64encode(data).decode(), ANY) == data


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_bytes_or_one_error(text):
    with expected_error():
        assert isinstance(
            fetch(text, MediaPolicy(paths=None, private_hosts=False, resolver=resolver("10.0.0.1"))), bytes
        )


@contextmanager
def expected_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either way is right


def test_all_addresses_of_a_host_share_one_time_limit(monkeypatch):
    now, tried = [0.0], []

    def silent(address, timeout_s):
        tried.append(address)
        now[0] += timeout_s
        raise TimeoutError("timed out")

    monkeypatch.setattr("g3n_mlx.media.download.time.monotonic", lambda: now[0])
    monkeypatch.setattr("g3n_mlx.media.download.socket.create_connection", silent)
    policy = MediaPolicy(resolver=lambda host, port: [f"8.8.8.{last}" for last in range(200)], timeout_s=5.0)
    with pytest.raises(ValueError, match="took longer than 5 s"):
        fetch("http://many.example/picture.png", policy)
    assert len(tried) == 1
    assert now[0] <= 5.5

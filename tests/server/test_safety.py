"""Who may call, and what comes back when something is wrong."""

import json

import openai
import pytest

from g3n_mlx.installation import install_command
from g3n_mlx.server.errors import ApiError

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def status(http, headers=None, path="/v1/models"):
    return http.get(path, headers=headers or {}).status_code


def test_hosts(serve):
    """A name that somebody points at 127.0.0.1 is not ours."""
    with serve(hosts=frozenset(["gemma.lan"])).http() as http:
        for host in (
            "localhost",
            "localhost:80",
            "127.0.0.1:8080",
            "[::1]:8080",
            "192.168.1.5",
            "gemma.lan:8080",
            "GEMMA.LAN",
        ):
            assert status(http, {"Host": host}) == 200, host
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8080", "a@127.0.0.1", "", "["):
            answer = http.get("/v1/models", headers={"Host": host})
            assert answer.status_code == 403, host
            assert answer.json()["error"]["code"] == "host_not_allowed"


def test_pages_of_other_origins(server, serve):
    with server.http() as http:
        own = {"Origin": server.url}
        assert http.post("/v1/chat/completions", json=CHAT, headers=own).status_code == 200
        for origin in ("https://evil.example", "null", f"http://127.0.0.1:{server.port + 1}"):
            refused = http.post("/v1/chat/completions", json=CHAT, headers={"Origin": origin})
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "origin_not_allowed"
            assert "access-control-allow-origin" not in refused.headers
        asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        assert http.options("/v1/chat/completions", headers=asked).status_code == 403
    with serve(cors_origins=frozenset(["https://friend.example"]), api_key="k").http() as http:
        friend = {"Origin": "https://friend.example"}
        asked = {**friend, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = http.options("/v1/chat/completions", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
        assert allowed.headers["access-control-allow-headers"] == "authorization"
        assert allowed.headers["access-control-allow-methods"] == "GET, HEAD, POST"
        refused = http.get("/v1/models", headers=friend)  # without the key, but with an answer that the page can read
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://friend.example"
        assert status(http, {"Origin": "https://evil.example", "Authorization": "Bearer k"}) == 403
        assert http.options("/v1/models", headers={**asked, "Origin": "https://evil.example"}).status_code == 403
    with serve(cors_origins=frozenset(["*"])).http() as http:
        anyone = http.get("/v1/models", headers={"Origin": "https://anyone.example"})
        assert anyone.status_code == 200
        assert anyone.headers["access-control-allow-origin"] == "*"


def test_the_key(serve):
    server = serve(api_key="s3cret-ü")
    with server.http() as http:
        assert status(http, path="/health") == 200
        for header in ("", "Bearer", "Bearer s3cret", "Basic s3cret-ü", "s3cret-ü", "Bearer S3CRET-ü"):
            answer = http.get("/v1/models", headers={"Authorization": header.encode()})
            assert answer.status_code == 401, header
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/openapi.json", "/v1/nothing"):
            assert status(http, path=path) == 401
    with pytest.raises(openai.AuthenticationError) as refused:
        server.openai(api_key="wrong").models.list()
    assert refused.value.type == "authentication_error"
    assert refused.value.code == "invalid_api_key"


def test_a_key_that_is_right(serve):
    assert serve(api_key="s3cret").openai(api_key="s3cret").models.list().data


def test_a_body_that_is_too_long(serve):
    with serve(max_body_bytes=1 << 20).http() as http:
        long = json.dumps({"messages": [{"role": "user", "content": "a" * (1 << 20)}]}).encode()
        said = http.post("/v1/chat/completions", content=long)
        unsaid = http.post("/v1/chat/completions", content=(long[i : i + 65536] for i in range(0, len(long), 65536)))
        form = http.post("/v1/audio/transcriptions", files={"file": bytes(1 << 20)})
        for answer in (said, unsaid, form):
            assert answer.status_code == 413
            assert "1 MiB" in answer.json()["error"]["message"]
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "content", "expected"),
    [
        ("GET", "/nothing", None, 404),
        ("GET", "/v1/chat/completions", None, 405),
        ("POST", "/v1/models", b"{}", 405),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b"null", 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
        ("POST", "/v1/chat/completions", b'{"messages": ' + b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        ("POST", "/v1/chat/completions", b'{"messages": [{"role": "\\ud800", "content": "a"}]}', 400),
        ("POST", "/v1/chat/completions", b'{"\\ud800": 1, "logit_bias": {"\\ud800": 1}}', 400),
        ("POST", "/v1/chat/completions", b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', 404),
        ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
        ("POST", "/v1/audio/transcriptions", b"{}", 400),
        ("GET", "/v1/models/%00", None, 404),
    ],
)
def test_errors_have_openais_shape(server, method, path, content, expected):
    with server.http() as http:
        answer = http.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == expected
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("not_found_error" if expected == 404 else "invalid_request_error")


def test_deep_things_that_are_ignored_do_no_harm(server):
    deep = "null"
    for _ in range(500):
        deep = f'{{"a": [{deep}]}}'
    part = f'{{"type": "text", "text": "a", "x": {deep}}}'
    body = f'{{"max_tokens": 1, "x": {deep}, "messages": [{{"role": "user", "content": [{part}], "y": {deep}}}]}}'
    with server.http() as http:
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400)


def test_advice_to_install_something_stays_with_the_server():
    """It names the folder that the server was installed from."""
    advice = install_command("heif")
    body = ApiError(400, f"messages[0].content[1]: the image is HEIC, which needs pillow-heif: {advice}").body()
    assert body["error"]["message"] == (
        "messages[0].content[1]: the image is HEIC, which needs pillow-heif: this server does not have it"
    )

"""`--upload-repo`: what is checked first, and what reaches the hub, which is a small real server on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.convert import convert
from g3n_mlx.convert.__main__ import main
from g3n_mlx.convert.upload import upload

STALE = ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "adapters.safetensors", "README.md"]
TOKENS: dict[str | None, dict[str, Any]] = {
    "Bearer writes": {"role": "write"},
    "Bearer reads": {"role": "read"},
    "Bearer fine": {"role": "fineGrained"},
}


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that an upload uses, and what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.stored: dict[str, bytes] = {}  # large files, by their sha256
        self.files: dict[str, bytes] = {name: b"stale" for name in STALE}
        self.refuses = ""  # a part of a path


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            token = TOKENS.get(self.headers["Authorization"])
            if token is None:
                return self.answer({"error": "Invalid username or password."}, 401)
            return self.answer({"name": "me", "orgs": [{"name": "ours"}], "auth": {"accessToken": token}})
        if self.server.refuses == "/repos/create" and "/tree/" not in self.path:
            return self.answer({"error": "Repository not found"}, 404)
        files = [{"type": "file", "path": path, "size": 5, "oid": "0"} for path in self.server.files]
        return self.answer(files if "/tree/" in self.path else {"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[hashlib.sha256(data).hexdigest()] = data
        self.answer({}, 403 if self.server.refuses == "storage" else 200)

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if hub.refuses and hub.refuses in self.path:
            return self.answer({"error": "You don't have the rights"}, 403)
        match self.path.partition("?")[0]:
            case "/api/repos/create":
                hub.created.append(json.loads(body))
                return self.answer({"url": f"{hub.url}/me/model"})
            case "/api/validate-yaml":
                return self.answer({})
            case "/api/models/me/model/preupload/main":
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if "safetensors" in file["path"] else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self.answer({"files": modes})
            case "/me/model.git/info/lfs/objects/batch":
                upload = {"href": f"{hub.url}/storage"}
                objects = [{**wanted, "actions": {"upload": upload}} for wanted in json.loads(body)["objects"]]
                return self.answer({"transfer": "basic", "objects": objects})
            case "/api/models/me/model/commit/main":
                for line in body.splitlines():
                    self.commit(**json.loads(line))
                return self.answer({"commitUrl": f"{hub.url}/me/model/commit/1", "commitOid": "1" * 40})
        return self.answer({"error": self.path}, 404)

    def commit(self, key: str, value: dict[str, Any]) -> None:
        files = self.server.files
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.server.stored[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]

    def answer(self, body: object, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        self.server.asked.append(self.path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # its storage is another service
    monkeypatch.setenv("HF_TOKEN", "writes")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def command(source: Path, output: Path, *flags: str) -> int:
    return main(["--model", str(source), "-o", str(output), *flags])


def test_what_is_on_disk_is_uploaded(hub, tiny_folder, tmp_path, capsys):
    assert command(tiny_folder, tmp_path / "out", "-q", "--upload-repo", "me/model") == 0
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "model")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == written | {"adapters.safetensors": b"stale"}  # the earlier shards and their index are gone
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("wrote ")]
    assert told[-1] == f"uploaded to {hub.url}/me/model"


@pytest.mark.parametrize("refuses", ["/repos/create", "storage", "/commit/"])
def test_a_failed_upload_loses_nothing(refuses, hub, tiny_folder, tmp_path, capsys):
    hub.refuses = refuses
    assert command(tiny_folder, tmp_path / "out", "--upload-repo", "me/model") == 1
    out, line = tmp_path / "out", capsys.readouterr().err.splitlines()[-1]
    how = "broke off" if refuses == "storage" else "was refused"
    assert line.startswith(f"g3n-convert: the upload to me/model {how} (")
    assert line.endswith(f"{out} is whole, and `hf upload me/model {out} --delete 'model*.safetensors*'` goes on")
    Checkpoint.open(out).close()
    assert set(hub.files) == set(STALE)

    hub.refuses = ""  # later, from Python
    assert upload(out, "me/model") == f"{hub.url}/me/model"
    assert hub.files["config.json"] == (out / "config.json").read_bytes()


def test_the_hub_can_be_gone_by_then(hub, tiny_folder, tmp_path, monkeypatch):
    out = convert(tiny_folder, tmp_path / "out", progress=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"the upload to me/model broke off .*hf upload me/model"):
        upload(out, "me/model")


@pytest.mark.parametrize(
    ("repo", "token", "told"),
    [
        ("me/a/b", "writes", "'me/a/b' can't be the name of a repository"),
        ("me/a b", "writes", "'me/a b' can't be the name of a repository"),
        ("model", "writes", "the repository is 'model', expected OWNER/NAME"),
        ("me/model", "", "an upload to me/model needs a token that may write: `hf auth login`"),
        ("me/model", "unknown", "the hub does not know this token"),
        ("me/model", "reads", "this machine's token may only read"),
        ("google/model", "writes", "me can't write to google/model: the owner can be me, ours"),
    ],
)
def test_what_can_not_be_uploaded_is_not_converted(repo, token, told, hub, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    assert command(tiny_folder, tmp_path / "out", "--upload-repo", repo) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"g3n-convert: {told}")
    assert not (tmp_path / "out").exists()


def test_no_hub_is_said_first(hub, tiny_folder, tmp_path, monkeypatch, capsys):
    for setting, value in {"ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{setting}", value)
        assert command(tiny_folder, tmp_path / "out", "--upload-repo", "me/model") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "hf upload REPOSITORY FOLDER" in line
        assert not (tmp_path / "out").exists()


def test_organizations_and_fine_tokens(hub, tiny_folder, tmp_path, monkeypatch):
    from g3n_mlx.convert.upload import check_upload

    check_upload("ours/model")
    monkeypatch.setenv("HF_TOKEN", "fine")
    check_upload("unseen/model")


def test_wrong_usage(capsys):
    with pytest.raises(SystemExit):
        main(["--list-slices", "--upload-repo", "me/model"])
    assert "--list-slices converts nothing: leave out --upload-repo" in capsys.readouterr().err

"""Folders, hub ids and the default model; the hub is a small real server on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from g3n_mlx.checkpoint import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = Path(__file__).parent.parent / "tiny-gemma3n"
FILES = {
    "config.json": b'{"model_type": "gemma3n"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "matformer.csv": b"a table of slices",
    "README.md": b"words",
}


def uqff_shard(*names: str) -> bytes:
    """A safetensors file of empty tensors."""
    header = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    return len(header).to_bytes(8, "little") + header


NEW = uqff_shard("uqff.version.major")
SHARED = {
    "config.json": (TINY / "config.json").read_bytes(),
    "tokenizer.json": b"{}",
    "residual.safetensors": b"the rest",
}
# Of these; of all others FILES.
OTHERS = {
    "owner/real": {name: (TINY / name).read_bytes() for name in ("config.json", "tokenizer.json", "model.safetensors")},
    "owner/several-uqff": SHARED | dict.fromkeys(["afq4-0.uqff", "q4k-0.uqff", "q4k-1.uqff", "q-8.uqff"], NEW),
    "owner/single-uqff": SHARED | dict.fromkeys(["q4k-0.uqff", "q4k-1.uqff"], NEW),
    "owner/gguf": {
        "config.json": b'{"model_type": "gemma3n"}',
        "tiny-Q4_0.gguf": b"few bits",
        "tiny-Q8_0.gguf": b"more",
    }
    | {"mmproj-F16.gguf": b"towers"},
    "owner/old-uqff": SHARED | {"it-q4k-0.uqff": uqff_shard("0")},
}
# What the hub answers for repositories it does not give away: status and X-Error-Code.
REFUSALS = {"owner/gated": (403, "GatedRepo"), "owner/absent": (401, "RepoNotFound"), "owner/down": (500, "")}


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download uses."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        for repository, (status, code) in REFUSALS.items():
            if repository in path:
                return self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"})
        if path.endswith("/revision/v9"):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = next((files for hub_id, files in OTHERS.items() if f"{hub_id}/" in path), FILES)
        if "/revision/" in path:
            return self.answer(200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": []}).encode())
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{name}-oid"} for name, data in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        if path.rpartition("/")[2] not in files:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        data = files[path.rpartition("/")[2]]
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            return self.answer(206, data[int(part[1]) : int(part[2]) + 1])
        if "owner/short" in path and self.command == "GET" and path.endswith(".safetensors"):
            self.close_connection = True
            return self.answer(200, data[:3], {"Content-Length": str(len(data))})
        return self.answer(200, data, {"ETag": f'"{path.rpartition("/")[2]}-oid"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def resolve_in_child(
    home: Path, hub_id: str, revision: str | None = None, weights: bool = True, **environment: str
) -> str:
    """What resolve() returns or raises."""
    return in_child(home, f"hub.resolve({hub_id!r}, {revision!r}, weights={weights})", **environment)


def in_child(home: Path, expression: str, **environment: str) -> str:
    """What an expression returns or raises in a fresh process: the hub client reads its environment when imported."""
    code = f"""
from g3n_mlx import Error, sizing
from g3n_mlx.checkpoint import hub
from g3n_mlx.checkpoint.outline import Outline
sizing.SMALL_BYTES = 0
try:
    print({expression})
except Error as error:
    builtin = type(error).__bases__[-1]
    print(builtin.__name__ + ": " + str(error))
"""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    return done.stdout.strip()


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert hub.resolve("~") == tmp_path
    with pytest.raises(ValueError, match="only a hub id has revisions"):
        hub.resolve(tmp_path, "v1")


def test_a_slash_at_the_end_is_left_out(endpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("demo/") == hub.resolve("demo") == hub.demo_folder()
    found = resolve_in_child(tmp_path, "owner/model/", HF_ENDPOINT=endpoint)
    assert found == resolve_in_child(tmp_path, "owner/model", HF_ENDPOINT=endpoint)


def test_a_config_alone_in_the_cache_is_no_model(endpoint, tmp_path):
    assert resolve_in_child(tmp_path, "owner/model", weights=False, HF_ENDPOINT=endpoint).endswith(COMMIT)
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        told = resolve_in_child(tmp_path, "owner/model", **environment)
        assert told.startswith("ConnectionError: ")
        assert "is not in the cache" in told or "holds owner/model without its weights" in told
        assert "go online once" in told
        # The config may still be read.
        assert resolve_in_child(tmp_path, "owner/model", weights=False, **environment).endswith(COMMIT)
    assert resolve_in_child(tmp_path, "owner/model", HF_ENDPOINT=endpoint).endswith(COMMIT)
    assert resolve_in_child(tmp_path, "owner/model", HF_HUB_OFFLINE="1").endswith(COMMIT)


def test_what_is_neither_folder_nor_hub_id(tmp_path):
    for name in ("/no/such/folder", "nothing", "a/b/c", "../x/y", str(tmp_path / "x")):
        with pytest.raises(FileNotFoundError, match=r"no model folder at .*no hub id either"):
            hub.resolve(name)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(NotADirectoryError, match=r"model\.gguf is a file; give the folder"):
        hub.resolve(tmp_path / "model.gguf")


def test_the_config_alone_can_be_asked_for(endpoint, tmp_path):
    folder = Path(resolve_in_child(tmp_path, "owner/model", weights=False, HF_ENDPOINT=endpoint))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "matformer.csv"]
    assert resolve_in_child(tmp_path, "owner/model", HF_ENDPOINT=endpoint) == str(folder)  # then the rest
    assert (folder / "model.safetensors").is_file()


def test_download_takes_the_needed_files_alone_and_once(endpoint, tmp_path):
    folder = Path(resolve_in_child(tmp_path, "owner/model", HF_ENDPOINT=endpoint))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "matformer.csv",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert resolve_in_child(tmp_path, "owner/model", HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1") == str(folder)
    assert resolve_in_child(tmp_path, "owner/model", COMMIT, HF_ENDPOINT=endpoint) == str(folder)


def test_of_a_uqff_repository_one_model_is_downloaded(endpoint, tmp_path):
    several = resolve_in_child(tmp_path, "owner/several-uqff", HF_ENDPOINT=endpoint)
    assert several == (
        "ValueError: owner/several-uqff holds 3 models of mistral.rs, afq4, q, q4k: name one by its file, as in "
        "owner/several-uqff/afq4-0.uqff"
    )
    assert in_child(tmp_path, "sizing.outline_of('owner/several-uqff', None)", HF_ENDPOINT=endpoint) == several
    snapshot = tmp_path / "hub" / "models--owner--several-uqff" / "snapshots" / COMMIT
    assert sorted(os.listdir(snapshot)) == ["config.json", "tokenizer.json"]
    line = resolve_in_child(tmp_path, "owner/several-uqff/q5k-0.uqff", HF_ENDPOINT=endpoint)
    assert line.startswith("FileNotFoundError: owner/several-uqff has no q5k-0.uqff, but afq4, q, q4k: name one")
    file = resolve_in_child(tmp_path, "owner/several-uqff/q4k-0.uqff", HF_ENDPOINT=endpoint)
    assert file == str(snapshot / "q4k-0.uqff")
    held = ["config.json", "q4k-0.uqff", "q4k-1.uqff", "residual.safetensors", "tokenizer.json"]
    assert sorted(os.listdir(snapshot)) == held
    assert resolve_in_child(tmp_path, "owner/several-uqff/q4k-0.uqff", HF_HUB_OFFLINE="1") == file
    config = resolve_in_child(tmp_path, "owner/several-uqff/afq4-0.uqff", weights=False, HF_ENDPOINT=endpoint)
    assert config == str(snapshot)
    assert sorted(os.listdir(snapshot)) == held


def test_the_only_model_of_a_uqff_repository_needs_no_name(endpoint, tmp_path):
    file = Path(resolve_in_child(tmp_path, "owner/single-uqff", HF_ENDPOINT=endpoint))
    assert file.name == "q4k-0.uqff"
    assert (file.parent / "residual.safetensors").read_bytes() == b"the rest"
    assert resolve_in_child(tmp_path, "owner/single-uqff", HF_HUB_OFFLINE="1") == str(file)
    line = resolve_in_child(tmp_path, "owner/model/q4k-0.uqff", HF_ENDPOINT=endpoint)
    assert line.startswith("FileNotFoundError: owner/model holds no *.uqff files")


def test_old_uqff_files_are_not_downloaded(endpoint, tmp_path):
    line = resolve_in_child(tmp_path, "owner/old-uqff", HF_ENDPOINT=endpoint)
    assert line.startswith("ValueError: owner/old-uqff/it-q4k-0.uqff is a UQFF file of before version 1.0")
    snapshot = tmp_path / "hub" / "models--owner--old-uqff" / "snapshots" / COMMIT
    assert sorted(os.listdir(snapshot)) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    ("hub_id", "revision", "expected"),
    [
        ("owner/gated", None, ["PermissionError", "https://huggingface.co/owner/gated", "hf auth login"]),
        ("owner/absent", None, ["FileNotFoundError", "no model 'owner/absent'"]),
        ("owner/model", "v9", ["FileNotFoundError", "has no revision 'v9'"]),
        ("owner/down", None, ["ConnectionError", "owner/down"]),
    ],
)
def test_refusals_say_what_to_do(endpoint, tmp_path, hub_id, revision, expected):
    line = resolve_in_child(tmp_path, hub_id, revision, HF_ENDPOINT=endpoint)
    for words in expected:
        assert words in line


def test_what_can_not_fit_is_refused_before_its_weights_are_downloaded(endpoint, tmp_path):
    unasked = "sizing.unasked('owner/real', {}, None, None, None, None)"
    told = in_child(tmp_path, unasked.format(1_000_000), HF_ENDPOINT=endpoint)
    assert told.startswith("ValueError: ")
    assert "whole at 4 bits needs" in told
    told = in_child(tmp_path, "sizing.fitting('owner/real', 1_000_000, None, None, None)", HF_ENDPOINT=endpoint)
    assert told.startswith("ValueError: no slice fits")
    assert "q_bits=8" in in_child(tmp_path, unasked.format(10**10), HF_ENDPOINT=endpoint)
    assert not list(tmp_path.rglob("*.safetensors"))

    # The headers say the same as the whole files, which need no hub once they are here.
    outline = in_child(tmp_path, "Outline.of_hub_id('owner/real')", HF_ENDPOINT=endpoint)
    assert in_child(tmp_path, "hub.is_absent('owner/real')") == "True"
    resolve_in_child(tmp_path, "owner/real", HF_ENDPOINT=endpoint)
    assert in_child(tmp_path, "hub.is_absent('owner/real')") == "False"
    assert in_child(tmp_path, "sizing.outline_of('owner/real', None)", HF_HUB_OFFLINE="1") == outline


def test_a_hub_that_does_not_answer_is_told_as_for_a_download(endpoint, tmp_path):
    for hub_id in ("owner/gated", "owner/absent", "owner/down"):
        told = in_child(tmp_path, f"sizing.outline_of({hub_id!r}, None)", HF_ENDPOINT=endpoint)
        assert told == resolve_in_child(tmp_path, hub_id, HF_ENDPOINT=endpoint)


def test_of_gguf_files_the_named_one_alone_is_downloaded(endpoint, tmp_path):
    def resolve_file(name, revision=None, **environment):
        environment = {"HF_ENDPOINT": endpoint, **environment}
        return in_child(tmp_path, f"hub.resolve_file({name!r}, {revision!r})", **environment)

    path = Path(resolve_file("owner/gguf/tiny-Q4_0.gguf"))
    assert path.read_bytes() == b"few bits"
    assert [other.name for other in path.parent.iterdir()] == ["tiny-Q4_0.gguf"]
    assert resolve_file("owner/gguf/tiny-Q4_0.gguf", HF_HUB_OFFLINE="1") == str(path)
    assert resolve_file("owner/gguf/tiny-Q4_0.gguf", COMMIT) == str(path)
    line = resolve_file("owner/gguf/tiny-Q5_0.gguf")
    assert line.startswith("FileNotFoundError: owner/gguf has no file tiny-Q5_0.gguf; its GGUF files: tiny-Q4_0.gguf, ")
    assert "no model 'owner/absent'" in resolve_file("owner/absent/tiny.gguf")
    assert "is not in the cache" in resolve_file("owner/gguf/tiny-Q8_0.gguf", HF_HUB_OFFLINE="1")


def test_a_repository_of_gguf_files_lists_them(endpoint, tmp_path):
    line = resolve_in_child(tmp_path, "owner/gguf", HF_ENDPOINT=endpoint)
    assert line == (
        "ValueError: owner/gguf holds GGUF files: name one of them, as in owner/gguf/tiny-Q4_0.gguf; "
        "there are tiny-Q4_0.gguf, tiny-Q8_0.gguf, mmproj-F16.gguf"
    )
    assert "holds owner/gguf without its weights" in resolve_in_child(tmp_path, "owner/gguf", HF_HUB_OFFLINE="1")


def test_a_file_here_is_itself(tmp_path):
    (tmp_path / "tiny.gguf").touch()
    assert hub.resolve_file(tmp_path / "tiny.gguf") == tmp_path / "tiny.gguf"
    assert hub.resolve_file("tiny.gguf") == Path("tiny.gguf")  # which is absent, and no file of the hub's
    with pytest.raises(ValueError, match="only the hub has revisions"):
        hub.resolve_file(tmp_path / "tiny.gguf", "v1")


def test_a_download_that_breaks_off_can_go_on(endpoint, tmp_path):
    line = resolve_in_child(tmp_path, "owner/short", HF_ENDPOINT=endpoint)
    assert line.startswith("ConnectionError: the download of owner/short broke off"), line


def test_offline_and_unreachable(tmp_path):
    line = resolve_in_child(tmp_path, "google/gemma-3n-E2B-it", HF_HUB_OFFLINE="1")
    assert line.startswith("ConnectionError: google/gemma-3n-E2B-it is not in the cache")
    assert "HF_HUB_OFFLINE is set" in line
    line = resolve_in_child(tmp_path, "google/gemma-3n-E2B-it", "v1", HF_ENDPOINT="http://127.0.0.1:9")
    assert "google/gemma-3n-E2B-it at revision 'v1' is not in the cache" in line
    assert "can't be reached" in line


def default_model_in_child(home: Path) -> tuple[str, str]:
    code = "from g3n_mlx.checkpoint import hub; print(*hub.default_model(), sep='\\n')"
    environment = {**os.environ, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache"), "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder, line = done.stdout.splitlines()
    return folder, line


def copy_of_another_model(tiny: Path, folder: Path) -> None:
    """The tiny files, but with a vocabulary file of its own."""
    shutil.copytree(tiny, folder)
    with (folder / "tokenizer.json").open("a") as stream:
        stream.write("\n")


@pytest.mark.skipif(sys.platform == "win32", reason="the cache folder is not set by HOME there")
def test_default_model(tiny_folder, tmp_path):
    folder, line = default_model_in_child(tmp_path)
    assert Path(folder) == hub.demo_folder()
    assert "a few skills only" in line
    assert "--model google/gemma-3n-E2B-it" in line

    snapshot = tmp_path / "hf" / "hub" / "models--owner--some--name" / "snapshots" / COMMIT
    copy_of_another_model(tiny_folder, snapshot)
    os.utime(snapshot / "config.json", (1_000, 1_000))
    assert default_model_in_child(tmp_path) == (
        str(snapshot),
        "no --model given: using the newest Gemma 3n on this machine, owner/some--name",
    )

    code = "from g3n_mlx.checkpoint import registry; print(registry.cache_folder())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    conversion = Path(done.stdout.strip()) / "conversions" / "tiny"
    copy_of_another_model(tiny_folder, conversion)
    os.utime(conversion / "config.json", (2_000, 2_000))
    assert default_model_in_child(tmp_path)[0] == str(conversion)

    shutil.copytree(conversion, conversion.parent / ".tiny.partial")
    assert default_model_in_child(tmp_path)[0] == str(conversion)
    for spoil in ("model.safetensors", "tokenizer.json", "config.json"):  # what is not whole is passed over
        kept = (conversion / spoil).read_bytes()
        (conversion / spoil).unlink()
        assert default_model_in_child(tmp_path)[0] == str(snapshot)
        (conversion / spoil).write_bytes(kept)
        os.utime(conversion / "config.json", (2_000, 2_000))
    (conversion / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    assert default_model_in_child(tmp_path)[0] == str(snapshot)
    (conversion / "model.safetensors.index.json").unlink()
    shutil.copyfile(hub.demo_folder() / "tokenizer.json", conversion / "tokenizer.json")
    assert default_model_in_child(tmp_path)[0] == str(snapshot)
    for config in ("{", '{"model_type": "llama"}'):
        (snapshot / "config.json").write_text(config)
        assert Path(default_model_in_child(tmp_path)[0]) == hub.demo_folder()


def test_the_demo_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("demo") == hub.demo_folder()
    (tmp_path / "demo").mkdir()
    assert hub.resolve("demo") == Path("demo")  # a folder of that name comes first

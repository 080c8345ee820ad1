"""The advice in error messages fits how the package came onto the machine."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from g3n_mlx.installation import install_command, version

EDITABLE = {"url": "file:///src/g3n-mlx", "dir_info": {"editable": True}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts the records of an installation before those of the real one."""

    def write(direct_url: dict | None, installer: str = "pip") -> None:
        folder = tmp_path / "g3n_mlx-9.8.7.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: g3n-mlx\nVersion: 9.8.7\n")
        (folder / "INSTALLER").write_text(f"{installer}\n")
        if direct_url is not None:
            (folder / "direct_url.json").write_text(json.dumps(direct_url))
        monkeypatch.syspath_prepend(tmp_path)

    return write


@pytest.mark.skipif(os.name == "nt", reason="paths and quotes of a POSIX shell")
@pytest.mark.parametrize(
    ("direct_url", "installer", "expected"),
    [
        (EDITABLE, "pip", "pip install -e '/src/g3n-mlx[server]'"),
        (EDITABLE, "uv", "uv pip install -e '/src/g3n-mlx[server]'"),
        ({"url": "file:///my%20src/g3n-mlx", "dir_info": {}}, "pip", "pip install '/my src/g3n-mlx[server]'"),
        (
            {"url": "file:///dist/g3n_mlx-9.8.7-py3-none-any.whl", "archive_info": {}},
            "pip",
            "pip install '/dist/g3n_mlx-9.8.7-py3-none-any.whl[server]'",
        ),
        (
            {"url": "https://a.example/g3n_mlx-9.8.7.tar.gz", "archive_info": {}},
            "pip",
            "pip install 'g3n-mlx[server] @ https://a.example/g3n_mlx-9.8.7.tar.gz'",
        ),
        (
            {"url": "https://a.example/g3n.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}},
            "pip",
            f"pip install 'g3n-mlx[server] @ git+https://a.example/g3n.git@{COMMIT}'",
        ),
        (
            {
                "url": "file:///src/g3n-mlx",
                "vcs_info": {"vcs": "git", "commit_id": COMMIT, "requested_revision": "main"},
            },
            "pip",
            "pip install 'g3n-mlx[server] @ git+file:///src/g3n-mlx@main'",
        ),
        (None, "pip", "pip install 'g3n-mlx[server]'"),  # from an index
    ],
)
def test_the_command_names_where_the_package_came_from(installed, direct_url, installer, expected):
    installed(direct_url, installer)
    assert install_command("server") == expected
    assert version() == "9.8.7"


@pytest.mark.skipif(os.name == "nt", reason="paths and quotes of a POSIX shell")
@pytest.mark.parametrize("built", [False, True])
def test_a_checkout_that_was_never_installed(repository, tmp_path, built):
    """A build leaves metadata beside the package, which is no installation."""
    if built:
        (tmp_path / "g3n_mlx.egg-info").mkdir()
        (tmp_path / "g3n_mlx.egg-info" / "PKG-INFO").write_text(
            "Metadata-Version: 2.1\nName: g3n-mlx\nVersion: 1.2.3\n"
        )
    paths = os.pathsep.join([str(tmp_path), str(repository)])
    code = "from g3n_mlx.installation import *; print(version(), install_command('heif'))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # without site-packages
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shlex.split(done.stdout) == ["unknown", "pip", "install", "-e", f"{repository}[heif]"]


def test_no_message_names_an_index_by_itself(repository):
    for folder in ("g3n_mlx", "convert"):
        for path in (repository / folder).rglob("*.py"):
            assert not re.search(r"pip install .*g3n-mlx\[", path.read_text("utf-8")), path

"""Commit messages are checked: while one is written, by the hook, and afterwards, in the history."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture(scope="module")
def script(repository):
    return repository / ".ci" / "check_commit.py"


@pytest.fixture(scope="module")
def checks(script):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("check_commit", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def git(tmp_path):
    """git("commit", ...): runs git in an empty repository that knows nothing of this machine's settings."""
    environment = {
        **os.environ,
        **{f"GIT_{role}_{part}": "somebody" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")},
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # set while a hook runs the tests
        environment.pop(name, None)

    def run(*arguments, cwd=tmp_path, program="git"):
        return subprocess.run([program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)

    run("init", "-q", "-b", "main")
    return run


def commit(git, message):
    done = git("commit", "-q", "--allow-empty", "-m", message)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "message",
    [
        "Read config.json in one place",
        "Embed the demo model",
        "Focus the prompt's field",
        'Pass "id: value" pairs through',
        "Add " + "y" * 68,
        'Revert "torch: pack"',
        "Read it\n\nTwo readers drifted apart.\n",
    ],
)
def test_good_messages(checks, message):
    assert checks.complaints(message, changed_lines=3) == []


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("Add " + "y" * 69, "73 characters"),
        ("Read config.json in one place.", "period"),
        ("read config.json in one place", "capital letter"),
        ("torch: pack the head in blocks", "area, 'torch'"),
        ("Server, chat: share the flags", "area, 'Server'"),
        ("Fixed the window", "'Fixed'"),
        ("Fixing the window", "'Fixing'"),
        ("Fixes the window", "'Fixes'"),
        ("Wrote a reader", "'Wrote'"),
        ("The window is right", "'The'"),
        ("Read it\nbecause", "blank line"),
        ("", "capital letter"),
    ],
)
def test_bad_messages(checks, message, complaint):
    (found,) = checks.complaints(message, changed_lines=3)
    assert complaint in found


def test_a_large_change_says_why(checks):
    lines = checks.LINES_WITHOUT_BODY
    assert checks.complaints("Read it", lines) == []
    assert checks.complaints("Read it\n\nBecause.", lines + 1) == []
    assert checks.complaints("Move what reads it into a folder", lines + 1) == []
    for message in ("Read it", "Read it\n\nSigned-off-by: A <a@b.example>"):
        (found,) = checks.complaints(message, lines + 1)
        assert found.startswith(f"{lines + 1} lines change")


def test_the_hook_sees_the_message_and_the_staged_lines(git, script, tmp_path):
    commit(git, "Begin")
    message = tmp_path / "message"

    def hook(text):
        message.write_text(text, "utf-8")
        return git(str(script), str(message), program=sys.executable)

    assert hook("Read it\n# Please enter the commit message").returncode == 0
    assert hook("Read it\n# ------------------------ >8 ------------------------\n+why").returncode == 0
    assert hook("fixup! torch: pack").returncode == 0
    refused = hook("torch: pack")
    assert refused.returncode == 1
    assert "area" in refused.stderr

    (tmp_path / "long.txt").write_text("line\n" * 100)
    git("add", "long.txt")
    assert "100 lines change" in hook("Read it\n\n# only a comment\n").stderr
    assert hook("Read it\n\nBecause.\n").returncode == 0


def test_the_history_is_checked_from_the_first_commit_of_the_rule(git, script, checks, tmp_path):
    def check(cwd=tmp_path):
        return git(str(script), cwd=cwd, program=sys.executable)

    commit(git, "older: no rule then")
    assert check().returncode == 0
    assert "does not hold the commit" in check().stdout

    commit(git, f"{checks.FIRST}\n\nThe rule begins here.")
    commit(git, "Read it")
    assert check().returncode == 0
    assert "1 checked, 0 to reword" in check().stdout

    commit(git, "newer: a riddle")
    done = check()
    assert done.returncode == 1
    assert "newer: a riddle" in done.stderr
    assert "older" not in done.stderr

    git("clone", "-q", "--depth", "1", tmp_path.as_uri(), "shallow")
    shallow = check(tmp_path / "shallow")
    assert shallow.returncode == 0
    assert "shallow clone" in shallow.stdout


def test_a_folder_without_history_is_not_checked(script, tmp_path):
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    environment.pop("GIT_DIR", None)
    for path in (environment["PATH"], ""):  # with git, and without
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env={**environment, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "no clone" in done.stdout

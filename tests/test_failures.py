"""What the commands share: failures in one line, sizes, and ends by signals, at any time."""

import ast
import builtins
import os
import signal
import tomllib

import pytest

import g3n_mlx
from g3n_mlx import __main__ as commands
from g3n_mlx import failures
from g3n_mlx.commands import PIPE_CLOSED, TERMINATED, run_command
from g3n_mlx.failures import one_line, size_in_words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0.0 KB"),
        (99_000, "99.0 KB"),
        (100_000, "0.10 MB"),
        (1_770_000, "1.77 MB"),
        (99_000_000, "99.0 MB"),
        (100_000_000, "0.10 GB"),
        (3_530_000_000, "3.53 GB"),
        (13_700_000_000, "13.7 GB"),
    ],
)
def test_sizes(num_bytes, words):
    assert size_in_words(num_bytes) == words


def test_errors_of_the_system_come_without_their_numbers(tmp_path):
    with pytest.raises(OSError, match="Errno") as caught:
        (tmp_path / "absent").read_text()
    assert one_line(caught.value) == f"{tmp_path / 'absent'}: no such file or directory"
    assert one_line(OSError(28, "No space left on device")) == "no space left on device"
    assert one_line(OSError("own words")) == "own words"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you\nat"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)"),
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"),
    ],
)
def test_out_of_memory_says_what_to_do(error, capsys):
    def fail() -> int:
        raise error

    assert run_command("g3n-x", fail) == 1
    written = capsys.readouterr().err
    assert written.startswith("g3n-x: out of memory")
    assert "needs less" in written
    assert written.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackError"
        "ImpactingInteractivity)",
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackError"
        "Timeout)",
        "[METAL] Command buffer execution failed: GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)",
    ],
)
def test_work_that_kept_the_gpu_too_long_says_what_to_do(words, capsys):
    def fail() -> int:
        raise RuntimeError(words)

    assert run_command("g3n-x", fail) == 1
    written = capsys.readouterr().err
    assert written.startswith("g3n-x: the system ended work on the GPU")
    assert "prefill_step_size" in written
    assert written.count("\n") == 1


def test_what_torch_says_when_memory_runs_out():
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert one_line(caught.value).startswith("out of memory (")


def test_a_bug_keeps_its_traceback():
    def fail() -> int:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError):
        run_command("g3n-x", fail)


@pytest.mark.skipif(os.name != "posix", reason="Windows ends a process without asking it")
def test_sigterm_lets_what_is_under_way_clean_up(capsys):
    cleaned = []
    before = signal.getsignal(signal.SIGTERM)

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)
        return 0

    assert run_command("g3n-x", work, stopped="stopped") == TERMINATED
    assert cleaned
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_while_a_command_is_imported(monkeypatch, repository):
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "import_module", interrupted)
    scripts = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts.pop("g3n") == "g3n_mlx.__main__:main"
    assert set(scripts) == {"g3n-chat", "g3n-convert", "g3n-bench", "g3n-eval", "g3n-server"}
    for place in scripts.values():
        module, _, function = place.partition(":")
        assert module == "g3n_mlx.__main__"
        assert getattr(commands, function)() == commands.INTERRUPTED
    for name in (*commands.COMMANDS, *commands.ALIASES):
        assert commands.main([name]) == commands.INTERRUPTED


def test_every_script_starts_its_command(monkeypatch, capsys):
    for name, start in (
        ("chat", commands.chat),
        ("convert", commands.convert),
        ("bench", commands.bench),
        ("eval", commands.evaluate),
        ("server", commands.server),
    ):
        monkeypatch.setattr("sys.argv", [f"g3n-{name}", "--help"])
        with pytest.raises(SystemExit):
            start()
        assert capsys.readouterr().out.startswith(f"usage: g3n-{name} ")


def test_codes_are_those_of_a_shell():
    assert (PIPE_CLOSED, TERMINATED) == (128 + 13, 128 + 15)


# The package's own errors.

# Raised as they are: what Python's protocols ask for, and the contract of an array's index.
PROTOCOL = {("__init__.py", "AttributeError"), ("checkpoint/source.py", "IndexError")}
# Signals inside the server, which answers them itself.
SIGNALS = {("server/errors.py", "ApiError"), ("server/scheduler.py", "Expired"), ("server/scheduler.py", "Ended")}


def is_builtin_error(node):
    called = node.func if isinstance(node, ast.Call) else node
    kind = getattr(builtins, called.id, None) if isinstance(called, ast.Name) else None
    return isinstance(kind, type) and issubclass(kind, Exception)


def test_whatever_the_package_raises_on_purpose_is_an_error_of_its_own(repository):
    """No module raises, or returns for others to raise, a builtin error, and only failures.py derives from one."""
    package, raised, derived = repository / "g3n_mlx", set(), set()
    for path in [*package.rglob("*.py"), *(repository / "convert").rglob("*.py")]:
        name = path.relative_to(package).as_posix() if path.is_relative_to(package) else path.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
            if is_builtin_error(value) and (isinstance(node, ast.Raise) or isinstance(value, ast.Call)):
                raised.add((name, getattr(value, "func", value).id))
            if isinstance(node, ast.ClassDef) and any(map(is_builtin_error, node.bases)):
                derived.add((name, node.name))
    assert raised == PROTOCOL
    own = {entry for entry in derived if entry[0] == "failures.py"}
    assert derived - own == SIGNALS
    assert {name for _, name in own} == {"Error", *(kind.__name__ for kind in KINDS)}


KINDS = [kind for kind in failures.Error.__subclasses__() if kind.__module__ == failures.__name__]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_the_builtin_one_of_its_kind_too(kind):
    """And reads as that one would."""
    own, builtin = kind.__bases__
    assert own is g3n_mlx.Error
    assert builtin in (ImportError, ValueError) or issubclass(builtin, OSError)
    assert failures.is_expected(kind("what to do"))
    assert one_line(kind("what to do")) == one_line(builtin("what to do")) == "what to do"


def test_errors_of_a_user_are_caught_as_one(tiny_folder):
    with pytest.raises(g3n_mlx.Error, match="temperature is -1"):
        g3n_mlx.SamplingParams(temperature=-1)
    with pytest.raises(g3n_mlx.Error, match="of type int, expected"):
        g3n_mlx.Image(5)
    with pytest.raises(g3n_mlx.Error, match="no model folder"):
        g3n_mlx.load(tiny_folder / "absent")
    with pytest.raises(g3n_mlx.Error, match="backend 'jax' does not exist"):
        g3n_mlx.load(tiny_folder, backend="jax")
    assert issubclass(g3n_mlx.PromptTooLong, g3n_mlx.Error)

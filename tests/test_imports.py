"""Importing is quick, and the core works where no array framework is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest

CORE = [
    "checkpoint.folder",
    "checkpoint.hub",
    "checkpoint.quantization",
    "config.model",
    "convert",
    "engine.conversation",
    "engine.sequence",
    "interface",
    "loading",
    "matformer.plan",
    "model",
    "prompt.prompt",
    "prompt.template",
    "prompt.tokenizer",
    "sampling",
    "bench.__main__",
    "bench.measure",
    "bench.worker",
    "bench.engines.llama_cpp",
    "chat.__main__",
]

HIDE = "import sys; sys.modules.update(dict.fromkeys(['mlx', 'mlx.core', 'torch', 'transformers']))\n"


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)


def test_no_array_framework_is_imported():
    code = "import sys, g3n_mlx; print([m for m in ('mlx', 'torch', 'numpy', 'transformers') if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("module", CORE)
def test_core_modules_import_without_a_framework(module):
    done = python(f"{HIDE}import g3n_mlx.{module}")
    assert done.returncode == 0, done.stderr


def test_public_names():
    import g3n_mlx

    results = ["Chunk", "Error", "Gemma3n", "Image", "PromptTooLong", "Result", "SamplingParams", "Usage", "Video"]
    assert g3n_mlx.__all__ == ["Audio", *results, "__version__", "load"]
    for name in g3n_mlx.__all__:
        assert getattr(g3n_mlx, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = g3n_mlx.nonsense


def test_no_backend_is_one_clear_message(tiny_folder):
    code = f"""{HIDE}
import g3n_mlx
try:
    g3n_mlx.load({str(tiny_folder)!r})
except (ImportError, ValueError) as error:
    print(error)
"""
    done = python(code)
    assert "pip install" in done.stdout, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell what child processes have taken")
@pytest.mark.parametrize(("code", "limit_s"), [("import g3n_mlx", 0.3), ("-m g3n_mlx.chat --help", 0.5)])
def test_start_up_is_quick(code, limit_s):
    """In seconds of the processor's own, of which a busy machine takes no more."""
    command = [sys.executable, *(code.split() if code.startswith("-m") else ["-c", code])]
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < limit_s, times


def test_every_framework_import_is_in_the_backends(repository):
    """What import-linter checks in CI, for those who run the tests alone. The bench measures others' use of them."""
    package = repository / "g3n_mlx"
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] not in ("backends", "bench"):
            text = path.read_text(encoding="utf-8")
            assert "import torch" not in text, path
            assert "import mlx" not in text, path


def test_the_import_of_convert_is_the_packages_own():
    assert importlib.util.find_spec("g3n_mlx.convert") is not None


def test_an_answer_imports_nothing_that_it_does_not_use():
    pytest.importorskip("torch")
    code = """
import gc, sys
from g3n_mlx.chat.__main__ import main
main(["--model", "demo", "--backend", "torch", "-p", "hi", "--max-tokens", "1"])
assert gc.isenabled()
heavy = ["torch._dynamo", "torch._inductor", "sympy", "transformers", "huggingface_hub", "httpx", "requests",
    "fastapi", "pydantic", "PIL", "soundfile", "soxr", "av", "prompt_toolkit", "llguidance", "jinja2"]
print("unused:", *(name for name in heavy if name in sys.modules))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "unused:", done.stdout


def test_the_collector_runs_again_after_a_failed_import(monkeypatch):
    import gc

    from g3n_mlx.chat.__main__ import command_line
    from g3n_mlx.commands import load_from

    monkeypatch.setattr("g3n_mlx.loading.PACKAGES", {"mlx": "no_such_package", "torch": "no_such_package"})
    with pytest.raises(ImportError):
        load_from(command_line().parse_args(["--model", "demo"]))
    assert gc.isenabled()

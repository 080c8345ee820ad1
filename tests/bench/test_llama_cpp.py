"""llama.cpp as the peer, by programs that stand in for it: turns, figures, ratios, and errors before any run."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from gguf_files import GEMMA3N_BYTES_PER_TOKEN, write_gemma3n
from llama_programs import BENCH, write_program, write_programs

from g3n_mlx.bench.__main__ import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are scripts")

SMALL = ("--prompt-tokens", 20, "--generation-tokens", 5, "--num-trials", 2, "--device", "cpu")


def bench(capsys, tiny_folder, *flags):
    code = main(["--model", str(tiny_folder), "--against", "llama.cpp", *map(str, flags)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_it_takes_turns(tiny_folder, tmp_path, capsys):
    flags = ("--peer-binary", write_programs(tmp_path), "--peer-model", write_gemma3n(tmp_path / "m.gguf"))
    code, out, err = bench(
        capsys, tiny_folder, *flags, "--depth", "0,40", "--sequences", "1,2", "--threads", 1, "--json", *SMALL
    )
    assert code == 0, err
    order = [line.split(", ")[1].split()[0] for line in err.splitlines() if line.startswith("run ")]
    assert order == ["g3n_mlx", "llama.cpp"] * 2
    summary = json.loads(out)
    ours, theirs = summary["engines"]["g3n_mlx"], summary["engines"]["llama.cpp"]
    assert theirs["engine"] == "llama.cpp 0c1e570, gemma3n E2B Q4_0, CPU, 2 threads"
    assert theirs["prompt_tps"]["median"] == 80
    assert [(entry["depth"], entry["tps"]["median"]) for entry in theirs["decode"]] == [(0, 16), (40, 15.6)]
    assert [(entry["sequences"], entry["tps"]["median"]) for entry in theirs["together"]] == [(1, 15), (2, 20)]
    assert theirs["weight_bytes_per_token"] == GEMMA3N_BYTES_PER_TOKEN
    assert theirs["peak_memory_bytes"] > 1e6
    # The process took longer than the test that it reports, 16 tokens at 80 a second.
    assert theirs["start_to_first_token_s"]["min"] - theirs["load_s"]["min"] == pytest.approx(0.2, rel=0.01)
    assert summary["ratios"]["generation_tps"]["40"] == pytest.approx(ours["decode"][1]["tps"]["median"] / 15.6)
    assert summary["ratios"]["together_tps"]["2"] == pytest.approx(ours["together"][1]["tps"]["median"] / 20)


def test_the_program_on_the_path(tiny_folder, tmp_path, monkeypatch, capsys):
    write_programs(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    flags = ("--peer-model", write_gemma3n(tmp_path / "m.gguf"), "--markdown", *SMALL[:-3], 1)
    code, out, err = bench(capsys, tiny_folder, *flags)
    assert code == 0, err
    header, _, prefill, *_ = out.splitlines()
    assert header == "|  | g3n_mlx | llama.cpp | ratio |"
    cells = [cell.strip() for cell in prefill.strip("|").split("|")]
    assert cells[2] == "80"
    assert float(cells[3]) == pytest.approx(float(cells[1]) / 80, rel=0.01)


def complaint(code, out, err):
    """The one line that is printed when nothing has been measured."""
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize(
    ("bench_body", "batched_body", "flags", "message"),
    [
        (None, None, (), "llama-bench is not there or can't be run: build llama.cpp, then --peer-binary"),
        ("print('usage: ls')", None, (), "llama-bench knows no --n-depth: expected a llama.cpp of June 2025 or newer"),
        (BENCH, None, ("--sequences", "1,2"), "llama-batched-bench is not there"),
        (BENCH, "print('-npl')", ("--sequences", "1,2"), "llama-batched-bench knows no --output-format"),
    ],
)
def test_wrong_programs_are_said_before_anything_runs(
    bench_body, batched_body, flags, message, tiny_folder, tmp_path, capsys
):
    binary = tmp_path / "llama-bench"
    if bench_body is not None:
        write_programs(tmp_path, bench_body, batched_body)
    flags = ("--peer-binary", binary, "--peer-model", write_gemma3n(tmp_path / "m.gguf"), *flags)
    assert message in complaint(*bench(capsys, tiny_folder, *flags))


def test_wrong_files_are_said_before_anything_runs(tiny_folder, tmp_path, capsys):
    binary = write_programs(tmp_path)
    other, text = write_gemma3n(tmp_path / "llama.gguf", "llama"), tmp_path / "text.gguf"
    text.write_text("no model")
    for path, message in (
        (tmp_path / "none.gguf", "does not exist: --peer-model FILE.gguf"),
        (tiny_folder, "is a folder, expected a GGUF file"),
        (text, "is not a whole GGUF file"),
        (other, "is a 'llama' model, expected 'gemma3n'"),
    ):
        said = complaint(*bench(capsys, tiny_folder, "--peer-binary", binary, "--peer-model", path))
        assert message in said
        assert path.name in said


def test_a_program_that_fails_is_one_line(tiny_folder, tmp_path, capsys):
    body = "if '--help' in words: print('--n-depth')\nelse: sys.exit('loading ...\\nerror: failed to load model')"
    binary = write_program(tmp_path / "llama-bench", body)
    flags = ("--peer-binary", binary, "--peer-model", write_gemma3n(tmp_path / "m.gguf"), *SMALL)
    code, out, err = bench(capsys, tiny_folder, *flags)
    assert (code, out) == (1, "")
    *_, last = err.splitlines()
    assert last == f"g3n-bench: llama.cpp: {binary}: error: failed to load model"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_bench_leaves_no_program_behind(stop, tiny_folder, tmp_path):
    started = tmp_path / "started"
    body = f"""
if "--help" in words:
    print("--n-depth")
else:
    import os
    open({str(started)!r} + ".new", "w").write(str(os.getpid()))
    os.rename({str(started)!r} + ".new", {str(started)!r})
    time.sleep(600)
"""
    binary = write_program(tmp_path / "llama-bench", body)
    flags = ("--peer-binary", binary, "--peer-model", write_gemma3n(tmp_path / "m.gguf"), *SMALL)
    command = [sys.executable, "-m", "g3n_mlx.bench", "--model", tiny_folder, "--against", "llama.cpp", *flags]
    bench = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)
    try:
        wait_for(started.exists)
        pid = int(started.read_text())
        bench.send_signal(stop)
        assert bench.wait(30) == 128 + stop
        wait_for(lambda: not alive(pid))
    finally:
        bench.kill()
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(started.read_text()), signal.SIGKILL)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not state.startswith("Z")  # ended, and nobody has waited for it yet


def wait_for(condition):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to pass within 30 s")

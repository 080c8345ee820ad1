"""llama.cpp, by its programs llama-bench and llama-batched-bench, which time themselves, after a warm-up of their own.

They make up their tokens. Source of what they print: their `--help` and tools/*/README.md; JSON lines since 2024, a
`--n-depth` since May 2025.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from g3n_mlx.bench.measure import SHORT_PROMPT, Request, Run, read_bandwidth
from g3n_mlx.bench.reads import bytes_per_token
from g3n_mlx.checkpoint.gguf import read_header
from g3n_mlx.failures import BadValue, IsAFolder, MissingFile, WorkerFailed
from g3n_mlx.memory import peak_children_bytes

PROGRAM, BATCHED_PROGRAM = "llama-bench", "llama-batched-bench"
CACHE_STEP = 256  # rows that a sequence's cache is rounded up to


def check(request: Request) -> None:
    """Raises an error unless the programs are there and are what they should be, and the file is a Gemma 3n."""
    path = Path(request.model)
    if path.is_dir():
        raise IsAFolder(f"{path} is a folder, expected a GGUF file: --peer-model FILE.gguf")
    if not path.is_file():
        raise MissingFile(f"{path} does not exist: --peer-model FILE.gguf")
    architecture = read_header(path).metadata.get("general.architecture")
    if architecture != "gemma3n":
        raise BadValue(f"{path} is a {architecture!r} model, expected 'gemma3n'")
    _check_program(_program(request), "--n-depth")
    if request.sequences:
        _check_program(_batched_program(request), "-npl", "--output-format")


def measure(request: Request) -> Run:
    path = Path(request.model)
    # The first process does what a user waits for: it loads, and reads a short prompt. It ends with the first token.
    began = time.perf_counter()
    (short,) = _run(request, _program(request), "-p", SHORT_PROMPT, "-n", 0, "--no-warmup")
    first_token_s = time.perf_counter() - began
    (prefill,) = _run(request, _program(request), "-p", request.prompt_tokens, "-n", 0)
    depths = ",".join(map(str, request.depths))
    decode = _run(request, _program(request), "-p", 0, "-n", request.generation_tokens, "-d", depths)
    rates = {test["n_depth"]: _best(test) for test in decode}
    return Run(
        load_s=first_token_s - min(short["samples_ns"]) / 1e9,
        start_to_first_token_s=first_token_s,
        time_to_first_token_s=request.prompt_tokens / _best(prefill),
        prompt_tps=_best(prefill),
        generation_tps=[rates[depth] for depth in request.depths],
        sequences_tps=_together(request) if request.sequences else [],
        peak_memory_bytes=peak_children_bytes() or None,
        peak_device_bytes=None,
        weight_bytes_per_token=bytes_per_token(read_header(path)),
        read_bandwidth=read_bandwidth("llama.cpp", "cpu") if short["backends"] == "CPU" else None,
        description=f"llama.cpp {short['build_commit']}, {short['model_type']}, {short['backends']}, "
        f"{short['n_threads']} threads",
    )


def _together(request: Request) -> list[float]:
    """Tokens a second of all sequences, for each count of them."""
    rows = -(-(SHORT_PROMPT + request.generation_tokens) // CACHE_STEP) * CACHE_STEP
    counts = ",".join(map(str, request.sequences))
    context = max(request.sequences) * rows
    flags = ("-c", context, "-npp", SHORT_PROMPT, "-ntg", request.generation_tokens, "-npl", counts)
    tests = _run(request, _batched_program(request), *flags, output="--output-format")
    rates = {test["pl"]: test["speed_tg"] for test in tests}
    return [rates[count] for count in request.sequences]


def _best(test: dict[str, Any]) -> float:
    """Tokens a second: of one repetition, so the only one."""
    return max(test["samples_ts"])


def _run(request: Request, program: str, *flags: object, output: str = "-o") -> list[dict[str, Any]]:
    """The tests that a program prints, each a line of JSON."""
    command = [program, "-m", request.model, output, "jsonl", *map(str, flags)]
    if output == "-o":
        command += ["-r", "1"]
    if request.threads is not None:
        command += ["-t", str(request.threads)]
    if request.device == "cpu":
        command += ["-ngl", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    tests = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not tests:
        last_words = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise WorkerFailed(f"{program}: {last_words}")
    return tests


def _program(request: Request) -> str:
    return request.binary or PROGRAM


def _batched_program(request: Request) -> str:
    """Beside the other one, where that was named by its path."""
    program = Path(_program(request))
    return str(program.with_name(program.name.replace(PROGRAM, BATCHED_PROGRAM)))


def _check_program(program: str, *flags: str) -> None:
    """Raises an error unless the program can be started and knows the flags."""
    if shutil.which(program) is None:
        raise MissingFile(f"{program} is not there or can't be run: build llama.cpp, then --peer-binary PATH/{PROGRAM}")
    try:
        done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadValue(f"{program} can't be run: {error}") from None
    missing = [flag for flag in flags if flag not in done.stdout + done.stderr]
    if missing:
        raise BadValue(f"{program} knows no {missing[0]}: expected a llama.cpp of June 2025 or newer")

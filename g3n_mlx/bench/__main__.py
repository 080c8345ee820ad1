"""`python -m g3n_mlx.bench`: how fast a model loads, reads and writes here, beside a peer if asked.

Every run is a process of its own (see worker.py). With `--against`, runs alternate, A B A B, so that a machine that
warms up or is disturbed treats both alike; the ratios are those of the medians.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil

from g3n_mlx.bench import report
from g3n_mlx.bench.engines import OURS, PEERS, engine
from g3n_mlx.bench.measure import SHORT_PROMPT, Request, Run
from g3n_mlx.commands import (
    add_draft_flag,
    add_model_flags,
    command_parser,
    count,
    model_of,
    positive,
    run_command,
    say,
    tell,
)
from g3n_mlx.config.model import ModelConfig, read_config
from g3n_mlx.convert import cached_conversion, plan_for, resolve
from g3n_mlx.failures import BadValue, MissingPackage, WorkerFailed, check_folder_of, one_line
from g3n_mlx.installation import install_command
from g3n_mlx.matformer.adapted import parsed_adapters

NAME = "g3n-bench"
PROMPT_SEED = 0
MAX_SEQUENCES = 1024
PLOTS = (".png", ".svg")
# What the engines' pools of threads ask: PyTorch and our kernels, mistral.rs. llama.cpp has a flag.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags, runs, prints; returns the exit code."""
    arguments = command_line(prog).parse_args(argv)
    return run_command(prog, lambda: _measure(arguments))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Measures load time, prefill, decode and memory, each run in its own process.")
    add_model_flags(parser.add_argument_group("model").add_argument)
    add = parser.add_argument_group("what is measured").add_argument
    add("--prompt-tokens", type=positive, default=512, metavar="N", help="of the prefill; default: 512")
    add("--generation-tokens", type=positive, default=128, metavar="N", help="decoded at each depth; default: 128")
    add("--depth", type=_list_of(count), metavar="N,...", help="tokens before decode begins; default: the prompt's")
    add("--sequences", type=_list_of(positive), default=(), metavar="N,...", help="decode so many together, too")
    add_draft_flag(add, "off")
    add("--count-ops", action="store_true", help="only count a decode step's GPU kernels with MLX, beside mlx-lm's")
    add("--num-trials", type=positive, default=3, metavar="N", help="of which the median counts; default: 3")
    add("--threads", type=positive, metavar="N", help="of every engine, on a CPU; default: each engine's own choice")
    add = parser.add_argument_group("beside a peer").add_argument
    add("--against", choices=PEERS, help="measure this peer too, in turn; it reads --model as stored")
    add("--peer-model", metavar="PATH", help="the peer's checkpoint, where it cannot read --model")
    add("--peer-binary", metavar="PATH", help="of llama.cpp: its llama-bench; default: the one on PATH")
    add = parser.add_argument_group("output").add_argument
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the figures as JSON")
    shape.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    add("--plot", type=Path, metavar="FILE", help="draw decode over depth, and over sequences: a .png or .svg")
    return parser


def _list_of(number: Callable[[str], int]) -> Callable[[str], tuple[int, ...]]:
    """A flag's numbers, divided by commas: each once, in rising order."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(sorted({number(part) for part in text.split(",")}))

    return numbers


def _measure(arguments: argparse.Namespace) -> int:
    _check(arguments)
    folder = resolve(model_of(arguments), arguments.revision)
    config = ModelConfig.from_file(folder)
    requests = _requests(arguments, folder, config)
    if arguments.count_ops:
        return _count_ops(requests[0])
    for request in requests:
        engine(request.engine).check(request)
    if arguments.q_bits is not None:  # converted before the clock of the first run starts
        named = arguments.matformer is not None
        plan = plan_for(folder, arguments.matformer, arguments.matformer_config) if named else None
        cached_conversion(folder, q_bits=arguments.q_bits, plan=plan)
    summary = report.summary(requests, _run_all(requests, arguments.num_trials), config)
    if arguments.json:
        tell(json.dumps(summary, indent=2))
    else:
        tell(report.markdown([summary]) if arguments.markdown else report.table(summary))
    if arguments.plot is not None:
        report.plot(arguments.plot, [summary])
    return 0


def _count_ops(request: Request) -> int:
    """Prints how many kernels a decode step has after MLX has fused what it can, ours and mlx-lm's."""
    from g3n_mlx.bench.engines import mlx_lm, ours

    counts = {OURS: ours.count(replace(request, backend="mlx"))}
    try:
        mlx_lm.check(request)
    except ImportError as error:
        say(one_line(error))
    else:
        counts["mlx-lm"] = mlx_lm.count(request)
    tell(f"{'one decode step':<18}{'kernels':>9}{'nodes of the graph':>20}")
    for name, (nodes, kernels) in counts.items():
        tell(f"{name:<18}{kernels:>9,}{nodes:>20,}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Whatever the flags alone show to be wrong."""
    if arguments.peer_model and not arguments.against:
        raise BadValue("--peer-model needs --against")
    if arguments.peer_binary and arguments.against != "llama.cpp":
        raise BadValue("--peer-binary needs --against llama.cpp: no other peer is a program")
    if arguments.against in ("llama.cpp", "mistralrs") and not arguments.peer_model:
        raise BadValue(f"--against {arguments.against} needs --peer-model, a file it reads: see docs/performance.md")
    if arguments.generation_tokens < 2:
        raise BadValue("--generation-tokens is 1, expected at least 2: the first token is counted to the prompt")
    if arguments.plot is not None:
        check_folder_of(arguments.plot)
        if arguments.plot.suffix.lower() not in PLOTS:
            raise BadValue(f"--plot is {arguments.plot}, expected a name that ends in {' or '.join(PLOTS)}")
        try:
            import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError:
            raise MissingPackage(f"--plot needs matplotlib: {install_command('plot')}") from None


def _requests(arguments: argparse.Namespace, folder: Path, config: ModelConfig) -> list[Request]:
    depths = arguments.depth or (arguments.prompt_tokens,)
    longest = max(arguments.prompt_tokens, *depths)
    context = config.text.max_position_embeddings
    if longest + arguments.generation_tokens > context:
        raise BadValue(
            f"{longest} tokens and {arguments.generation_tokens} to generate are more than the context of {context}"
        )
    most = max(arguments.sequences, default=0)
    if most > MAX_SEQUENCES:
        raise BadValue(f"--sequences has {most}, expected at most {MAX_SEQUENCES}")
    # Text ids alone: those of the media ranges take another path, which not every peer has.
    borders = [sub.vocab_offset for sub in (config.vision, config.audio) if sub]
    limit = min([config.text.vocab_size, config.text.vocab_size_per_layer_input, *borders])
    ids = np.random.default_rng(PROMPT_SEED).integers(0, limit, max(longest, SHORT_PROMPT, *arguments.sequences, 0))
    ours = Request(
        engine=OURS,
        model=str(folder),
        prompt_ids=tuple(int(token) for token in ids),
        prompt_tokens=arguments.prompt_tokens,
        generation_tokens=arguments.generation_tokens,
        depths=depths,
        sequences=arguments.sequences,
        threads=arguments.threads,
        backend=arguments.backend,
        matformer=arguments.matformer,
        matformer_config=None if arguments.matformer_config is None else str(arguments.matformer_config),
        q_bits=arguments.q_bits,
        device=arguments.device,
        dtype=arguments.dtype,
        draft=arguments.draft,
        activations=arguments.activations,
        adapters=parsed_adapters(arguments.adapter),
    )
    if not arguments.against:
        return [ours]
    if arguments.adapter:
        raise BadValue("--against measures the peer without an adapter: leave out --adapter, or convert with it first")
    bits = arguments.q_bits or read_config(folder).get("quantization", {}).get("bits")
    peer_model = _peer_model(arguments, folder)
    peer = replace(ours, engine=arguments.against, model=peer_model, binary=arguments.peer_binary, q_bits=bits)
    return [ours, peer]


def _peer_model(arguments: argparse.Namespace, folder: Path) -> str:
    """A GGUF file as it is named; a folder or hub id as ours."""
    named = arguments.peer_model
    if named is None:
        return str(folder)
    return named if arguments.against == "llama.cpp" else str(resolve(named))


def _run_all(requests: list[Request], trials: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {request.engine: [] for request in requests}
    for trial in range(trials):
        for request in requests:
            say(f"run {trial + 1} of {trials}, {request.engine} ...")
            runs[request.engine].append(_run(request))
    return runs


def _run(request: Request) -> Run:
    environment = dict(os.environ)
    if request.threads is not None:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(request.threads))
    started_at, others_before = time.monotonic(), _other_cpu_s()
    child = subprocess.Popen(
        [sys.executable, "-m", "g3n_mlx.bench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # so that it can be stopped with the programs that it starts
    )
    try:
        figures, errors = child.communicate(json.dumps(asdict(replace(request, started_at=started_at))))
    except BaseException:
        _stop(child)
        raise
    if child.returncode:
        last_words = errors.strip().rpartition("\n")[2] or f"exit code {child.returncode}"
        raise WorkerFailed(f"{request.engine}: {last_words}")
    others = None if sys.platform == "win32" else max(_other_cpu_s() - others_before, 0.0)
    return replace(Run(**json.loads(figures)), other_cpu_s=others)


def _other_cpu_s() -> float:
    """Seconds that all processors have worked so far, but for this process and its children that have ended."""
    every, ours = psutil.cpu_times(), os.times()
    return every.user + every.system + getattr(every, "nice", 0.0) - sum(ours[:4])


def _stop(child: "subprocess.Popen[str]") -> None:
    """Ends a worker, and what it has started; Windows knows no groups of processes."""
    if sys.platform == "win32":
        child.kill()
    else:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    sys.exit(main())

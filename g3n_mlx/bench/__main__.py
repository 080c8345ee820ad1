"""`python -m g3n_mlx.bench`: how fast a model loads, reads and writes here, beside a peer if asked.

Every run is a process of its own (see measure.py). With `--against`, runs alternate, A B A B, so that a machine
that warms up or is disturbed treats both alike; the ratios are those of the medians.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from g3n_mlx.bench.measure import ENGINES, Request, Run
from g3n_mlx.checkpoint.hub import resolve
from g3n_mlx.commands import add_model_flags, command_parser, model_of, positive, run_command
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.convert import cached_conversion, plan_for
from g3n_mlx.failures import BadValue, MissingPackage, WorkerFailed, size_in_words

NAME = "g3n-bench"
OURS, *PEERS = ENGINES
PROMPT_SEED = 0


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags, runs, prints; returns the exit code."""
    arguments = command_line(prog).parse_args(argv)
    return run_command(prog, lambda: _measure(arguments))


def _measure(arguments: argparse.Namespace) -> int:
    runs = _run_all(_requests(arguments), arguments.num_trials)
    summary = {
        "prompt_tokens": arguments.prompt_tokens,
        "generation_tokens": arguments.generation_tokens,
        "engines": {engine: _summary(results) for engine, results in runs.items()},
    }
    if arguments.against:
        summary["ratios"] = _ratios(*summary["engines"].values())
    print(json.dumps(summary, indent=2) if arguments.json else _table(summary))
    return 0


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Measures load time, prefill, decode and memory, each run in its own process.")
    add_model_flags(parser.add_argument_group("model").add_argument)
    parser.add_argument("--prompt-tokens", type=positive, default=512, metavar="N")
    parser.add_argument("--generation-tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--num-trials", type=positive, default=3, metavar="N")
    parser.add_argument("--against", choices=PEERS, help="measure this peer too, in turn; it reads --model as stored")
    parser.add_argument("--peer-model", metavar="PATH", help="the peer's checkpoint, where it cannot read --model")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def _requests(arguments: argparse.Namespace) -> list[Request]:
    if arguments.peer_model and not arguments.against:
        raise BadValue("--peer-model needs --against")
    if arguments.against and importlib.util.find_spec(arguments.against.replace("-", "_")) is None:
        raise MissingPackage(f"{arguments.against} is not installed: pip install {arguments.against}")
    if arguments.generation_tokens < 2:
        raise BadValue("--generation-tokens is 1, expected at least 2: the first token is counted to the prompt")
    folder = resolve(model_of(arguments), arguments.revision)
    config = ModelConfig.from_file(folder)
    # Text ids alone: those of the media ranges take another path, which not every peer has.
    borders = [sub.vocab_offset for sub in (config.vision, config.audio) if sub]
    limit = min([config.text.vocab_size, config.text.vocab_size_per_layer_input, *borders])
    ids = np.random.default_rng(PROMPT_SEED).integers(0, limit, arguments.prompt_tokens)
    prompt = tuple(int(token) for token in ids)
    if arguments.q_bits is not None:  # converted before the clock of the first run starts
        named = arguments.matformer is not None
        plan = plan_for(folder, arguments.matformer, arguments.matformer_config) if named else None
        cached_conversion(folder, q_bits=arguments.q_bits, plan=plan)
    ours = Request(
        engine=OURS,
        model=str(folder),
        prompt_ids=prompt,
        generation_tokens=arguments.generation_tokens,
        backend=arguments.backend,
        matformer=arguments.matformer,
        matformer_config=None if arguments.matformer_config is None else str(arguments.matformer_config),
        q_bits=arguments.q_bits,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    if not arguments.against:
        return [ours]
    peer_folder = resolve(arguments.peer_model) if arguments.peer_model else folder
    peer = Request(arguments.against, str(peer_folder), prompt, arguments.generation_tokens, device=arguments.device)
    return [ours, peer]


def _run_all(requests: list[Request], trials: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {request.engine: [] for request in requests}
    for trial in range(trials):
        for request in requests:
            print(f"run {trial + 1} of {trials}, {request.engine} ...", file=sys.stderr)
            runs[request.engine].append(_run(request))
    return runs


def _run(request: Request) -> Run:
    child = subprocess.run(
        [sys.executable, "-m", "g3n_mlx.bench.measure"],
        input=json.dumps(asdict(request)),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        last_words = child.stderr.strip().rpartition("\n")[2] or f"exit code {child.returncode}"
        raise WorkerFailed(f"{request.engine}: {last_words}")
    return Run(**json.loads(child.stdout))


def _summary(runs: list[Run]) -> dict[str, Any]:
    """Median, smallest and largest of every rate and time; peaks are the largest seen."""
    first = runs[0]

    def spread(field: str) -> dict[str, float]:
        values = [getattr(run, field) for run in runs]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def largest(field: str) -> int | None:
        return max((getattr(run, field) for run in runs if getattr(run, field) is not None), default=None)

    generation = spread("generation_tps")
    return {
        "engine": first.description,
        "load_s": spread("load_s"),
        "time_to_first_token_s": spread("time_to_first_token_s"),
        "prompt_tps": spread("prompt_tps"),
        "generation_tps": generation,
        "peak_memory_bytes": largest("peak_memory_bytes"),
        "peak_device_bytes": largest("peak_device_bytes"),
        "weight_bytes_per_token": first.weight_bytes_per_token,
        "weight_bandwidth": generation["median"] * first.weight_bytes_per_token,
        "read_bandwidth": max(run.read_bandwidth for run in runs),
        "graph_operations": first.graph_operations,
        "graph_kernels": first.graph_kernels,
    }


def _ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float | None]:
    """How many times the peer's speed ours is, and its share of the peer's memory."""
    memory = [ours["peak_memory_bytes"], peer["peak_memory_bytes"]]
    return {
        "prompt_tps": ours["prompt_tps"]["median"] / peer["prompt_tps"]["median"],
        "generation_tps": ours["generation_tps"]["median"] / peer["generation_tps"]["median"],
        "decode_time": peer["generation_tps"]["median"] / ours["generation_tps"]["median"],
        "load_s": ours["load_s"]["median"] / peer["load_s"]["median"],
        "peak_memory_bytes": None if None in memory else memory[0] / memory[1],
    }


def _table(summary: dict[str, Any]) -> str:
    lines = []
    for figures in summary["engines"].values():
        lines += [
            f"{figures['engine']}: {summary['prompt_tokens']} tokens in, {summary['generation_tokens']} out",
            _row("load", figures["load_s"], "s"),
            _row("time to first token", figures["time_to_first_token_s"], "s"),
            _row("prefill", figures["prompt_tps"], "tok/s"),
            _row("decode", figures["generation_tps"], "tok/s"),
            f"  {'peak memory':<24}{_size(figures['peak_memory_bytes'])}",
        ]
        if figures["peak_device_bytes"] is not None:
            lines.append(f"  {'peak device memory':<24}{_size(figures['peak_device_bytes'])}")
        share = figures["weight_bandwidth"] / figures["read_bandwidth"]
        lines += [
            f"  {'weights read per token':<24}{_size(figures['weight_bytes_per_token'])}",
            f"  {'so decode reads':<24}{_size(figures['weight_bandwidth'])}/s, {share:.1%} of the "
            f"{_size(figures['read_bandwidth'])}/s that a plain reduction reads here",
        ]
        if figures["graph_operations"] is not None:
            lines.append(
                f"  {'one decode step':<24}{figures['graph_operations']} graph operations, "
                f"{figures['graph_kernels']} of them not mere views"
            )
        lines.append("")
    if "ratios" in summary:
        ratios, peer = summary["ratios"], list(summary["engines"])[1]
        lines += [
            f"{OURS} against {peer}, medians: prefill {ratios['prompt_tps']:.2f} x, decode "
            f"{ratios['generation_tps']:.2f} x the speed ({ratios['decode_time']:.2f} x the time per token)"
            + (f", {ratios['peak_memory_bytes']:.2f} x the peak memory" if ratios["peak_memory_bytes"] else "")
        ]
    return "\n".join(lines).rstrip()


def _row(name: str, spread: dict[str, float], unit: str) -> str:
    return f"  {name:<24}{spread['median']:.3g} {unit}  (min {spread['min']:.3g}, max {spread['max']:.3g})"


def _size(count: float | None) -> str:
    return "not known on this system" if count is None else size_in_words(count)


if __name__ == "__main__":
    sys.exit(main())

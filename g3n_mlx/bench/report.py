"""What the runs add up to: medians and ratios, as data, as a table and as a plot.

A summary is what `--json` prints; the tables and the plot need nothing else. So one table and one plot can be made of
those of several peers, the one with the most figures first:

    python -m g3n_mlx.bench.report llama.cpp.json mistralrs.json --plot performance.svg
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from g3n_mlx.bench.engines import OURS
from g3n_mlx.bench.measure import Request, Run
from g3n_mlx.commands import run_command
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.text import SLIDING
from g3n_mlx.failures import size_in_words

Spread = dict[str, float]  # "median", "min", "max"


def summary(requests: Sequence[Request], runs: dict[str, list[Run]], config: ModelConfig) -> dict[str, Any]:
    """All figures of the engines; rates in tokens a second, sizes in bytes."""
    first = requests[0]
    figures = {request.engine: _figures(request, runs[request.engine], config) for request in requests}
    found: dict[str, Any] = {
        "prompt_tokens": first.prompt_tokens,
        "generation_tokens": first.generation_tokens,
        "threads": first.threads,
        "engines": figures,
    }
    if len(requests) > 1:
        found["ratios"] = _ratios(*figures.values())
    return found


def _figures(request: Request, runs: list[Run], config: ModelConfig) -> dict[str, Any]:
    """Median, smallest and largest of every rate and time; peaks are the largest seen."""
    weights = runs[0].weight_bytes_per_token
    decode: list[dict[str, Any]] = []
    for index, depth in enumerate(request.depths):
        rate = _spread([run.generation_tps[index] for run in runs])
        read = None if weights is None else weights + kv_bytes(config, depth, runs[0].kv_element_bytes)
        decode.append(
            {
                "depth": depth,
                "tps": rate,
                "bytes_per_token": read,
                "bandwidth": None if read is None else rate["median"] * read,
            }
        )
    together: list[dict[str, Any]] | None = None
    if all(run.sequences_tps is not None for run in runs):
        together = [
            {"sequences": count, "tps": _spread([(run.sequences_tps or [])[index] for run in runs])}
            for index, count in enumerate(request.sequences)
        ]
    return {
        "engine": runs[0].description,
        "load_s": _spread([run.load_s for run in runs]),
        "start_to_first_token_s": _spread([run.start_to_first_token_s for run in runs]),
        "time_to_first_token_s": _spread([run.time_to_first_token_s for run in runs]),
        "prompt_tps": _spread([run.prompt_tps for run in runs]),
        "decode": decode,
        "together": together,
        "drafts": _drafts(runs),
        "row_seconds": _row_seconds(runs),
        "peak_memory_bytes": _largest([run.peak_memory_bytes for run in runs]),
        "peak_device_bytes": _largest([run.peak_device_bytes for run in runs]),
        "weight_bytes_per_token": weights,
        "read_bandwidth": _largest([run.read_bandwidth for run in runs]),
        "other_cpu_s": _largest([run.other_cpu_s for run in runs]),
        "graph_operations": runs[0].graph_operations,
        "graph_kernels": runs[0].graph_kernels,
    }


def _drafts(runs: list[Run]) -> list[dict[str, Any]] | None:
    """For each task speeds with drafts and without, their ratio in each run, and what became of the drafts."""
    if any(run.drafted is None for run in runs):
        return None
    found: list[dict[str, Any]] = []
    for entries in zip(*(run.drafted or [] for run in runs), strict=True):
        spreads = {name: _spread([entry[name] for entry in entries]) for name in ("plain_tps", "tps")}
        counts = {
            name: statistics.median([entry[name] for entry in entries])
            for name in ("drafted_tokens", "accepted_tokens", "tokens_per_call")
        }
        ratio = _spread([entry["tps"] / entry["plain_tps"] for entry in entries])
        found.append({"task": entries[0]["task"], **spreads, "ratio": ratio, **counts})
    return found


def _row_seconds(runs: list[Run]) -> list[dict[str, Any]] | None:
    """Times of calls by their rows, the best of all runs."""
    if any(run.row_seconds is None for run in runs):
        return None
    columns = zip(*(run.row_seconds or [] for run in runs), strict=True)
    return [{"rows": column[0][0], "seconds": min(seconds for _, seconds in column)} for column in columns]


def kv_bytes(config: ModelConfig, depth: int, element_bytes: int) -> int:
    """Bytes of keys and values that a decode step reads at a depth: each layer's own, or those it shares."""
    text = config.text
    seen = [min(depth, text.sliding_window) if kind == SLIDING else depth for kind in text.layer_types]
    return sum(seen) * 2 * text.num_key_value_heads * text.head_dim * element_bytes


def _spread(values: list[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """How many times the peer's speed ours is, and our share of its time and memory; of the medians."""

    def times(mine: dict[str, Any], theirs: dict[str, Any], name: str) -> float:
        return mine[name]["median"] / theirs[name]["median"]

    memory = [ours["peak_memory_bytes"], peer["peak_memory_bytes"]]
    pairs = zip(ours["decode"], peer["decode"], strict=True)
    several = zip(ours["together"], peer["together"], strict=True) if ours["together"] and peer["together"] else ()
    return {
        "prompt_tps": times(ours, peer, "prompt_tps"),
        "generation_tps": {str(mine["depth"]): times(mine, theirs, "tps") for mine, theirs in pairs},
        "together_tps": {str(mine["sequences"]): times(mine, theirs, "tps") for mine, theirs in several},
        "load_s": times(ours, peer, "load_s"),
        "start_to_first_token_s": times(ours, peer, "start_to_first_token_s"),
        "peak_memory_bytes": None if None in memory else memory[0] / memory[1],
    }


def table(summary: dict[str, Any]) -> str:
    """For the terminal: a block for each engine, then the ratios."""
    lines: list[str] = []
    for figures in summary["engines"].values():
        lines += [f"{figures['engine']}: {summary['prompt_tokens']} tokens in, {summary['generation_tokens']} out"]
        lines += [f"  {name:<28}{value}" for name, value in _block(summary, figures)]
        lines.append("")
    if "ratios" in summary:
        ratios, peer = summary["ratios"], list(summary["engines"])[1]
        words = [f"prefill {ratios['prompt_tps']:.2f} x"]
        words += [f"decode at {depth} {ratio:.2f} x" for depth, ratio in ratios["generation_tps"].items()]
        words += [f"{count} sequences {ratio:.2f} x" for count, ratio in ratios["together_tps"].items()]
        line = f"{OURS} against {peer}, medians: {', '.join(words)} the speed"
        line += f"; {ratios['start_to_first_token_s']:.2f} x the time from start to first token"
        if ratios["peak_memory_bytes"] is not None:
            line += f", {ratios['peak_memory_bytes']:.2f} x the peak memory"
        lines.append(line)
    return "\n".join(lines).rstrip()


def _block(summary: dict[str, Any], figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "load", _words(figures["load_s"], "s")
    yield "start to first token", _words(figures["start_to_first_token_s"], "s")
    yield "time to first token", _words(figures["time_to_first_token_s"], "s")
    yield "prefill", _words(figures["prompt_tps"], "tok/s")
    for entry in figures["decode"]:
        yield f"decode at {entry['depth']}", _words(entry["tps"], "tok/s") + _share(entry, figures["read_bandwidth"])
    for entry in figures["together"] or []:
        name = "1 sequence" if entry["sequences"] == 1 else f"{entry['sequences']} sequences together"
        yield name, _words(entry["tps"], "tok/s")
    if figures["together"] is None:
        yield "sequences together", "not measured"
    for entry in figures["drafts"] or []:
        yield entry["task"], _words(entry["plain_tps"], "tok/s")
        accepted = f"{entry['accepted_tokens']:g} of {entry['drafted_tokens']:g} drafted tokens accepted"
        yield (
            "  with drafts",
            (
                f"{_words(entry['tps'], 'tok/s')}  {entry['ratio']['median']:.2f} x, {accepted}, "
                f"{entry['tokens_per_call']:.2f} a call"
            ),
        )
    if figures["row_seconds"]:
        times = [f"{entry['rows']} {1000 * entry['seconds']:.3g} ms" for entry in figures["row_seconds"]]
        yield "a call of so many rows", ", ".join(times)
    yield "peak memory", _size(figures["peak_memory_bytes"])
    if figures["peak_device_bytes"] is not None:
        yield "peak device memory", _size(figures["peak_device_bytes"])
    yield "weights read per token", _size(figures["weight_bytes_per_token"])
    if figures["read_bandwidth"] is not None:
        yield "a plain reduction reads", f"{_size(figures['read_bandwidth'])}/s here"
    if figures["other_cpu_s"] is not None:
        yield "others worked meanwhile", f"{figures['other_cpu_s']:.1f} s of CPU at most: disturbed, if that is much"
    if figures["graph_operations"] is not None:
        count, kernels = figures["graph_operations"], figures["graph_kernels"]
        yield "one decode step", f"{count} graph operations, {kernels} of them not mere views"


def _words(spread: Spread, unit: str) -> str:
    return f"{spread['median']:.3g} {unit}  (min {spread['min']:.3g}, max {spread['max']:.3g})"


def _share(entry: dict[str, Any], read_bandwidth: float | None) -> str:
    if entry["bandwidth"] is None:
        return ""
    share = f", {entry['bandwidth'] / read_bandwidth:.0%} of what can be read" if read_bandwidth else ""
    return f"  {_size(entry['bandwidth'])}/s{share}"


def _size(count: float | None) -> str:
    return "not known" if count is None else size_in_words(count)


def markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """A table with a column for each engine of each summary, and our ratio to each peer behind its own."""
    tables = [dict(_rows(summary)) for summary in summaries]
    header = [""]
    for summary in summaries:
        ours, *peers = summary["engines"]
        header += [ours, *(word for peer in peers for word in (peer, "ratio"))]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name in dict.fromkeys(name for table in tables for name in table):
        row = [name]
        for summary, figures in zip(summaries, tables, strict=True):
            ours, *theirs = figures.get(name, [None] * len(summary["engines"]))
            row.append(_cell(ours))
            for cell in theirs:
                row += [_cell(cell), f"{ours / cell:.2f}" if ours and cell else "-"]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rows(summary: dict[str, Any]) -> Iterator[tuple[str, list[float | None]]]:
    """Figures of all engines, medians; a depth or a count that an engine was not measured at is None."""
    engines = list(summary["engines"].values())

    def medians(name: str) -> list[float | None]:
        return [figures[name]["median"] for figures in engines]

    def scaled(name: str, unit: float) -> list[float | None]:
        return [None if figures[name] is None else figures[name] / unit for figures in engines]

    yield f"prefill of {summary['prompt_tokens']} tokens, tok/s", medians("prompt_tps")
    for depth in _all(engines, "decode", "depth"):
        at_depth = [_at(figures, "decode", "depth", depth) for figures in engines]
        yield f"decode at {depth}, tok/s", [None if entry is None else entry["tps"]["median"] for entry in at_depth]
    for count in _all(engines, "together", "sequences"):
        together = [_at(figures, "together", "sequences", count) for figures in engines]
        name = f"{count} sequences together, tok/s" if count > 1 else "1 sequence, tok/s"
        yield name, [None if entry is None else entry["tps"]["median"] for entry in together]
    yield "load, s", medians("load_s")
    yield "start to first token, s", medians("start_to_first_token_s")
    yield "peak memory, GB", scaled("peak_memory_bytes", 1e9)
    yield "weights read per token, GB", scaled("weight_bytes_per_token", 1e9)
    yield "read bandwidth in the same run, GB/s", scaled("read_bandwidth", 1e9)
    shares: list[float | None] = []
    for figures in engines:
        entry, limit = figures["decode"][0], figures["read_bandwidth"]
        shares.append(100 * entry["bandwidth"] / limit if entry["bandwidth"] and limit else None)
    yield f"of which decode at {engines[0]['decode'][0]['depth']} uses, %", shares
    yield "others worked meanwhile, s of CPU", [figures["other_cpu_s"] for figures in engines]


def _all(engines: Sequence[dict[str, Any]], kind: str, key: str) -> list[int]:
    return sorted({entry[key] for figures in engines for entry in figures[kind] or []})


def _at(figures: dict[str, Any], kind: str, key: str, value: int) -> dict[str, Any] | None:
    return next((entry for entry in figures[kind] or [] if entry[key] == value), None)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def plot(path: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """Decode over depth, with what the bandwidth allows our bytes; and of sequences together, where measured."""
    from matplotlib.figure import Figure

    engines: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        for name, figures in summary["engines"].items():
            engines.setdefault(name, figures)  # ours is the first summary's
    several = bool(_all(list(engines.values()), "together", "sequences"))
    figure = Figure(figsize=(10 if several else 6, 4), layout="constrained")
    panels = figure.subplots(1, 2) if several else [figure.subplots()]
    for index, (name, figures) in enumerate(engines.items()):
        look = f"C{index}o-"  # an engine's colour is the same in both panels
        panels[0].plot(*_points(figures["decode"], "depth"), look, label=name)
        if several and figures["together"]:
            panels[1].plot(*_points(figures["together"], "sequences"), look, label=name)
    ours = engines[OURS]
    if ours["read_bandwidth"] and ours["weight_bytes_per_token"]:
        limits = [ours["read_bandwidth"] / entry["bytes_per_token"] for entry in ours["decode"]]
        depths = [entry["depth"] for entry in ours["decode"]]
        panels[0].plot(depths, limits, "k--", label=f"{OURS}, if bytes were all", linewidth=1)
    panels[0].set_xlabel("tokens in the cache")
    panels[0].set_ylabel("decode, tok/s")
    if several:
        panels[1].set_xlabel("sequences decoded together")
        panels[1].set_ylabel("all of them, tok/s")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _points(entries: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [entry[key] for entry in entries], [entry["tps"]["median"] for entry in entries]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of kept summaries, and draws their plot; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="One Markdown table, and one plot, of what `g3n bench --json` printed."
    )
    parser.add_argument("summaries", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png or .svg")
    arguments = parser.parse_args(argv)
    return run_command("g3n_mlx.bench.report", lambda: _of_files(arguments.summaries, arguments.plot))


def _of_files(paths: Sequence[Path], plot_path: Path | None) -> int:
    summaries = [read_json(path) for path in paths]
    print(markdown(summaries))
    if plot_path is not None:
        plot(plot_path, summaries)
    return 0


if __name__ == "__main__":
    sys.exit(main())

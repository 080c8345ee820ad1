"""`g3n doctor`: what this machine can run, what is installed, and what to do where something is missing."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from g3n_mlx.commands import command_parser, run_command, say, tell
from g3n_mlx.failures import check_folder_of, one_line, size_in_words

NAME = "g3n doctor"


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Examines everything, prints it; returns 0 when a backend answers and computes what it should, else 1."""
    arguments = command_line(prog).parse_args(argv)
    return run_command(prog, lambda: _run(arguments.json, arguments.report))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(
        prog,
        "Shows chip, memory, backends, extras, models and slices that fit; exits with 1 when no backend works.",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="also write it all to a file, with a short bench",
    )
    return parser


def _run(as_json: bool, path: Path | None) -> int:
    if path is not None:
        check_folder_of(path)
    report = examine()
    if path is not None:
        from g3n_mlx.doctor.backends import benchmarked

        benches = {
            backend["name"]: _examined(partial(benchmarked, backend["name"]))
            for backend in _items(report["backends"])
            if "answer" in backend
        }
        text = json.dumps(report | {"bench": benches}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", "utf-8")
        say(f"wrote {path}")
    text = json.dumps(report, indent=2, ensure_ascii=False) if as_json else "\n".join(_lines(report))
    tell(text)
    return 0 if report["works"] else 1


def examine() -> dict[str, Any]:
    """The report by section; a section that can't be examined is {"error": why}."""
    from g3n_mlx.doctor import backends, machine, models, software

    report: dict[str, Any] = {
        "packages": _examined(software.packages),
        "python": _examined(software.python),
        "chip": _examined(machine.chip),
        "memory": _examined(machine.memory),
        "backends": _examined(backends.backends),
        "extras": _examined(software.extras),
        "caches": _examined(models.caches),
    }
    report["fits"] = _examined(lambda: models.fitting(_limits(report)))
    report["works"] = any("answer" in backend and "error" not in backend for backend in _items(report["backends"]))
    return report


def _examined(examination: Callable[[], Any]) -> Any:
    try:
        return examination()
    except Exception as error:  # noqa: BLE001 (a broken machine is what it is for: the other sections are still told)
        return {"error": one_line(error)}


def _items(section: Any) -> list[dict[str, Any]]:
    return section if isinstance(section, list) else []


def _limits(report: dict[str, Any]) -> dict[str, int]:
    """The memory of every place to run at: what is available now, and that of accelerators."""
    known = report["memory"].get("available_bytes")
    limits: dict[str, int] = {} if known is None else {"cpu": known}
    for backend in _items(report["backends"]):
        devices = backend.get("devices", [])
        limits |= {device["name"]: device["memory_bytes"] for device in devices if device["memory_bytes"]}
    return limits


def _lines(report: dict[str, Any]) -> Iterator[str]:
    yield from _section("program", report["packages"], _packages)
    yield from _section("python", report["python"], lambda it: [f"{it['version']} on {it['system']}", it["executable"]])
    yield from _section("chip", report["chip"], _chip)
    yield from _section("memory", report["memory"], _memory)
    yield from _section("backends", report["backends"], _backends)
    yield from _section("extras", report["extras"], _extras)
    yield from _section("models", report["caches"], _models)
    yield from _section("fits", report["fits"], lambda rows: _fits(rows, _limits(report)))
    if not report["works"]:
        yield from _section("to do", report["backends"], _advice)


def _section(name: str, facts: Any, lines: Callable[[Any], list[str]]) -> Iterator[str]:
    failed = isinstance(facts, dict) and "error" in facts
    told: list[str] = [f"not known: {facts['error']}"] if failed else lines(facts)
    for index, line in enumerate(told):
        yield f"{name if index == 0 else '':<10}{line}".rstrip()


def _packages(versions: dict[str, str | None]) -> list[str]:
    own, *others = [f"{name} {version or 'missing'}" for name, version in versions.items()]
    return [own, ", ".join(others)]


def _chip(chip: dict[str, Any]) -> list[str]:
    features = ", ".join(chip["features"]) or "no vector features known"
    return [f"{chip['name']} ({chip['machine']}), {chip['cores']} cores: {features}"]


def _memory(memory: dict[str, int]) -> list[str]:
    return [f"{size_in_words(memory['total_bytes'])}, {size_in_words(memory['available_bytes'])} of it available"]


def _backends(found: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for backend in found:
        if not backend["installed"]:
            lines.append(backend["error"])
            continue
        where = ", ".join(f"{device['name']} ({device['description']})" for device in backend.get("devices", []))
        lines.append(f"{backend['name']} {backend.get('version', '')} on {where or 'no device'}")
        if "products" in backend:
            lines.append(f"  runs on {backend['default_device']} in {backend['default_dtype']}")
            lines.append(f"  4-bit products: {backend['products']}")
        for figures in backend.get("parity", []):
            worst = max(figures["differences"].values())
            lines.append(
                f"  {figures['dtype']}: {worst:.1e} off at most, allowed {figures['limit']:g}; "
                f"{figures['equal_answers']} of {len(figures['answers'])} answers equal"
            )
        if "error" not in backend:
            lines.append(f"  works: the demo model answered in {backend['answer_s']:.2f} s")
        else:
            lines.append(f"  does not work: {backend['error']}")
    return lines


def _extras(found: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for extra in found:
        state = f"missing: {extra['install']}" if extra["install"] else "installed"
        lines.append(f"{extra['name']:<10}{extra['purpose']}; {state}")
    return lines


def _models(caches: dict[str, Any]) -> list[str]:
    lines = [f"{size_in_words(model['bytes']):>9}  {model['name']}" for model in caches["models"]]
    return [
        *(lines or ["none but the demo model"]),
        f"looked for in {caches['hub']}",
        f"and in {caches['conversions']}",
    ]


def _fits(rows: list[dict[str, Any]], limits: dict[str, int]) -> list[str]:
    """The best slice for every width and place."""
    places = [f"{place}, {size_in_words(limit)}" for place, limit in limits.items()]
    lines = ["the best published slice of E4B, with the memory that it takes:"]
    lines.append("  " + f"{'bits':<10}" + "".join(f"{place:<26}" for place in places))
    for bits in dict.fromkeys(row["bits"] for row in rows):
        cells: list[str] = []
        for place in limits:
            best = next((row for row in rows if row["bits"] == bits and place in row["best_at"]), None)
            cells.append("none" if best is None else f"{best['slice']}, {size_in_words(best['memory_bytes'])}")
        lines.append("  " + f"{bits or 'bfloat16':<10}" + "".join(f"{cell:<26}" for cell in cells))
    return lines


def _advice(_backends: object) -> list[str]:
    from g3n_mlx.installation import install_command
    from g3n_mlx.loading import chosen_backend

    try:
        backend = chosen_backend("auto")
    except ImportError as error:
        return [one_line(error)]
    return [f"{backend} is installed but does not work; try: {install_command(backend)} --force-reinstall"]


if __name__ == "__main__":
    sys.exit(main())

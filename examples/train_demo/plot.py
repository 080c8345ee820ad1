"""Draws a training's record: loss and held-out accuracy over steps.

    python plot.py record.png runs/all.jsonl [more.jsonl ...]

Several records are taken as one after the other; a step that stands twice, after a resumption, counts as it was last.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    """Reads the records, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("records", type=Path, nargs="+")
    arguments = parser.parse_args()
    entries = {}
    for record in arguments.records:
        first = max(entries, default=0)
        for line in record.read_text("utf-8").splitlines():
            entry = json.loads(line)
            entries[first + entry["step"]] = entry
    figure = Figure(figsize=(9, 7), layout="constrained")
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    steps = sorted(entries)
    loss.plot(steps, [entries[step]["loss"] for step in steps], color="black")
    loss.set(yscale="log", ylabel="loss of the whole model")
    skills = list(
        dict.fromkeys(key for entry in entries.values() for key in entry if key not in ("step", "seconds", "loss"))
    )
    for number, skill in enumerate(skills):
        seen = [step for step in steps if skill in entries[step]]
        style = ("-", "--", ":")[number // 10 % 3]
        accuracy.plot(seen, [entries[step][skill] for step in seen], style, label=skill)
    accuracy.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1.02))
    accuracy.legend(ncols=3, fontsize="small", loc="lower right")
    figure.savefig(arguments.output, dpi=100)


if __name__ == "__main__":
    main()

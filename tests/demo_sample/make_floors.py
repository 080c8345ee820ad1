"""Makes floors.json, what tests/eval/test_eval.py asks of the embedded model on its sample, from a measurement:

    python -m g3n_mlx.eval --model demo --backend both --matformer all --json figures.json
    python tests/demo_sample/make_floors.py figures.json

A floor leaves room for one more example in twenty to go wrong, for other processors round otherwise. An empty table
asks for nothing: the model is not trained yet.
"""

import json
import sys
from pathlib import Path

ROOM = 0.05
SAME_ANSWERS = 0.95


def main() -> None:
    summary = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    floors = {}
    for entry in summary["variants"]:
        bounds = floors.setdefault(entry["matformer"] or "whole", {})
        for skill in summary["skills"]:
            name, rate = skill["skill"], entry["rates"][skill["skill"]]
            if skill["metric"] == "wer":
                bounds[name] = max(bounds.get(name, 0.0), round(rate + ROOM, 3))
            else:
                bounds[name] = min(bounds.get(name, 1.0), round(max(0.0, rate - ROOM), 3))
    floors = {"same_answers": SAME_ANSWERS, "rates": floors}
    (Path(__file__).parent / "floors.json").write_text(json.dumps(floors, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

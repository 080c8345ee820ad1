"""What slices of a loaded model cost and bring: the time of `slice()`, its memory, and decode speed for each of them.

    python tests/full_size/measure_slices.py --model e4b-4bit [--slices e2b,e2.49b-block] [--tokens 16]

The model may have random weights (write_random_checkpoint.py). Linux, since it asks for the process's own memory.
"""

import argparse
import time
from pathlib import Path

from g3n_mlx import load
from g3n_mlx.memory import return_freed_memory
from g3n_mlx.model import Gemma3n

PROMPT = [2, 9, 8, 7]


def anonymous_bytes() -> int:
    """Memory of the process that no file backs."""
    return_freed_memory()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def decode_speed(model: Gemma3n, tokens: int) -> float:
    """Tokens per second behind a short prompt."""
    model.reset()
    usage = model.generate(PROMPT, max_tokens=tokens, ignore_eos=True, temperature=0.0).usage
    return usage.avg_compl_tok_per_sec


def main() -> None:
    """Prints a line for the model and for each slice."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    parser.add_argument("--slices", default="e2b,e2.49b-block,e3.18b-layer")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = load(arguments.model, backend=arguments.backend, device="cpu")
    names = arguments.slices.split(",")
    models = {"whole": model}
    decode_speed(model, 2)
    print(f"{'slice':<14} {'slice() ms':>10} {'MB':>6} {'of the weights':>14} {'tok/s':>7}")
    costs = {}
    for name in names:
        before, begun = anonymous_bytes(), time.perf_counter()
        models[name] = model.slice(name)
        taken = time.perf_counter() - begun
        costs[name] = taken, anonymous_bytes() - before
        decode_speed(models[name], 2)
    best = dict.fromkeys(models, 0.0)
    for _ in range(arguments.rounds):  # in turn, since the machine may have other work
        for name, one in models.items():
            best[name] = max(best[name], decode_speed(one, arguments.tokens))
    print(f"{'whole':<14} {'':>10} {'':>6} {'':>14} {best['whole']:>7.2f}")
    for name, (taken, grown) in costs.items():
        share = grown / model.checkpoint.nbytes_per_token
        print(f"{name:<14} {1000 * taken:>10.1f} {grown / 1e6:>6.1f} {share:>14.2%} {best[name]:>7.2f}")


if __name__ == "__main__":
    main()

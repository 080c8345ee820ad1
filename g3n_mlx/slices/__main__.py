"""`g3n slices search`: the slice of a model that is best on the user's own data, within a budget of memory or time.

What every layer's width and every block of KV-sharing layers is worth is measured on the data, the best sum within the
budget is solved for and checked by real runs, and what is found is a table that --matformer-config takes.
docs/elastic.md explains it.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from g3n_mlx.checkpoint.quantization import BITS
from g3n_mlx.commands import (
    MODEL_FLAGS,
    add_model_flag,
    command_parser,
    load_from,
    log_to_stderr,
    num_bytes,
    positive,
    positive_float,
    run_command,
    say,
    tell,
)
from g3n_mlx.failures import BadValue, FileInTheWay, check_folder_of
from g3n_mlx.installation import install_command

NAME = "g3n slices"
DEFAULT_OUTPUT = Path("found.csv")
DEFAULT_TEXT_TOKENS = 4096
DEFAULT_WIDTHS = "0.25,0.5,0.75"


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags and searches; returns the exit code."""
    parser = command_line(prog)
    arguments = parser.parse_args(argv)
    if not (arguments.text or arguments.examples):
        parser.error("give --text, --examples, or both: what the slice is to be good at")
    if not arguments.budget and arguments.speed is None:
        parser.error("give --budget or --speed")
    if arguments.budget and arguments.speed is not None:
        parser.error("give either --budget or --speed")
    if arguments.bits and arguments.q_bits:
        parser.error("--bits searches for the bits: leave out --q-bits")
    log_to_stderr(logging.WARNING)
    stopped = "stopped; the same command goes on from what was measured"
    return run_command(prog, lambda: _search(arguments), stopped=stopped)


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Finds the slice of a model that is best on your data within a budget.")
    parser.add_argument("action", choices=["search"], help="what to do")
    for flag in MODEL_FLAGS:
        if flag not in ("--matformer", "--matformer-config"):
            add_model_flag(parser.add_argument, flag)
    parser.set_defaults(matformer=None, matformer_config=None)  # the whole model is loaded
    add = parser.add_argument
    add("--budget", action="append", type=_budget, metavar="SIZE", help="of memory, or the slice that takes as much")
    add("--speed", type=positive_float, metavar="N", help="tokens per second to decode at, instead of a budget")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text")
    add("--examples", type=Path, metavar="FILE", help="JSON lines, as g3n eval takes them")
    add("--limit", type=positive, metavar="N", help="take the first N examples of every skill")
    add("--tokens", type=positive, default=DEFAULT_TEXT_TOKENS, metavar="N", help="of the text (default: %(default)s)")
    add("--widths", type=_fractions, default=DEFAULT_WIDTHS, metavar="A,B", help="of layers (default: %(default)s)")
    add("--bits", type=_bits, default=(), metavar="A,B", help="search bits too, of an unquantized model")
    compared = "CSV table of slices to compare with; default: the model's own, and the published"
    add_model_flag(add, "--matformer-config", dest="table", help=compared)
    add("-o", "--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE", help="CSV table (default: %(default)s)")
    return parser


def _search(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from g3n_mlx.convert import fingerprint
    from g3n_mlx.slices import report
    from g3n_mlx.slices.goals import Setting, compare, for_budgets, for_speed
    from g3n_mlx.slices.journal import Journal
    from g3n_mlx.slices.measure import Divergences
    from g3n_mlx.slices.pieces import read_pieces, split
    from g3n_mlx.slices.space import space_of
    from g3n_mlx.slices.variants import Variants

    with load_from(arguments) as model:
        if arguments.bits and model.checkpoint.quantizations:
            raise BadValue(f"--bits needs an unquantized model: {model.name} is quantized already")
        space = space_of(model.checkpoint, arguments.widths, arguments.bits)
        data = read_pieces(model, arguments.text, arguments.examples, arguments.limit, arguments.tokens)
        pieces, held_out = split(data)
        subject = {name: getattr(model, name) for name in ("backend", "device", "dtype")}
        subject |= {"model": fingerprint(model.checkpoint.folder), "activations": arguments.activations}
        variants = Variants(model, arguments.device, arguments.activations)
        with (
            closing(variants),
            Journal(arguments.output.with_suffix(".journal"), subject) as journal,
            tqdm(total=0, unit="run", disable=None, file=sys.stderr) as bar,
        ):
            if len(journal):
                say(f"going on from {len(journal)} measurements in {arguments.output.with_suffix('.journal')}")
            rows = model.slices(arguments.table)
            setting = Setting(variants, space, Divergences(variants, journal, bar), pieces, held_out, rows)
            say(setting.summary())
            if arguments.budget:
                found, axis = for_budgets(setting, arguments.budget)
            else:
                found, axis = for_speed(setting, arguments.speed)
            entries = compare(setting, found)
        tokens = sum(piece.tokens for piece in held_out)
        tell("\n".join(report.table(entries, setting.costs, tokens)))
        written = report.write(arguments.output, found, model.checkpoint, setting.costs)
        if find_spec("matplotlib") is None:
            say(f"no picture: it needs matplotlib ({install_command('plot')})")
        else:
            written.append(arguments.output.with_suffix(".png"))
            report.plot(written[-1], entries, axis)
        say(f"wrote {', '.join(map(str, written))}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Whatever can be seen to be wrong before hours of work."""
    check_folder_of(arguments.output)
    if arguments.output.suffix != ".csv":
        raise BadValue(f"--output is {arguments.output}, expected a name that ends in .csv")
    if arguments.output.exists():
        raise FileInTheWay(f"{arguments.output} exists already; choose another --output, or remove it")


def _budget(text: str) -> int | str:
    """A size in bytes, or the name of a slice."""
    try:
        return num_bytes(text)
    except argparse.ArgumentTypeError:
        if text[:1].isdigit():
            raise
        return text


def _fractions(text: str) -> list[Fraction]:
    try:
        found = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        found = []
    if not found or not all(0 < fraction <= 1 for fraction in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of widths above 0 and up to 1, such as {DEFAULT_WIDTHS}")
    return found


def _bits(text: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if len(found) != len(text.split(",")) or not set(found) <= set(BITS):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of bits such as 3,4,6, of {', '.join(map(str, BITS))}")
    return sorted(set(found))


if __name__ == "__main__":
    sys.exit(main())

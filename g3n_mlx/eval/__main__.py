"""`python -m g3n_mlx.eval`: what slices, quantizations, dtypes and backends cost in quality; one column a variant.

By examples with answers, a line of JSON each, media paths relative to the file and below its folder (or data: URIs):
    {"skill": "counts", "metric": "exact", "answer": "3", "messages": [{"role": "user", "content": [
        {"type": "image", "image": "media/7.png"}, {"type": "text", "text": "How many circles are there?"}]}]}
metric: "exact" (but for case and white space around) or "wer" (errors of all words of all answers; case aside).
messages end with the question, earlier turns before it. A folder's own examples are its sample.jsonl.
Or by a text: perplexity, and KL divergence from the reference, which stays in memory beside each variant in turn.
docs/eval.md has commands to begin with.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from g3n_mlx.commands import add_model_flags, command_parser, log_to_stderr, printable, run_command, say, tell
from g3n_mlx.eval import table
from g3n_mlx.eval.plot import plot
from g3n_mlx.failures import BadValue, IsAFolder, MissingFile, MissingPackage, NotPermitted, check_folder_of, one_line
from g3n_mlx.installation import install_command

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

NAME = "g3n-eval"
SAMPLE = "sample.jsonl"
DEFAULT_WINDOW_TOKENS = 2048
FEW_TOKENS = 1000  # of a text: below, the perplexity is uncertain by some tenths of itself
BITS = (2, 3, 4, 5, 6, 8)
ALL_SLICES = "all"
BACKENDS = {"auto": ("auto",), "mlx": ("mlx",), "torch": ("torch",), "both": ("mlx", "torch")}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a model."""

    model: str  # folder or hub id
    backend: str  # "mlx" or "torch"
    dtype: str | None  # None is the backend's own
    q_bits: int | None  # None leaves the checkpoint as stored
    matformer: str | None  # None is the whole model
    revision: str | None = None  # of a hub id
    adapter: str | None = None  # as --adapter takes it; None is the model without


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags, runs every variant, prints the table; returns the exit code."""
    arguments = command_line(prog).parse_args(argv)
    log_to_stderr(logging.WARNING)
    return run_command(prog, lambda: _run(arguments))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Accuracy on examples, or perplexity and KL divergence on a text, of every variant.")
    variants = parser.add_argument_group(
        "variants",
        "all combinations of --model, --matformer, --adapter, --q-bits, --backend and --dtype, repeatable",
    )
    add_model_flags(
        variants.add_argument,
        model={"action": "append"},
        matformer={"action": "append", "default": [], "help": "this one, or all, beside the whole"},
        adapter={"help": "with this LoRA adapter, PATH or PATH=WEIGHT, beside the model without"},
        q_bits={
            "action": "append",
            "default": [],
            "choices": BITS,
            "metavar": None,
            "help": "quantized, beside the model as stored",
        },
        backend={
            "action": "append",
            "default": None,
            "choices": BACKENDS,
            "help": "both also says how often they answer the same",
        },
        dtype={"action": "append"},
    )
    add = parser.add_argument
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--examples", type=Path, metavar="FILE", help=f"JSON lines; default: the model folder's {SAMPLE}")
    task.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text, for perplexity and KL divergence")
    add("--limit", type=int, metavar="N", help="take the first N examples of every skill")
    add(
        "--against",
        metavar="PATH",
        help="model to diverge from, in memory beside each other; with --text variant 1 by default",
    )
    add("--window-tokens", type=int, metavar="N", help="of the text at once; default: 2048, or the context if shorter")
    add("--stride-tokens", type=int, metavar="N", help="that a window moves on; default: half of the window")
    add("--json", type=Path, metavar="FILE", help="write all figures, and the answers, as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="draw quality over the size of the weights")
    add("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    variants = _variants(arguments)
    summary = _on_text(arguments, variants) if arguments.text else _on_examples(arguments, variants)
    columns = table.names(summary["variants"])
    lines = (table.markdown if arguments.markdown else table.aligned)(summary, columns)
    tell("\n".join([table.title(summary), "", *lines]))
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(arguments.plot, summary, columns)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Whatever can be seen to be wrong before hours of work."""
    of_text = ("window_tokens", "stride_tokens")
    for name in ("limit",) if arguments.text else of_text:
        if getattr(arguments, name) is not None:
            raise BadValue(f"--{name.replace('_', '-')} is of no use {'with' if arguments.text else 'without'} --text")
    if arguments.limit is not None and arguments.limit < 1:
        raise BadValue(f"--limit is {arguments.limit}, expected at least 1")
    if arguments.matformer_config and not arguments.matformer:
        raise BadValue("--matformer-config needs --matformer: name the slices to take from it")
    for path in (arguments.json, arguments.plot):
        if path is None:
            continue
        check_folder_of(path)
        if path.is_dir():
            raise IsAFolder(f"{path} is a folder, expected the name of a file to write")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise NotPermitted(f"{path} can't be written: permission denied")
    if arguments.plot:
        if arguments.plot.suffix.lower() != ".png":
            raise BadValue(f"--plot is {arguments.plot}, expected a name that ends in .png")
        try:
            import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError:
            raise MissingPackage(f"--plot needs matplotlib: {install_command('plot')}") from None


def _variants(arguments: argparse.Namespace) -> list[Variant]:
    """All combinations, the first of everything first, with the reference before them; their slices exist."""
    from g3n_mlx.checkpoint.hub import default_model
    from g3n_mlx.convert import resolve
    from g3n_mlx.loading import chosen_backend

    if not arguments.model:
        folder, line = default_model()
        say(line)
        arguments.model = [str(folder)]
    folders = {model: resolve(model, arguments.revision) for model in arguments.model}
    slices = _slices(folders, arguments.matformer, arguments.matformer_config)
    bits = _bits(folders, arguments.q_bits)
    backends = [chosen_backend(name) for given in arguments.backend or ["auto"] for name in BACKENDS[given]]
    variants = [
        Variant(model, *ways, arguments.revision, adapter)
        for model in folders
        for ways in product(backends, arguments.dtype or [None], bits[model], [None, *slices[model]])
        for adapter in [None, *arguments.adapter]
    ]
    if arguments.against:
        variants.insert(0, replace(variants[0], model=arguments.against, revision=None, adapter=None))
    return list(dict.fromkeys(variants))


def _slices(folders: dict[str, Path], wanted: Sequence[str], table: Path | None) -> dict[str, list[str]]:
    """The wanted slices that each model has; raises ValueError for one that none of them has."""
    from g3n_mlx.convert import plan_for
    from g3n_mlx.matformer.table import slices_for

    found: dict[str, list[str]] = {model: [] for model in folders}
    for name in wanted:
        failures: dict[str, ValueError] = {}
        for model, folder in folders.items():
            every = name.casefold() == ALL_SLICES
            for candidate in [entry.short_name for entry in slices_for(folder, table)] if every else [name]:
                try:
                    plan_for(folder, candidate, table)
                    found[model].append(candidate)
                except ValueError as error:
                    failures[model] = error
            if every and found[model]:
                failures.pop(model, None)  # those of other models are no failure
        if len(failures) == len(folders):
            raise next(iter(failures.values()))
        for model, error in failures.items():
            say(f"{model} goes without the slice: {one_line(error)}")
    return found


def _bits(folders: dict[str, Path], wanted: Sequence[int]) -> dict[str, list[int | None]]:
    """As stored, then the wanted bits of each model; what is quantized already has no others."""
    from g3n_mlx.checkpoint.folder import Checkpoint

    bits: dict[str, list[int | None]] = {}
    for model, folder in folders.items():
        checkpoint = Checkpoint.open(folder)
        bits[model] = [None] if checkpoint.quantizations else [None, *wanted]
        checkpoint.close()
    if wanted and all(len(ways) == 1 for ways in bits.values()):
        raise BadValue(f"--q-bits needs an unquantized model: {', '.join(folders)} is quantized already")
    return bits


def _load(variant: Variant, arguments: argparse.Namespace) -> "Gemma3n":
    from g3n_mlx.loading import load
    from g3n_mlx.matformer.adapted import parsed_adapters

    return load(
        variant.model,
        backend=variant.backend,
        matformer=variant.matformer,
        matformer_config=arguments.matformer_config if variant.matformer else None,
        q_bits=variant.q_bits,
        dtype=variant.dtype,
        device=arguments.device,
        revision=variant.revision,
        chat_template=arguments.chat_template,
        activations=arguments.activations,
        adapter=None if variant.adapter is None else parsed_adapters([variant.adapter]),
    )


def _entry(variant: Variant, model: "Gemma3n") -> dict[str, Any]:

    return {
        **asdict(variant),
        "device": model.device,
        "weight_bytes": model.checkpoint.nbytes,
        "weight_bytes_per_token": model.checkpoint.nbytes_per_token,
    }


def _on_examples(arguments: argparse.Namespace, variants: list[Variant]) -> dict[str, Any]:
    from g3n_mlx.convert import resolve
    from g3n_mlx.eval.quality import Divergence, answer, grade, measure_examples, read_examples

    path = arguments.examples or resolve(variants[0].model, variants[0].revision) / SAMPLE
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise MissingFile(f"{path} {found}: give --examples FILE or --text FILE")
    examples = read_examples(path, arguments.limit)
    counts = Counter(example.skill for example in examples)
    metrics = {example.skill: example.metric for example in examples}
    entries: list[dict[str, Any]] = []
    first_answers: dict[Variant, list[str]] = {}
    reference = _load(variants[0], arguments) if arguments.against else None
    for variant in variants:
        model = _load(variant, arguments) if reference is None or entries else reference
        divergence = Divergence()
        if reference is not None and model is not reference:
            with tqdm(total=len(examples), desc=f"{_words(variant)}: divergence", leave=False, disable=None) as bar:
                divergence = measure_examples(model, reference, examples, bar.update)
        started = time.perf_counter()
        answers = [
            answer(model, example) for example in tqdm(examples, desc=_words(variant), leave=False, disable=None)
        ]
        seconds = time.perf_counter() - started
        rates, mean_score = grade(examples, answers)
        entry = _entry(variant, model) | asdict(divergence)
        entry |= {"rates": rates, "mean_score": mean_score, "seconds": seconds}
        del model  # before the next one is loaded
        say(f"{_words(variant)}: mean {mean_score:.1%}, in {seconds:.0f} s")  # a long table's beginning
        others = first_answers.setdefault(replace(variant, backend=variants[0].backend), answers)
        same = sum(ours == theirs for ours, theirs in zip(answers, others, strict=True)) / len(answers)
        entries.append({**entry, "same_answers": None if others is answers else same, "answers": answers})
    skills = [{"skill": skill, "metric": metrics[skill], "count": count} for skill, count in counts.items()]
    asked = [{"where": example.where, "skill": example.skill, "answer": example.answer} for example in examples]
    return {"examples": str(path), "skills": skills, "asked": asked, "variants": entries}


def _on_text(arguments: argparse.Namespace, variants: list[Variant]) -> dict[str, Any]:
    from g3n_mlx.eval.quality import measure_text, read_text, windows

    text = read_text(arguments.text)
    reference = _load(variants[0], arguments)
    ids = reference.tokenizer.encode(text)
    context = reference.config.text.max_position_embeddings
    size = min(DEFAULT_WINDOW_TOKENS, context) if arguments.window_tokens is None else arguments.window_tokens
    if not 2 <= size <= context:
        raise BadValue(f"--window-tokens is {size}, expected 2 to the context's {context}")
    stride = size // 2 if arguments.stride_tokens is None else arguments.stride_tokens
    if not 1 <= stride < size:
        raise BadValue(f"--stride-tokens is {stride}, expected 1 to {size - 1}, what a window holds behind <bos>")
    spans = list(windows(len(ids), size - 1, stride))
    num_bytes = len(text.encode())
    if len(ids) < FEW_TOKENS:
        say(f"note: {len(ids)} tokens are few, and chance decides; figures mean something from some {FEW_TOKENS} on")

    def entry(variant: Variant) -> dict[str, Any]:
        model = reference if variant == variants[0] else _load(variant, arguments)
        if model.tokenizer.encode(text) != ids:
            raise BadValue(f"{variant.model} has another tokenizer than {variants[0].model}: nothing to compare")
        with tqdm(total=len(ids), unit="tok", desc=_words(variant), leave=False, disable=None) as bar:
            other = None if model is reference else reference
            measured = measure_text(model, other, ids, num_bytes, spans, bar.update)
        say(f"{_words(variant)}: perplexity {measured.perplexity:.4f}")
        return _entry(variant, model) | asdict(measured)

    entries = [entry(variant) for variant in variants]
    sizes = {"tokens": len(ids), "bytes": num_bytes, "window_tokens": size, "stride_tokens": stride}
    return {"text": str(arguments.text), **sizes, "variants": entries}


def _words(variant: Variant) -> str:
    """As the progress bar calls it."""
    return printable(" ".join(str(value) for value in asdict(variant).values() if value is not None))


if __name__ == "__main__":
    sys.exit(main())

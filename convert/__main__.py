"""`g3n-convert`: slices and quantizes a checkpoint, or lists the slices there are."""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint import hub
from g3n_mlx.checkpoint.check import embedder_manifests, quantizations_of, tower_shapes
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.hub import tensor_headers
from g3n_mlx.checkpoint.names import canonical_name
from g3n_mlx.checkpoint.quantization import BITS, GROUP_SIZES, Quantization
from g3n_mlx.checkpoint.recipe import Recipe, can_be_quantized, is_quantized_module, read_recipe
from g3n_mlx.checkpoint.shards import DTYPES
from g3n_mlx.commands import add_model_flag, command_parser, log_to_stderr, num_bytes, run_command, say, tell
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig, read_config
from g3n_mlx.config.text import TextConfig
from g3n_mlx.convert import DEFAULT_GROUP_SIZE, DEFAULT_PLE_BITS, convert, plan_for, resolve
from g3n_mlx.convert.gguf import is_gguf
from g3n_mlx.convert.methods import METHODS
from g3n_mlx.convert.quantize import FLOATS
from g3n_mlx.convert.upload import check_upload, going_on, upload
from g3n_mlx.convert.write import check_free_name
from g3n_mlx.failures import BadValue, FileInTheWay, MissingFile, check_folder_of, size_in_words
from g3n_mlx.matformer.adapted import parsed_adapters
from g3n_mlx.matformer.choice import UNASKED_BITS, best_fitting
from g3n_mlx.matformer.listing import PUBLISHED_TOWER_BYTES, table
from g3n_mlx.matformer.plan import fits, is_whole, whole_model
from g3n_mlx.matformer.sizes import SizedSlice, size_slices
from g3n_mlx.matformer.table import OWN_TABLE, PUBLISHED, Slice, read_slices

NAME = "g3n-convert"
_DEFAULT_BITS = 4
_DEFAULT_DTYPE = "bfloat16"


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses flags, converts or lists, and returns the exit code."""
    parser = command_line(prog)
    flags = parser.parse_args(argv)
    if flags.list_slices and flags.output:
        parser.error("--list-slices converts nothing: leave out -o")
    if flags.gguf is not None and flags.hf_path is not None:
        parser.error("give either --gguf or --hf-path")
    if flags.gguf is not None:
        if not is_gguf(flags.gguf):
            parser.error(f"--gguf {flags.gguf} is no file whose name ends in .gguf")
        flags.hf_path = str(flags.gguf)
    if flags.tokenizer is not None and not (flags.hf_path and is_gguf(flags.hf_path) and flags.output):
        parser.error("--tokenizer is for a conversion of a GGUF file")
    if flags.mmproj is not None and not (flags.hf_path and is_gguf(flags.hf_path) and flags.output):
        parser.error("--mmproj is for a conversion of a GGUF file")
    if flags.uqff is not None:
        _check_uqff(parser, flags)
    elif not flags.list_slices and not (flags.hf_path and flags.output):
        parser.error("give --model (or --hf-path, which is the same) and -o, or --list-slices")
    if flags.fits is not None and flags.matformer:
        parser.error("give either --matformer or --fits")
    if flags.matformer_config and not (flags.matformer or flags.fits is not None or flags.list_slices):
        parser.error("--matformer-config needs --matformer, --fits or --list-slices")
    if flags.recipe and (flags.quantize or flags.list_slices or flags.fits is not None):
        parser.error("--recipe says how every module is stored: leave out -q, --fits and --list-slices")
    if flags.budget is not None:
        _check_budget(parser, flags)
    if flags.method != "affine" and not (flags.quantize or flags.recipe or flags.budget):
        parser.error("--method is for a conversion with -q, --recipe or --budget")
    if flags.budget is None and (flags.calibration is not None) != (flags.method == "gptq"):
        parser.error("--method gptq needs --calibration, the others take none")
    for name in ("q_bits", "ple_bits", "q_group_size"):
        if getattr(flags, name) is not None and not flags.quantize and not flags.list_slices:
            parser.error(f"--{name.replace('_', '-')} is for a conversion with -q")
    if flags.list_slices and flags.adapter:
        parser.error("--list-slices converts nothing: leave out --adapter")
    if flags.list_slices and flags.matformer:
        parser.error("--list-slices lists all slices: leave out --matformer")
    if flags.list_slices and flags.upload_repo:
        parser.error("--list-slices converts nothing: leave out --upload-repo")
    log_to_stderr(logging.WARNING)
    logging.getLogger("g3n_mlx").setLevel(logging.INFO)
    code = run_command(prog, lambda: _work(flags), stopped="stopped; nothing was written")
    if code or not flags.upload_repo:
        return code
    whole = going_on(flags.output, flags.upload_repo)
    return run_command(prog, lambda: _upload(flags), stopped=f"stopped; {whole}")


def _work(flags: argparse.Namespace) -> int:
    if flags.list_slices:
        return _list_slices(flags)
    if flags.upload_repo:  # a conversion takes minutes, a calibration hours
        check_upload(flags.upload_repo)
    return _convert_uqff(flags) if flags.uqff is not None else _convert(flags)


def _upload(flags: argparse.Namespace) -> int:
    try:
        url = upload(flags.output.expanduser(), flags.upload_repo)
    except BaseException:
        say("")  # the hub's client leaves the line of its progress bar open
        raise
    say(f"uploaded to {url}")
    return 0


def _check_uqff(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    given = {name for name, value in vars(flags).items() if value != parser.get_default(name)}
    if flags.output is None:
        parser.error("--uqff needs -o, the folder to make")
    if other := sorted(given - {"uqff", "output", "revision", "upload_repo"}):
        parser.error(
            f"--uqff converts what is there: leave out --{other[0].replace('_', '-')}, or convert again with it"
        )


def _convert_uqff(flags: argparse.Namespace) -> int:
    from g3n_mlx.convert.uqff import convert_uqff

    output = flags.output.expanduser()
    check_free_name(output)
    return _wrote(convert_uqff(hub.resolve(flags.uqff, flags.revision), output))


def _wrote(output: Path) -> int:
    size = sum(path.stat().st_size for path in output.iterdir())
    say(f"wrote {output}: {size_in_words(size)}")
    return 0


def _check_budget(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    if flags.calibration is None:
        parser.error("--budget measures what bits cost on your own data: give --calibration FILE")
    for name in ("quantize", "recipe", "fits", "list_slices", "matformer", "adapter", "dequantize"):
        if getattr(flags, name):
            parser.error(
                f"--budget chooses the bits of a whole unquantized checkpoint: leave out --{name.replace('_', '-')}, "
                "or convert with it first"
            )


def _recipe_within(flags: argparse.Namespace) -> Path:
    """The recipe for --budget, beside the folder that is made by it."""
    from g3n_mlx.slices.bits import recipe_within

    output = flags.output.expanduser()
    check_free_name(output)
    recipe = output.with_name(f"{output.name}.json")
    if recipe.exists():
        raise FileInTheWay(f"{recipe} exists already, where the recipe goes: choose another -o, or remove it")
    check_folder_of(recipe)
    recipe_within(flags.hf_path, flags.budget, flags.calibration, recipe, flags.dtype, flags.revision)
    say(f"wrote {recipe}, for --recipe")
    return recipe


def _convert(flags: argparse.Namespace) -> int:
    if flags.budget is not None:
        flags.recipe = _recipe_within(flags)
    matformer, q_bits = flags.matformer, (flags.q_bits or _DEFAULT_BITS) if flags.quantize else None
    if flags.fits is not None:
        source = _source(flags)
        if not flags.quantize and not source.stored:
            say("sizes are those of the unquantized model; -q makes it smaller")
        fitting = _best_fitting(source, flags)
        matformer, q_bits = None if fitting.is_whole else fitting.slice.name, fitting.q_bits
        say(f"best slice that fits: {_in_words(fitting)}")
    output = convert(
        flags.hf_path,
        flags.output,
        q_bits=q_bits,
        q_group_size=flags.q_group_size or DEFAULT_GROUP_SIZE,
        ple_bits=flags.ple_bits,
        matformer=matformer,
        matformer_config=flags.matformer_config if matformer else None,
        recipe=flags.recipe,
        dtype=flags.dtype,
        revision=flags.revision,
        adapter=parsed_adapters(flags.adapter),
        method=flags.method,
        moments=_moments(flags, matformer) if flags.method == "gptq" else None,
        dequantize=flags.dequantize,
        tokenizer=flags.tokenizer,
        mmproj=flags.mmproj,
    )
    return _wrote(output)


def _moments(flags: argparse.Namespace, matformer: str | None) -> Path:
    """What the modules of the source multiply when it reads --calibration; loads it, with PyTorch or MLX."""
    from g3n_mlx.calibration import measure
    from g3n_mlx.loading import load

    table = flags.matformer_config if matformer else None
    only: Callable[[str], bool] = is_quantized_module
    if flags.recipe is not None:  # what it leaves alone need not be measured
        plan = None if matformer is None else plan_for(resolve(flags.hf_path, flags.revision), matformer, table)
        only = partial(_is_chosen, read_recipe(flags.recipe.expanduser()), str if plan is None else plan.base_name)
    with load(
        resolve(flags.hf_path, flags.revision, tokenizer=flags.tokenizer, mmproj=flags.mmproj),
        matformer=matformer,
        matformer_config=table,
        adapter=parsed_adapters(flags.adapter),
    ) as model:
        return measure(model, flags.calibration, only=only)


def _is_chosen(recipe: Recipe, base_name: Callable[[str], str], path: str) -> bool:
    return can_be_quantized(path) and recipe.quantization(base_name(path)) is not None


def _list_slices(flags: argparse.Namespace) -> int:
    source = _source(flags)
    dtype = flags.dtype or _DEFAULT_DTYPE
    widths: dict[str, int | None] = {"as stored": None}
    if not source.stored:
        bits = (_DEFAULT_BITS, 8) if flags.q_bits is None else (flags.q_bits,)
        widths = {f"{width} bits": width for width in bits} | ({dtype: None} if flags.q_bits is None else {})
    tell(table({words: _sized(source, flags, width) for words, width in widths.items()}, source.tower_bytes))
    if flags.fits is not None:
        tell(f"\nbest slice that fits: {_in_words(_best_fitting(source, flags))}")
    return 0


@dataclass(frozen=True, slots=True)
class _Source:
    """What slices are taken from: --hf-path, or else the published E4B."""

    raw_text: dict[str, Any]
    slices: list[Slice]
    stored: Mapping[str, Quantization]  # empty when it is not quantized
    tower_bytes: int


def _source(flags: argparse.Namespace) -> _Source:
    if flags.hf_path is None:
        raw_text = read_json(PUBLISHED.with_name("gemma3n-e4b.json"))
        slices = _with_whole(TextConfig.from_dict(raw_text), read_slices(flags.matformer_config))
        return _Source(raw_text, slices, {}, PUBLISHED_TOWER_BYTES)
    folder = resolve(flags.hf_path, flags.revision, weights=False)
    raw_config = read_config(folder)
    config = ModelConfig.from_dict(raw_config)
    stored: Mapping[str, Quantization] = {}
    if "quantization" in raw_config or "quantization_config" in raw_config:  # which modules, the shards know
        stored = _quantizations(flags, folder, raw_config)
    own_table = flags.matformer_config or (folder / OWN_TABLE if (folder / OWN_TABLE).is_file() else None)
    slices = read_slices(own_table)
    if own_table is None:
        slices = [entry for entry in slices if fits(config.text, entry)]
        if not slices:
            raise BadValue(
                f"none of the published slices fits {flags.hf_path}, which has {config.text.num_hidden_layers} "
                "layers: they are E4B's; --matformer-config takes a table of your own"
            )
    towers = tower_shapes(config) | embedder_manifests(config)
    tower_bytes = sum(map(prod, towers.values())) * DTYPES[FLOATS[flags.dtype or _DEFAULT_DTYPE]].itemsize
    return _Source(raw_config["text_config"], _with_whole(config.text, slices), stored, tower_bytes)


def _with_whole(config: TextConfig, slices: list[Slice]) -> list[Slice]:
    return slices if any(is_whole(config, entry) for entry in slices) else [*slices, whole_model(config)]


def _sized(source: _Source, flags: argparse.Namespace, q_bits: int | None) -> list[SizedSlice]:
    return size_slices(
        source.raw_text,
        source.slices,
        q_bits,
        flags.q_group_size or DEFAULT_GROUP_SIZE,
        flags.ple_bits or DEFAULT_PLE_BITS,
        FLOATS[flags.dtype or _DEFAULT_DTYPE],
        source.stored,
    )


def _best_fitting(source: _Source, flags: argparse.Namespace) -> SizedSlice:
    """The best slice for --fits; bits that were not asked for are chosen as well."""
    widths: tuple[int | None, ...] = (None,)
    if not source.stored and (flags.quantize or flags.list_slices):
        widths = UNASKED_BITS if flags.q_bits is None else (flags.q_bits,)
    candidates = [entry for width in widths for entry in _sized(source, flags, width)]
    advice = "start from the unquantized checkpoint for fewer bits" if source.stored else "try fewer bits"
    return best_fitting(candidates, flags.fits, advice)


def _quantizations(flags: argparse.Namespace, folder: Path, raw_config: dict[str, Any]) -> Mapping[str, Quantization]:
    """How a quantized checkpoint is stored; of a hub id that was not downloaded the files' headers are asked for."""
    try:
        checkpoint = Checkpoint.open(folder)
    except MissingFile:
        if Path(flags.hf_path).expanduser().is_dir():
            raise
        tensors = {canonical_name(name): info for name, info in tensor_headers(flags.hf_path, flags.revision).items()}
        return quantizations_of(tensors, ModelConfig.from_dict(raw_config))
    checkpoint.close()
    return checkpoint.quantizations


def _in_words(entry: SizedSlice) -> str:
    bits = "" if entry.q_bits is None else f" at {entry.q_bits} bits"
    return f"{entry.slice.short_name} ({entry.slice.name}){bits}, {size_in_words(entry.resident_bytes)} in memory"


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Slices (MatFormer) and quantizes a Gemma 3n checkpoint into a new folder.")
    add = parser.add_argument
    source = "the source: a folder, or a hub id such as google/gemma-3n-E4B-it"
    add_model_flag(add, "--model", "--hf-path", dest="hf_path", help=source)
    add_model_flag(add, "--revision")
    add("--uqff", metavar="MODEL", help="a model of mistral.rs: a folder, a hub id, or a .uqff file in one of them")
    add("--gguf", type=Path, metavar="FILE", help="the source: a GGUF file, or owner/name/FILE of the hub")
    add("--mmproj", type=Path, metavar="FILE", help="GGUF file of the towers, if it isn't the only one beside --gguf")
    add("--tokenizer", type=Path, metavar="FOLDER", help="take the tokenizer from here instead of the GGUF file's")
    add("-o", "--output", type=Path, metavar="FOLDER", help="the folder to make")
    add("--upload-repo", metavar="OWNER/NAME", help="then upload it to this repository of the Hugging Face hub")
    add("-q", "--quantize", action="store_true", help="quantize the text model")
    add_model_flag(
        add,
        "--q-bits",
        choices=BITS,
        metavar=None,
        help=f"bits per weight (default {_DEFAULT_BITS}, 8 where --fits has room)",
    )
    add(
        "--method",
        choices=METHODS,
        default="affine",
        help="mse and gptq: less error, more time; default: affine, as MLX",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="for gptq and --budget: text, or JSON lines with messages, like your own data",
    )
    add("--dequantize", action="store_true", help="read a quantized source as numbers: write them dense, or -q anew")
    add("--q-group-size", type=int, choices=GROUP_SIZES, help=f"default {DEFAULT_GROUP_SIZE}")
    add("--ple-bits", type=int, choices=BITS, help=f"bits of the PLE table (default {DEFAULT_PLE_BITS})")
    add("--budget", type=num_bytes, metavar="SIZE", help="choose bits by module so that the folder is no larger: 6GB")
    add("--recipe", type=Path, metavar="FILE", help="JSON of bits by module, as g3n slices search writes it")
    add_model_flag(add, "--matformer", help="MatFormer slice to take, by name or short form (e2.49b-block)")
    add_model_flag(add, "--matformer-config")
    add_model_flag(add, "--adapter", help="LoRA adapter to merge, folder or hub id, PATH or PATH=WEIGHT; repeatable")
    add("--dtype", choices=FLOATS, help="of what is not quantized (default bfloat16)")
    add(
        "--list-slices",
        action="store_true",
        help="print the slices and their sizes, then stop",
    )
    add("--fits", type=num_bytes, metavar="SIZE", help="take the best slice whose memory fits, for example 4GB")
    return parser


if __name__ == "__main__":
    sys.exit(main())

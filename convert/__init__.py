"""Conversion: a checkpoint in, a smaller one out (MatFormer slice, quantization), streamed block by block.

Plain numpy and file access; no array framework is needed.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint import hub
from g3n_mlx.checkpoint.files import is_uqff
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.names import canonical_tensors
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.recipe import (
    Predicate,
    Recipe,
    choose_by_predicate,
    choose_quantizations,
    choose_uniformly,
    read_recipe,
)
from g3n_mlx.checkpoint.registry import cache_folder, register
from g3n_mlx.checkpoint.shards import open_shards
from g3n_mlx.config.manifest import TEXT
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.convert.card import CARD_BYTES, Origin, model_card
from g3n_mlx.convert.card import FILE as CARD
from g3n_mlx.convert.gguf import cached_gguf, is_gguf, write_gguf
from g3n_mlx.convert.gguf.towers import towers_beside
from g3n_mlx.convert.methods import method_named
from g3n_mlx.convert.quantize import FLOATS, Method, affine, plan_jobs, quantization_entry, readable
from g3n_mlx.convert.uqff import cached_uqff
from g3n_mlx.convert.write import (
    appearing_folder,
    check_free_name,
    check_space,
    copy_sidecars,
    json_bytes,
    num_bytes_written,
    sidecars,
    write_json,
    write_shards,
)
from g3n_mlx.failures import BadValue
from g3n_mlx.matformer.adapted import AdapterLike, named_adapters, open_adapted
from g3n_mlx.matformer.plan import SlicePlan, find_slice, plan_slice
from g3n_mlx.matformer.table import slices_for
from g3n_mlx.matformer.view import open_sliced

logger = logging.getLogger(__name__)

Choice = Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Quantization]]

# 4 bits are too coarse for the PLE table; 8 cost no memory, because the table stays on disk.
DEFAULT_PLE_BITS = 8
DEFAULT_GROUP_SIZE = 64

# Raised when the output of a conversion changes, so that cached ones are made again.
_CACHE_VERSION = 1
_OUTSIDE_THE_CACHE = "that is your cache; convert into another folder (g3n-convert -q -o FOLDER), and load that"


def convert(
    source: str | Path,
    output: str | Path,
    *,
    q_bits: int | None = None,
    q_group_size: int = DEFAULT_GROUP_SIZE,
    ple_bits: int | None = None,
    matformer: str | None = None,
    matformer_config: str | Path | None = None,
    recipe: str | Path | None = None,
    quant_predicate: Predicate | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    adapter: AdapterLike | None = None,
    method: str = "affine",
    moments: str | Path | None = None,
    dequantize: bool = False,
    tokenizer: str | Path | None = None,
    mmproj: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint, sliced and quantized as asked, into a new folder; returns the folder.

    source: a folder of any layout, a hub id, or a GGUF file, which goes through a folder in the user's cache unless it
    is written as it is. tokenizer: a folder with the tokenizer to take instead of a GGUF file's. mmproj: the GGUF file
    of the towers; None takes the only one that lies beside a GGUF file. q_bits: 2, 3, 4, 5, 6 or 8; None does not
    quantize. ple_bits: of the PLE table, 8 by default. matformer: name of a slice in matformer_config, a CSV file
    (None: the published table). recipe: a JSON file with bits by module, instead of q_bits (checkpoint/recipe.py).
    quant_predicate: a function that says of a module's path, before any slice, whether it is quantized: True (as
    q_bits, q_group_size and ple_bits say), False, or its own {"bits": 6, "group_size": 64}. dtype: "bfloat16" by
    default, "float16" or "float32"; of an already quantized source it stays what it is. adapter: LoRA adapters, as
    `load` takes them, which are merged before anything is quantized. method: "affine" as MLX quantizes, "mse" with the
    least squared error of the weights, "gptq" with that of their products, for which moments names the folder that
    `g3n_mlx.calibration.measure` filled. dequantize: reads a quantized source as the numbers that it stands for, to
    store them dense, or anew with q_bits or a recipe.
    Raises ValueError or OSError when the source, the slice, the recipe, the disk or the output folder does not fit.
    """
    if matformer_config is not None and matformer is None:
        raise BadValue("matformer_config was given without matformer: name the slice to take from it")
    if method != "affine" and recipe is None and q_bits is None and quant_predicate is None:
        raise BadValue(f"method is {method!r}, but nothing is quantized: give q_bits or a recipe")
    quantizing = method_named(method, None if moments is None else Path(moments).expanduser())
    if recipe is not None and q_bits is not None:
        raise BadValue("recipe and q_bits were both given: the recipe says how every module is stored")
    if recipe is not None and quant_predicate is not None:
        raise BadValue("recipe and quant_predicate were both given: each says how every module is stored")
    rules = None if recipe is None else read_recipe(Path(recipe).expanduser())
    output = Path(output).expanduser()
    words = None if tokenizer is None else Path(tokenizer).expanduser()
    towers = None if mmproj is None else hub.resolve_file(mmproj)
    if is_gguf(source):
        changed = (q_bits, matformer, recipe, quant_predicate, dtype, adapter)
        if not dequantize and not any(changed):
            check_free_name(output)
            path = hub.resolve_file(source, revision)
            towers = towers or towers_beside(path)
            write_gguf(path, output, appearing_folder(output, wait_for_others=False), words, towers, progress)
            return output
    elif tokenizer is not None:
        raise BadValue("tokenizer was given without a GGUF file: a folder's own tokenizer is taken")
    elif mmproj is not None:
        raise BadValue("mmproj was given without a GGUF file: a folder's own towers are taken")
    folder = resolve(source, revision, tokenizer=words, mmproj=towers)
    plan = None if matformer is None else plan_for(folder, matformer, matformer_config)
    checkpoint = open_adapted(folder, plan, named_adapters(adapter))
    if checkpoint.low_ranks and not dequantize:
        raise BadValue(
            f"{folder} is quantized, so nothing can be merged into it: start from the unquantized checkpoint, "
            "dequantize it, or give the adapter where the model is loaded"
        )
    if not (folder / "tokenizer.json").is_file():
        logger.warning("%s has no tokenizer.json: put one into %s, or nobody can chat with it", folder, output)
    from g3n_mlx.prompt.own_template import chat_template_note  # takes as long to import as all of the converter

    if (note := chat_template_note(folder, checkpoint.config.media_kinds)) is not None:
        logger.warning("%s", note)
    choose: Choice | None = None
    base_name = str if plan is None else plan.base_name
    own_bits = {"q_bits": q_bits, "q_group_size": q_group_size, "ple_bits": ple_bits or DEFAULT_PLE_BITS}
    if rules is not None:
        choose = partial(rules.choose, base_name=base_name)
    elif quant_predicate is not None:
        choose = partial(choose_by_predicate, base_name=base_name, predicate=quant_predicate, **own_bits)
    elif q_bits is not None:
        choose = partial(choose_quantizations, **own_bits)
    try:
        check_free_name(output)
        place = appearing_folder(output, wait_for_others=False)
        flags = _flags(
            q_bits=q_bits,
            q_group_size=q_group_size if q_bits is not None and q_group_size != DEFAULT_GROUP_SIZE else None,
            ple_bits=ple_bits,
            matformer=matformer,
            matformer_config=matformer_config,
            recipe=recipe,
            dtype=dtype,
            revision=revision,
            method=None if method == "affine" else method,
            dequantize=dequantize,
            adapter=adapter,
        )
        note = "" if quant_predicate is None else "with quant_predicate, a function in Python"
        origin = Origin(str(source), folder, flags, note)
        _write(checkpoint, plan, output, place, choose, dtype, progress, quantizing, dequantize, origin)
    finally:
        checkpoint.close()
    return output


def _flags(*, adapter: AdapterLike | None, dequantize: bool, q_bits: int | None, **options: Any) -> list[str]:
    """The flags of `g3n convert` that say the same; of files and folders the names alone."""
    flags = [] if q_bits is None else ["-q", "--q-bits", str(q_bits)]
    for name, value in options.items():
        if value is not None:
            is_path = name in ("matformer_config", "recipe")
            flags += [f"--{name.replace('_', '-')}", Path(value).name if is_path else str(value)]
    for path, weight in named_adapters(adapter).items():
        known = Path(path).name if Path(path).exists() else str(path)
        flags += ["--adapter", known if weight == 1 else f"{known}={weight:g}"]
    return [*flags, "--dequantize"] if dequantize else flags


def cached_conversion(
    folder: Path,
    *,
    q_bits: int,
    q_group_size: int = DEFAULT_GROUP_SIZE,
    ple_bits: int | None = None,
    plan: SlicePlan | None = None,
    everything: bool = False,
    progress: bool = True,
) -> Path:
    """The quantized form of an unquantized checkpoint, from the user's cache folder; made on first use.

    everything: the PLE table and LAuReL at the same bits as the rest. Raises as `convert` does; processes that want the
    same one wait for each other.
    """
    ple_bits = ple_bits or DEFAULT_PLE_BITS
    choose = partial(choose_quantizations, q_bits=q_bits, q_group_size=q_group_size, ple_bits=ple_bits)
    wanted = (_CACHE_VERSION, fingerprint(folder), plan, q_bits, q_group_size, ple_bits)
    if everything:
        choose = partial(choose_uniformly, bits=q_bits, group_size=q_group_size)
        wanted = (*wanted, "everything")
    key = hashlib.sha256(repr(wanted).encode()).hexdigest()
    target = cache_folder() / "conversions" / f"{folder.resolve().name}-{q_bits}bit-{key[:16]}"
    if not target.is_dir():
        checkpoint = open_sliced(folder, plan)
        try:
            logger.info("quantizing %s once, into %s", folder, target)
            place = appearing_folder(target, wait_for_others=True, otherwise=_OUTSIDE_THE_CACHE)
            _write(checkpoint, plan, target, place, choose, None, progress)
        except FileExistsError:
            if not target.is_dir():
                raise
        finally:
            checkpoint.close()
    return target


def resolve(
    path_or_id: str | Path,
    revision: str | None = None,
    *,
    weights: bool = True,
    tokenizer: Path | None = None,
    mmproj: Path | None = None,
) -> Path:
    """The local folder of a model, given as `hub.resolve` takes it or as a GGUF file.

    Of a GGUF file, or a model of mistral.rs, a folder is made once. tokenizer: a folder with another tokenizer than the
    GGUF file's. mmproj: the GGUF file of the towers; None takes the only one beside. Raises as `hub.resolve`,
    `write_gguf` and `convert_uqff` do.
    """
    if isinstance(path_or_id, str | Path) and is_gguf(path_or_id):
        path = hub.resolve_file(path_or_id, revision)
        return cached_gguf(path, tokenizer, mmproj or towers_beside(path))
    found = hub.resolve(path_or_id, revision, weights=weights)
    return cached_uqff(found) if weights and is_uqff(found) else found


def written_bytes(checkpoint: Checkpoint, recipe: Recipe, dtype: str | None = None) -> int:
    """The size of the folder that a conversion of an unquantized checkpoint by a recipe makes, at most.

    To the byte but for the model card, whose text depends on the command: CARD_BYTES are counted for it.
    """
    tensors, stored = readable(checkpoint, False), FLOATS[dtype or "bfloat16"]
    chosen = recipe.choose({name: tensor.shape for name, tensor in tensors.items()}, str)
    size = num_bytes_written(plan_jobs(tensors, chosen, stored)) + len(json_bytes(_config(checkpoint, chosen, stored)))
    return size + sum(path.stat().st_size for path in sidecars(checkpoint.folder, whole=True)) + CARD_BYTES


def plan_for(folder: Path, matformer: str, matformer_config: str | Path | None = None) -> SlicePlan:
    """The plan of a named slice for the checkpoint in a folder; reads only config.json and the slice tables."""
    slices = slices_for(folder, None if matformer_config is None else Path(matformer_config))
    text = ModelConfig.from_file(folder).text
    return plan_slice(text, find_slice(matformer, slices, text))


def fingerprint(folder: Path) -> str:
    """Identifies a checkpoint without reading all of it: config, and name, size, time and header of every shard."""
    shards, on_disk = open_shards(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in shards:
        status = shard.path.stat()
        digest.update(repr((shard.path.name, status.st_size, status.st_mtime_ns)).encode())
        shard.close()
    for name, stored in sorted(canonical_tensors(on_disk, folder).items()):
        digest.update(repr((name, stored.shard.path.name, stored.offset, stored.dtype, stored.shape)).encode())
    return digest.hexdigest()


def _write(
    checkpoint: Checkpoint,
    plan: SlicePlan | None,
    output: Path,
    place: AbstractContextManager[Path],
    choose: Choice | None,
    dtype: str | None,
    progress: bool,
    method: Method = affine,
    dequantize: bool = False,
    origin: Origin | None = None,
) -> None:
    """choose: how modules are to be stored, by the shapes of all tensors; None leaves them as they are.

    origin: what a model card is written of; without it there is none. The folder is registered.
    """
    if dtype is not None and dtype not in FLOATS:
        raise BadValue(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)}")
    present = {} if dequantize else checkpoint.quantizations
    if present and (choose is not None or dtype is not None):
        found = Counter(present.values()).most_common(1)[0][0]
        raise BadValue(
            f"{checkpoint.folder} is quantized already ({found.bits} bits in groups of {found.group_size}): it can be "
            "sliced as it is; for other bits or another dtype start from the unquantized checkpoint, or dequantize it"
        )
    if dequantize and not checkpoint.quantizations:
        raise BadValue(f"{checkpoint.folder} is not quantized: there is nothing to dequantize")
    tensors = readable(checkpoint, dequantize)
    chosen = present if choose is None else choose({name: tensor.shape for name, tensor in tensors.items()})
    stored = None if present else FLOATS[dtype or "bfloat16"]
    jobs = plan_jobs(tensors, {} if present else chosen, stored, method)
    with place as partial:
        num_bytes = check_space(output, jobs)
        write_shards(partial, jobs, progress)
        copy_sidecars(checkpoint.folder, partial, whole=plan is None)
        if origin is not None:
            names = {spelled: name for name, spelled in FLOATS.items()}
            kept = checkpoint.info(f"{TEXT}norm.weight").dtype
            card = model_card(
                origin,
                checkpoint.config,
                None if plan is None else plan.slice_name,
                chosen,
                num_bytes,
                names.get(stored or kept, kept),
            )
            (partial / CARD).write_text(card, encoding="utf-8")
        # Written last: a folder without config.json is never taken for a checkpoint.
        write_json(partial / "config.json", _config(checkpoint, chosen, stored))
    made_of = origin or Origin(str(checkpoint.folder), checkpoint.folder)
    register(output, made_of.name, None if plan is None else plan.slice_name, checkpoint.folder)


def _config(checkpoint: Checkpoint, quantizations: Mapping[str, Quantization], stored: str | None) -> dict[str, Any]:
    """The new config.json: the source's, nested, its per-layer lists written out, and how modules are stored."""
    text = checkpoint.config.text
    inner = checkpoint.raw_config["text_config"] | {
        "intermediate_size": list(text.intermediate_size),
        "activation_sparsity_pattern": list(text.activation_sparsity_pattern),
        "layer_types": list(text.layer_types),
    }
    config = checkpoint.raw_config | {"text_config": inner}
    if stored is not None:
        names = {spelled: name for name, spelled in FLOATS.items()}
        config["torch_dtype"] = names[stored]
        for entry in [config, *(value for value in config.values() if isinstance(value, dict))]:
            entry |= {key: names[stored] for key in ("dtype", "torch_dtype") if key in entry}
    if quantizations:
        config["quantization"] = config["quantization_config"] = quantization_entry(quantizations)
    return config

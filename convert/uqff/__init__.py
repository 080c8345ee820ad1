"""UQFF, mistral.rs' prequantized models, as checkpoints of the usual layout.

A .uqff file is a safetensors file; beside a module's `weight` it says in which format that is stored. AFQ is MLX's
affine layout and is copied; llama.cpp's blocks that are affine in groups of 32 keep their exact numbers, with scales in
float32; Q6_K, whose groups are of 16, and HQQ, whose groups lie across the rows, go to 8 bits. Towers, which are not
quantized here, become dense. What was not quantized lies in residual.safetensors.
Sources: mistral.rs 0.9.5, mistralrs-quant/src/uqff (version 1.2); llama.cpp, ggml/src/ggml-quants.c, for the blocks.
"""

import hashlib
import logging
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.registry import cache_folder, register
from g3n_mlx.config.fields import read_json
from g3n_mlx.convert.card import Origin
from g3n_mlx.convert.quantize import TensorJob, quantization_entry
from g3n_mlx.convert.uqff.files import Module, model_files, opened_tensors
from g3n_mlx.convert.uqff.weights import converted, copied, rounded_anew
from g3n_mlx.convert.write import (
    appearing_folder,
    check_free_name,
    check_space,
    copy_sidecars,
    write_json,
    write_shards,
)

logger = logging.getLogger(__name__)

# Raised when the output changes, so that cached conversions are made again.
_CACHE_VERSION = 2
_REPORT = "uqff_report.json"


def convert_uqff(source: Path, output: Path, *, progress: bool = True) -> Path:
    """Writes a model of mistral.rs as a checkpoint into a new folder; returns the folder.

    source: its folder, or one of its .uqff files where the folder has several models.
    Raises OSError, or ValueError for versions and formats that are not read and for what is damaged.
    """
    check_free_name(output)
    folder = source if source.is_dir() else source.parent
    with ExitStack() as opened:
        modules, plain = opened_tensors(model_files(source), opened)
        jobs: list[TensorJob] = []
        chosen: dict[str, Quantization] = {}
        for name, stored in plain.items():
            jobs.append(copied(f"model.{name}", stored))
        for path, module in modules.items():
            job, how = converted(path, module)
            jobs.append(job)
            if how is not None:
                chosen[path] = how
        _tell_what_is_rounded(source, [modules[path] for path in chosen])
        config = read_json(folder / "config.json")
        if chosen:
            config["quantization"] = config["quantization_config"] = quantization_entry(chosen)
        with appearing_folder(output, wait_for_others=False) as partial_folder:
            check_space(output, jobs)
            write_shards(partial_folder, jobs, progress)
            copy_sidecars(folder, partial_folder, whole=True)
            (partial_folder / _REPORT).unlink(missing_ok=True)
            write_json(partial_folder / "config.json", config)
            Checkpoint.open(partial_folder).close()  # complete, and of the shapes that the config says
    register(output, Origin(str(source), source).name)
    return output


def _tell_what_is_rounded(source: Path, modules: list[Module]) -> None:
    anew = Counter(name for module in modules if (name := rounded_anew(module)) is not None)
    if anew:
        kinds = ", ".join(f"{count} of {name}" for name, count in sorted(anew.items()))
        logger.warning("%s: tensors %s are rounded anew, to 8 bits; all others keep their exact values", source, kinds)


def cached_uqff(source: Path) -> Path:
    """The conversion of a model in the user's cache, made on first use; takes and raises what `convert_uqff` does."""
    paths = model_files(source)
    digest = hashlib.sha256(repr(_CACHE_VERSION).encode() + (paths[0].parent / "config.json").read_bytes())
    for path in paths:
        status = path.stat()
        digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    named = source.resolve().name if source.is_dir() else source.stem
    target = cache_folder() / "conversions" / f"{named}-uqff-{digest.hexdigest()[:16]}"
    if not target.is_dir():
        logger.info("converting %s once, into %s", source, target)
        try:
            convert_uqff(source, target)
        except FileExistsError:
            if not target.is_dir():
                raise
    return target

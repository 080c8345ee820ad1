"""Which files of a folder hold a model's weights, among what trainers, converters and downloads leave beside them."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from g3n_mlx.config.adapter import adapter_files, adapter_message
from g3n_mlx.config.fields import parse_json
from g3n_mlx.failures import BadValue, MissingFile

logger = logging.getLogger(__name__)

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of a UQFF folder: the weights of every model in it, and what all of them share.
UQFF = ".uqff"
RESIDUAL = "residual.safetensors"
_UQFF_SHARD = re.compile(r"(.+?)(?:-\d+)?\.uqff")
_PART = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    As transformers has it, one whole file goes before an index that does not name it, and numbered parts before other
    names; what is left out is said. Raises FileNotFoundError where there is nothing to read or a part is missing,
    ValueError for an index that can't be used.
    """
    if is_uqff(folder):
        raise BadValue(f"{folder} is a UQFF model of mistral.rs: g3n convert --uqff {folder} -o FOLDER converts it")
    # Files that start with a dot are not weights: macOS leaves such companions on foreign disks.
    every = {path.name for path in folder.glob("*.safetensors") if not path.name.startswith(".")}
    adapters = {path.name for path in adapter_files(folder)}
    models = every - adapters
    names = _indexed(folder) if (folder / INDEX).is_file() else []
    if WHOLE in models and WHOLE not in names:
        if names and not models.isdisjoint(names):
            logger.warning("%s: both %s and %s are there, the former is used", folder, WHOLE, INDEX)
        names = [WHOLE]
    elif not names:
        names = sorted(name for name in models if _PART.fullmatch(name)) or sorted(models)
    if not names:
        raise _nothing_to_read(folder, bool(adapters))
    missing = [name for name in names if name not in every and not (folder / name).is_file()]
    if missing:
        raise MissingFile(
            f"{folder} lacks {len(missing)} of {len(names)} weight files named by {INDEX}: "
            f"{', '.join(missing[:10])}; is the download complete?"
        )
    left = sorted(every - set(names))
    if left:
        kind = "LoRA adapters are not applied" if adapters.issuperset(left) else "not the model's"
        logger.warning("%s: %s not read: %s", folder, ", ".join(left[:5]), kind)
    return [folder / name for name in names]


def is_uqff(path: Path) -> bool:
    """Whether a folder, or a file, is a model of mistral.rs instead of safetensors files of the usual layout."""
    return path.suffix == UQFF if path.is_file() else any(path.glob(f"*{UQFF}"))


def uqff_shards(names: Iterable[str], where: str, chosen: str | None = None) -> list[str]:
    """Of a folder's file names those of one UQFF model: the one that a file belongs to, or else the only one.

    where: the folder or hub id, as a user names it. Raises FileNotFoundError or ValueError, which list what is there.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if found := _UQFF_SHARD.fullmatch(name):
            models.setdefault(found[1], []).append(name)
    if not models:
        raise MissingFile(f"{where} holds no *{UQFF} files: expected what mistral.rs wrote")
    if chosen is None and len(models) == 1:
        return next(iter(models.values()))
    listed = f"{', '.join(models)}: name one by its file, as in {where}/{next(iter(models.values()))[0]}"
    if chosen is None:
        raise BadValue(f"{where} holds {len(models)} models of mistral.rs, {listed}")
    found = _UQFF_SHARD.fullmatch(chosen)
    if found is None or found[1] not in models:
        raise MissingFile(f"{where} has no {chosen}, but {listed}")
    return models[found[1]]


def before_uqff_1(where: str | Path) -> BadValue:
    """What is said of a UQFF file that has no version in it."""
    return BadValue(
        f"{where} is a UQFF file of before version 1.0, which mistral.rs itself no longer reads: take the original "
        "checkpoint (g3n convert -q quantizes it), or one that mistral.rs 0.9 or newer has quantized"
    )


def _indexed(folder: Path) -> list[str]:
    index = folder / INDEX
    try:
        names = list(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        names = []
    if not names or not all(isinstance(name, str) for name in names):
        raise BadValue(f"{index} is not a safetensors index: expected an object with a weight_map of file names")
    if any(Path(name).name != name for name in names):
        raise BadValue(f"{index} names files outside its folder")
    return sorted(set(names))


def _nothing_to_read(folder: Path, has_adapters: bool) -> MissingFile:
    if has_adapters:
        return MissingFile(adapter_message(folder))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return MissingFile(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened; "
            "only *.safetensors files are read"
        )
    return MissingFile(f"{folder} holds no *.safetensors files: is it a model folder?")

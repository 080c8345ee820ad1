"""The files of a UQFF folder: modules and what stands beside their weights, unquantized tensors, and the version."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g3n_mlx.checkpoint.files import RESIDUAL, UQFF, before_uqff_1, uqff_shards
from g3n_mlx.checkpoint.names import canonical_name
from g3n_mlx.checkpoint.shards import Shard, StoredTensor, read_header
from g3n_mlx.checkpoint.source import Source
from g3n_mlx.failures import BadValue, MissingFile

# The newest version that is read.
_VERSION = (1, 2)
# What mistral.rs writes beside the weights: buffers that follow from the config, and norms that have no weight.
_BUFFERS = (
    ".invalid_logits_tensor",
    ".local_causal_valid_mask",
    ".per_dim_scale_softplus",
    ".inv_timescales",
    ".pos_indices",
    ".embedding_post_projection_norm.weight",
    ".v_norm.weight",
)


@dataclass(frozen=True, slots=True)
class Module:
    """A weight in a .uqff file, and what stands beside it, by what comes behind the weight's name."""

    where: str  # for errors
    format: int
    parts: dict[str, StoredTensor]

    def part(self, name: str) -> StoredTensor:
        if name not in self.parts:
            raise BadValue(f"{self.where} lacks its {name}: download it again")
        return self.parts[name]

    def number(self, part: str) -> int:
        """A number that stands in a tensor of its own."""
        return int(read(self.part(part)).reshape(-1)[0])

    def shape(self) -> tuple[int, int]:
        """Rows and width of a matrix whose numbers are stored in another shape."""
        sizes = read(self.part("shape"))
        if sizes.size != 2:
            raise BadValue(f"{self.where} has {sizes.size} axes, expected the 2 of a matrix")
        return int(sizes[0]), int(sizes[1])


def model_files(source: Path) -> list[Path]:
    """The files that hold a model, which is given as a folder with no other or as a .uqff file.

    Raises FileNotFoundError or ValueError where the folder holds none, several or no residual.safetensors.
    """
    folder, chosen = (source, None) if source.is_dir() else (source.parent, source.name)
    names = uqff_shards((path.name for path in folder.glob(f"*{UQFF}")), str(folder), chosen)
    if not (folder / RESIDUAL).is_file():
        raise MissingFile(f"{folder} lacks {RESIDUAL}, with what is not quantized: is the download complete?")
    return [folder / name for name in (*names, RESIDUAL)]


def opened_tensors(paths: list[Path], opened: ExitStack) -> tuple[dict[str, Module], dict[str, StoredTensor]]:
    """Modules by canonical path, and unquantized tensors by canonical name."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        shard = Shard(path)
        opened.callback(shard.close)
        tensors = dict(read_header(shard))
        if path.suffix == UQFF:
            _check_version(path, tensors)
        found |= {name: stored for name, stored in tensors.items() if not name.startswith("uqff.version.")}
    modules: dict[str, Module] = {}
    for name in [name for name in found if name.endswith(".weight.format")]:
        weight = name.removesuffix(".format")
        parts = {part.removeprefix(weight).lstrip("."): found.pop(part) for part in _parts_of(weight, found)}
        kind = int(read(parts["format"]).reshape(-1)[0])
        modules[canonical_name(weight).removesuffix(".weight")] = Module(weight, kind, parts)
    plain = {canonical_name(name): stored for name, stored in found.items() if not name.endswith(_BUFFERS)}
    return modules, plain


def _parts_of(weight: str, found: dict[str, StoredTensor]) -> list[str]:
    ends = ("", ".format", ".scales", ".biases", ".bits", ".group_size", ".dtype", ".shape")
    of_hqq = (".zeros", ".axis", ".channel_wise", ".round_zeros", ".optimization_steps")
    return [f"{weight}{end}" for end in (*ends, *of_hqq) if f"{weight}{end}" in found]


def _check_version(path: Path, tensors: dict[str, StoredTensor]) -> None:
    names = [f"uqff.version.{part}" for part in ("major", "minor")]
    if not all(name in tensors for name in names):
        raise before_uqff_1(path)
    major, minor = (int(read(tensors[name]).reshape(-1)[0]) for name in names)
    if major != _VERSION[0] or minor > _VERSION[1]:
        raise BadValue(f"{path} is UQFF {major}.{minor}: up to {_VERSION[0]}.{_VERSION[1]} is read, of the same major")


def read(stored: StoredTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    return Source(stored, stored.shape).read(start, stop)

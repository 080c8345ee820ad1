"""Tables of MatFormer slices in the published CSV grammar (Hugging Face dataset google/gemma3n-slicing-configs)."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from g3n_mlx.failures import BadValue, MissingFile

PUBLISHED = Path(__file__).parent.parent / "matformer_configs" / "gemma3n.csv"

# A checkpoint may bring slices of its own in this file.
OWN_TABLE = "matformer.csv"

_COLUMNS = (
    "name",
    "# Layers",
    "# Effective Params (B)",
    "MMLU PT accuracy",
    "FFN Hidden Dims",
    "Layers Skipped",
)


@dataclass(frozen=True, slots=True)
class Slice:
    """One row of the table."""

    name: str
    short_name: str  # what a command line takes: `e2.49b-block`, `e2b`
    num_layers: int  # kept
    effective_params_b: float | None  # billions, as published
    mmlu: float | None  # percent, as published, of the pretrained model
    ffn_hidden_dims: tuple[int, ...]  # one per kept layer
    skipped_layers: tuple[int, ...]  # indices in the base model


def read_slices(path: Path | None = None) -> list[Slice]:
    """The slices of a table in the published CSV grammar; None reads the published table.

    Raises FileNotFoundError, or ValueError naming the line that does not fit.
    """
    path = PUBLISHED if path is None else path
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise MissingFile(f"{path} {found}: expected a CSV table of MatFormer slices")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, skipinitialspace=True)
            header = tuple(title.strip() for title in next(rows, []))
            if header != _COLUMNS:
                raise BadValue(f"{path}: the columns are {', '.join(header)!r:.200}, expected {', '.join(_COLUMNS)!r}")
            slices = [_parse_row(row, f"{path}, line {rows.line_num}") for row in rows if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadValue(f"{path} is no CSV table of MatFormer slices: {error}") from None
    seen: dict[str, str] = {}
    for entry in slices:
        for name in {entry.name.casefold(), entry.short_name.casefold()}:
            if name in seen:
                raise BadValue(f"{path}: {entry.name!r} and {seen[name]!r} both go by the name {name!r}")
            seen[name] = entry.name
    if not slices:
        raise BadValue(f"{path} holds no slices")
    return slices


def slices_for(folder: Path, table: Path | None = None) -> list[Slice]:
    """The slices that may be taken from the checkpoint in a folder.

    Those of a table, where one is given; else those of the checkpoint's own matformer.csv, and then the published ones.
    Raises as `read_slices`.
    """
    if table is not None:
        return read_slices(table)
    own = read_slices(folder / OWN_TABLE) if (folder / OWN_TABLE).is_file() else []
    taken = {name.casefold() for entry in own for name in (entry.name, entry.short_name)}
    published = read_slices(None)
    return own + [e for e in published if not {e.name.casefold(), e.short_name.casefold()} & taken]


def write_slices(path: Path, slices: Sequence[Slice]) -> None:
    """Writes a table in the same grammar; short names follow from the names."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(_COLUMNS)
        for entry in slices:
            params = "" if entry.effective_params_b is None else f"{entry.effective_params_b:.3g}"
            mmlu = "" if entry.mmlu is None else f"{entry.mmlu:.2f}%"
            skipped = str(list(entry.skipped_layers)) if entry.skipped_layers else ""
            rows.writerow([entry.name, entry.num_layers, params, mmlu, str(list(entry.ffn_hidden_dims)), skipped])


def _parse_row(row: list[str], where: str) -> Slice:
    if len(row) != len(_COLUMNS):
        raise BadValue(f"{where}: has {len(row)} fields, expected {len(_COLUMNS)}")
    name, layers, params, mmlu, dims, skipped = (field.strip() for field in row)
    if not name:
        raise BadValue(f"{where}: the slice has no name")
    return Slice(
        name=name,
        short_name=short_name(name),
        num_layers=_product(layers, f"{where}, {_COLUMNS[1]}"),
        effective_params_b=_optional_number(params, f"{where}, {_COLUMNS[2]}"),
        mmlu=_optional_number(mmlu.removesuffix("%"), f"{where}, {_COLUMNS[3]}"),
        ffn_hidden_dims=_integers(dims, f"{where}, {_COLUMNS[4]}"),
        skipped_layers=_integers(skipped, f"{where}, {_COLUMNS[5]}") if skipped else (),
    )


def short_name(name: str) -> str:
    """`Config for E2.49B (block-level)` -> `e2.49b-block`; other names in lower case with dashes."""
    size = re.search(r"\bE\d+(?:\.\d+)?B\b", name, re.IGNORECASE)
    if size is None:
        return re.sub(r"[^a-z0-9.]+", "-", name.casefold()).strip("-")
    level = re.search(r"\((\w+)-level\)", name)
    return size[0].casefold() + (f"-{level[1].casefold()}" if level else "")


def _integers(text: str, where: str) -> tuple[int, ...]:
    """A bracketed list of integers or products of them."""
    if not (text.startswith("[") and text.endswith("]")):
        raise BadValue(f"{where}: is {text!r}, expected a list in brackets")
    inside = text[1:-1].strip().removesuffix(",")
    return tuple(_product(item, where) for item in inside.split(",")) if inside else ()


def _product(text: str, where: str) -> int:
    """An integer as Python writes it, or a product of such: `2_048 * 8`."""
    factors = [factor.strip() for factor in text.split("*")]
    if not all(re.fullmatch(r"\d+(?:_\d+)*", factor) for factor in factors):
        raise BadValue(f"{where}: {text.strip()!r} is not an integer or a product of integers")
    return prod(int(factor) for factor in factors)


def _optional_number(text: str, where: str) -> float | None:
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise BadValue(f"{where}: {text!r} is not a number") from None

"""The model card of a conversion, README.md: what it was made of and how, as the hub reads it."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.config.manifest import effective_parameters
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.failures import size_in_words

FILE = "README.md"
CARD_BYTES = 2048  # that a card takes at most; without a long command it is some 700
# Whatever is made of a Gemma 3n stays under its terms; a source whose own card names others keeps those.
_LICENCE = "gemma"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a conversion comes from: a folder or hub id as it was given, the folder it was read from, the flags."""

    source: str
    folder: Path
    flags: Sequence[str] = ()  # of `g3n convert`, without the source and the output
    note: str = ""  # what no flag says

    @property
    def hub_id(self) -> str | None:
        """The source's id on the hub; None for a folder that is no snapshot in the hub's cache."""
        for part in self.folder.absolute().parts:
            if part.startswith("models--") and part.count("--") >= 2:
                return part.removeprefix("models--").replace("--", "/", 1)
        is_folder = Path(self.source).expanduser().is_dir()
        return self.source if not is_folder and _HUB_ID.fullmatch(self.source) else None

    @property
    def name(self) -> str:
        """How the card calls the source: never by a path of the machine that converted it."""
        return self.hub_id or self.folder.absolute().name


def model_card(
    origin: Origin,
    config: ModelConfig,
    slice_name: str | None,
    quantizations: Mapping[str, Quantization],
    num_bytes: int,
    dtype: str,
) -> str:
    """The text of the card. num_bytes: of all weights; dtype: of what is not quantized."""
    task = "image-text-to-text" if config.media_kinds else "text-generation"
    front = [f"license: {_licence(origin.folder)}", "library_name: mlx", f"pipeline_tag: {task}"]
    if origin.hub_id is not None:
        front += [f"base_model: {origin.hub_id}"]
        front += ["base_model_relation: quantized"] if quantizations else []
    tags = ["mlx", "safetensors", "gemma3n", "g3n_mlx", *(["matformer"] if slice_name else [])]
    command = " ".join(["g3n convert --hf-path", origin.name, *map(_quoted, origin.flags), "-o FOLDER"])
    command += f"  # {origin.note}" if origin.note else ""
    rows = {
        "base model": origin.name,
        "slice": slice_name or "none: the whole model",
        "weights": _weights(quantizations, dtype),
        "effective parameters": f"{effective_parameters(config.text):,}",
        "size": size_in_words(num_bytes),
        "media": ", ".join(config.media_kinds) or "none: text alone",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return (
        "---\n" + "\n".join([*front, "tags:", *(f"- {tag}" for tag in tags)]) + "\n---\n\n"
        f"# {origin.name.rpartition('/')[2]}, converted by g3n_mlx\n\n"
        f"| | |\n|---|---|\n{table}\n"
        f"Made by\n\n```sh\n{command}\n```\n\n"
        'Ask it with `g3n chat --model FOLDER_OR_ID -p "..."`. The files are safetensors, laid out as MLX quantizes '
        "them.\n"
    )


def _weights(quantizations: Mapping[str, Quantization], dtype: str) -> str:
    """How many modules have which bits, the most frequent first."""
    counts = Counter(quantizations.values()).most_common()
    told = [f"{how.bits} bits in groups of {how.group_size} ({count} modules)" for how, count in counts]
    return "; ".join([*told, f"the rest {dtype}" if told else dtype])


def _licence(folder: Path) -> str:
    """What the card of the source says, in the lines above its text."""
    try:
        text = (folder / FILE).read_text("utf-8", errors="replace")
    except OSError:
        return _LICENCE
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = front and re.search(r"^license:[ \t]*([\w.-]+)[ \t]*$", front[1], re.MULTILINE)
    return found[1] if found else _LICENCE


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w./:=-]+", word) else "'" + word.replace("'", "'\\''") + "'"

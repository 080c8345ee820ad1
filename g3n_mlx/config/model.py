"""What config.json says about a Gemma 3n checkpoint, checked once and frozen.

Fields are named as in the file and have no defaults: a missing key is an error, never a guess.
Three spellings are read: the nested one (Google, mlx-lm, mlx-vlm, ours), the flat one of a
text-only `Gemma3nForCausalLM`, and transformers 5's `rope_parameters`.
Source of the semantics: transformers, configuration_gemma3n.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g3n_mlx.config.adapter import adapter_files, adapter_message
from g3n_mlx.config.audio import AudioConfig
from g3n_mlx.config.fields import Fields, is_integer, is_number, read_json, shown
from g3n_mlx.config.text import FULL, SLIDING, TextConfig
from g3n_mlx.config.vision import VisionConfig
from g3n_mlx.failures import BadValue, MissingFile

# Of a flat config, the keys that stand outside text_config in a nested one.
_OUTER_KEYS = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "model_type",
    "torch_dtype",
    "dtype",
    "quantization",
    "quantization_config",
    "transformers_version",
    "initializer_range",
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint's config; `vision` and `audio` are None in text-only ones."""

    text: TextConfig
    vision: VisionConfig | None
    audio: AudioConfig | None
    eos_token_ids: tuple[int, ...]  # empty when the file names none

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The media that there are towers for: "image", "audio"."""
        towers = {"image": self.vision, "audio": self.audio}
        return tuple(kind for kind, tower in towers.items() if tower is not None)

    def embedder_of(self, token_id: int) -> str | None:
        """The embedder of an id of the image or audio range, `embed_vision` or `embed_audio`; None for text.

        Ids behind the audio range, of a vocabulary that a trainer has enlarged, are text; the reference fails there.
        Source: transformers, modeling_gemma3n.py, `Gemma3nModel.forward`.
        """
        if self.audio is not None and 0 <= token_id - self.audio.vocab_offset < self.audio.vocab_size:
            return "embed_audio"
        if self.vision is not None and 0 <= token_id - self.vision.vocab_offset < self.vision.vocab_size:
            return "embed_vision"
        return None

    @staticmethod
    def from_file(path: Path) -> "ModelConfig":
        """Reads the config of a model folder, or a config.json; raises FileNotFoundError or ValueError."""
        return ModelConfig.from_dict(read_config(path), str(_file(path)))

    @staticmethod
    def from_dict(raw: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Takes the content of config.json in any spelling; raises ValueError when it is not a usable Gemma 3n."""
        raw = _nested(raw, where)
        kind = raw.get("model_type")
        if kind not in ("gemma3n", "gemma3n_text"):
            raise BadValue(f"{where}: model_type is {shown(kind)}, expected 'gemma3n' or 'gemma3n_text'")
        text = TextConfig.from_dict(raw["text_config"], where)
        vision, audio = raw.get("vision_config"), raw.get("audio_config")
        for name, modality in (("vision", vision), ("audio", audio)):
            if modality is not None and not isinstance(modality, dict):
                raise BadValue(f"{where}: {name}_config is {shown(modality)}, expected an object or null")
        eos = next((e for e in (raw.get("eos_token_id"), raw["text_config"].get("eos_token_id")) if e is not None), [])

        def soft(kind: str) -> int:
            key = f"{kind}_soft_tokens_per_image"
            return Fields(raw, where).integer(key, at_least=1, at_most=text.max_position_embeddings)

        config = ModelConfig(
            text=text,
            vision=VisionConfig.from_dict(vision, soft("vision"), f"{where}, vision_config") if vision else None,
            audio=AudioConfig.from_dict(audio, soft("audio"), f"{where}, audio_config") if audio else None,
            eos_token_ids=token_ids(eos, "eos_token_id", text.vocab_size, where),
        )
        for name, modality in (("vision", config.vision), ("audio", config.audio)):
            if modality is not None:
                first = Fields(raw[f"{name}_config"], f"{where}, {name}_config")
                first.integer("vocab_offset", at_least=1, at_most=text.vocab_size - 1)
        return config


def token_ids(value: Any, key: str, vocab_size: int, where: str) -> tuple[int, ...]:
    """An id or a list of ids; raises ValueError when one of them is no token of the vocabulary."""
    ids = value if isinstance(value, list) else [value]
    if not all(is_integer(token_id, 0, vocab_size - 1) for token_id in ids):
        raise BadValue(f"{where}: {key} is {shown(value)}, expected token ids from 0 to {vocab_size - 1}")
    return tuple(ids)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON of a model folder or of a config.json file in the published spelling, whichever it has on disk.

    The language model stands under `text_config`, with both RoPE bases as keys of their own. Raises FileNotFoundError
    or ValueError.
    """
    path = _file(path)
    if not path.is_file() and path.parent.is_dir():
        raise MissingFile(_without_config(path))
    return _nested(read_json(path), str(path))


def _without_config(path: Path) -> str:
    """What to say of a folder that has no config.json."""
    folder = path.parent
    if adapter_files(folder):
        return adapter_message(folder)
    models = sorted(found.parent.name for found in folder.glob(f"*/{path.name}"))
    inside = f"; its folders {', '.join(models[:5])} have one: give one of them" if models else ""
    return f"{path} does not exist{inside or f': is {folder} a model folder?'}"


def _file(path: Path) -> Path:
    return path if path.suffix == ".json" else path / "config.json"


def _nested(raw: dict[str, Any], where: str) -> dict[str, Any]:
    if "text_config" in raw and not isinstance(raw["text_config"], dict):
        raise BadValue(f"{where}: text_config is {shown(raw['text_config'])}, expected an object")
    if "text_config" in raw:
        nested = {**raw, "text_config": dict(raw["text_config"])}
    else:
        outer = {key: raw[key] for key in _OUTER_KEYS if key in raw}
        inner = {key: value for key, value in raw.items() if key not in outer and key != "architectures"}
        nested = {**outer, "text_config": inner}
        if raw.get("model_type") == "gemma3n_text":
            inner["model_type"] = "gemma3n_text"
            nested |= {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n"}
    text = nested["text_config"]
    parameters = text.pop("rope_parameters", None)
    if parameters is not None:
        text["rope_theta"] = _rope_base(parameters, FULL, where)
        text["rope_local_base_freq"] = _rope_base(parameters, SLIDING, where)
    return nested


def _rope_base(parameters: Any, kind: str, where: str) -> Any:
    entry = parameters.get(kind) if isinstance(parameters, dict) else None
    if isinstance(entry, dict) and entry.get("rope_type", "default") == "default":
        base = entry.get("rope_theta")
        if is_number(base) and base > 0:
            return base
    raise BadValue(
        f"{where}: rope_parameters[{kind!r}] is {shown(entry)}, expected rope_type 'default' and a rope_theta above 0"
    )

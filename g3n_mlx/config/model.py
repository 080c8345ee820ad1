"""What config.json says about a Gemma 3n checkpoint, checked once and frozen.

Fields are named as in the file and have no defaults: a missing key is an error, never a guess.
Three spellings are read: the nested one (Google, mlx-lm, mlx-vlm, ours), the flat one of a
text-only `Gemma3nForCausalLM`, and transformers 5's `rope_parameters`.
Source of the semantics: transformers, configuration_gemma3n.py.
"""

from dataclasses import dataclass
from typing import Any

from g3n_mlx.config.audio import AudioConfig
from g3n_mlx.config.fields import Fields
from g3n_mlx.config.text import TextConfig
from g3n_mlx.config.vision import VisionConfig


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint's config; `vision` and `audio` are None in text-only ones."""

    text: TextConfig
    vision: VisionConfig | None
    audio: AudioConfig | None
    eos_token_ids: tuple[int, ...]

    def embedder_of(self, token_id: int) -> str | None:
        """The embedder of an id of the image or audio range, `embed_vision` or `embed_audio`; None for text.

        Source: transformers, modeling_gemma3n.py, `Gemma3nModel.forward`: the audio range has no upper end.
        """
        if self.audio is not None and token_id >= self.audio.vocab_offset:
            return "embed_audio"
        if self.vision is not None and 0 <= token_id - self.vision.vocab_offset < self.vision.vocab_size:
            return "embed_vision"
        return None

    @staticmethod
    def from_dict(raw: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Reads a checkpoint's config.json; raises ValueError when it is not a usable Gemma 3n."""
        kind = raw.get("model_type")
        if kind not in ("gemma3n", "gemma3n_text"):
            raise ValueError(f"{where}: model_type is {kind!r}, expected 'gemma3n' or 'gemma3n_text'")
        vision, audio = raw.get("vision_config"), raw.get("audio_config")
        text = raw.get("text_config", raw)
        eos = next(e for e in (raw.get("eos_token_id"), text.get("eos_token_id"), [1, 106]) if e is not None)

        def soft(kind: str) -> int:
            return Fields(raw, where).integer(f"{kind}_soft_tokens_per_image", at_least=1)

        return ModelConfig(
            text=TextConfig.from_dict(text, where),
            vision=VisionConfig.from_dict(vision, soft("vision"), f"{where}, vision_config") if vision else None,
            audio=AudioConfig.from_dict(audio, soft("audio"), f"{where}, audio_config") if audio else None,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        )

"""Shape of the audio tower and its embedder."""

from dataclasses import dataclass
from typing import Any

from g3n_mlx.config_file import Fields


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """`audio_config` of config.json."""

    hidden_size: int
    vocab_size: int
    vocab_offset: int  # first id of the audio range, which has no upper end
    rms_norm_eps: float  # of the embedder and of the light convolution
    soft_tokens: int  # a clip's, whatever its length

    @staticmethod
    def from_dict(raw: dict[str, Any], soft_tokens: int, where: str) -> "AudioConfig":
        """Reads `audio_config`; raises ValueError naming the key that is missing or does not fit."""
        fields = Fields(raw, where)
        return AudioConfig(
            hidden_size=fields.integer("hidden_size", at_least=1),
            vocab_size=fields.integer("vocab_size", at_least=1),
            vocab_offset=fields.integer("vocab_offset"),
            rms_norm_eps=fields.number("rms_norm_eps"),
            soft_tokens=soft_tokens,
        )

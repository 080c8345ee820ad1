"""Shape of the vision tower and its embedder."""

from dataclasses import dataclass
from typing import Any

from g3n_mlx.config_file import Fields


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """`vision_config` of config.json."""

    hidden_size: int
    vocab_size: int
    vocab_offset: int  # first id of the image range
    rms_norm_eps: float  # of the embedder
    soft_tokens: int  # an image's

    @staticmethod
    def from_dict(raw: dict[str, Any], soft_tokens: int, where: str) -> "VisionConfig":
        """Reads `vision_config`; raises ValueError naming the key that is missing or does not fit."""
        fields = Fields(raw, where)
        return VisionConfig(
            hidden_size=fields.integer("hidden_size", at_least=1),
            vocab_size=fields.integer("vocab_size", at_least=1),
            vocab_offset=fields.integer("vocab_offset"),
            rms_norm_eps=fields.number("rms_norm_eps"),
            soft_tokens=soft_tokens,
        )

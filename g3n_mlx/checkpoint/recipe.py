"""Which modules a conversion quantizes, and at how many bits."""

import logging
from collections.abc import Mapping

from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.config.manifest import PLE_TABLE, TEXT, TOKEN_TABLE

logger = logging.getLogger(__name__)

# What is quantized. The rest is small and sensitive, or a tower: norms, AltUp's router and coefficients, LAuReL,
# the embedders of images and audio.
_QUANTIZED_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "per_layer_input_gate",
    "per_layer_projection",
)
_QUANTIZED_ROOTS = (f"{TEXT}per_layer_model_projection", TOKEN_TABLE, PLE_TABLE)


def is_quantized_module(path: str) -> bool:
    """Whether a conversion quantizes this module's weight."""
    if path.startswith(f"{TEXT}layers."):
        return path.removeprefix(f"{TEXT}layers.").partition(".")[2] in _QUANTIZED_PARTS
    return path in _QUANTIZED_ROOTS or path.startswith((f"{TEXT}altup_projections.", f"{TEXT}altup_unembed_"))


def choose_quantizations(
    shapes: Mapping[str, tuple[int, ...]], q_bits: int, q_group_size: int, ple_bits: int
) -> dict[str, Quantization]:
    """Module path -> how its weight will be stored, for those that are quantized; shapes are by tensor name.

    Rows that do not divide into groups stay dense, as in mlx-lm (utils.py, `quantize_model`).
    """
    chosen: dict[str, Quantization] = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if not is_quantized_module(path):
            continue
        if shape[-1] % q_group_size:
            logger.info("%s stays dense: its rows of %d are no multiple of %d", path, shape[-1], q_group_size)
            continue
        chosen[path] = Quantization(ple_bits if path == PLE_TABLE else q_bits, q_group_size)
    return chosen

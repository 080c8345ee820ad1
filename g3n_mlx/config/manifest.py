"""The tensors that a config asks for: canonical names and shapes, as plain arithmetic.

Canonical names are the published ones without their leading `model.`: the module paths of our own models.
Source: the published checkpoints; transformers, modeling_gemma3n.py.
"""

from math import prod

from g3n_mlx.config.audio import AudioConfig
from g3n_mlx.config.text import TextConfig
from g3n_mlx.config.vision import VisionConfig

TEXT = "language_model."
PLE_TABLE = "language_model.embed_tokens_per_layer"
TOKEN_TABLE = "language_model.embed_tokens"

# Of a KV-sharing layer the published files hold these as well; nothing reads them.
_DEAD_PARTS = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")


def text_manifest(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the text model reads, unquantized."""
    dead = dead_manifest(config)
    return {name: shape for name, shape in _published_text(config).items() if name not in dead}


def dead_manifest(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the keys and values that KV-sharing layers have on disk and never use."""
    published = _published_text(config)
    names = (
        f"{TEXT}layers.{layer_idx}.{part}"
        for layer_idx in range(config.first_kv_shared_layer, config.num_hidden_layers)
        for part in _DEAD_PARTS
    )
    return {name: published[name] for name in names}


def embedder_manifest(path: str, config: VisionConfig | AudioConfig, text_width: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one modality's embedder; path is `embed_vision` or `embed_audio`."""
    width = config.hidden_size
    return {
        f"{path}.embedding.weight": (config.vocab_size, width),
        f"{path}.hard_embedding_norm.weight": (width,),
        f"{path}.soft_embedding_norm.weight": (width,),
        f"{path}.embedding_projection.weight": (text_width, width),
    }


def effective_parameters(config: TextConfig) -> int:
    """Parameters outside the two embedding tables: the number in a slice's name.

    The dead keys and values count, as they do in the published figures.
    """
    tables = (f"{TOKEN_TABLE}.weight", f"{PLE_TABLE}.weight")
    return sum(prod(shape) for name, shape in _published_text(config).items() if name not in tables)


def _published_text(config: TextConfig) -> dict[str, tuple[int, ...]]:
    hidden, ple, layers = config.hidden_size, config.hidden_size_per_layer_input, config.num_hidden_layers
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        # Columns are layer-major: one layer's PLE inputs lie beside each other.
        "embed_tokens_per_layer.weight": (config.vocab_size_per_layer_input, layers * ple),
        "per_layer_model_projection.weight": (layers * ple, hidden),
        "per_layer_projection_norm.weight": (ple,),
        "norm.weight": (hidden,),
    }
    for stream in range(config.altup_num_inputs - 1):
        shapes[f"altup_projections.{stream}.weight"] = (hidden, hidden)
        shapes[f"altup_unembed_projections.{stream}.weight"] = (hidden, hidden)
    for layer_idx in range(layers):
        for part, shape in _published_layer(config, layer_idx).items():
            shapes[f"layers.{layer_idx}.{part}"] = shape
    return {TEXT + name: shape for name, shape in shapes.items()}


def _published_layer(config: TextConfig, layer_idx: int) -> dict[str, tuple[int, ...]]:
    hidden, ple, inputs = config.hidden_size, config.hidden_size_per_layer_input, config.altup_num_inputs
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    ffn = config.intermediate_size[layer_idx]
    return {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "altup.correct_output_scale": (hidden,),
        "altup.correction_coefs.weight": (inputs, inputs),
        "altup.prediction_coefs.weight": (inputs * inputs, inputs),
        "altup.modality_router.weight": (inputs, hidden),
        "altup.router_norm.weight": (hidden,),
        "laurel.linear_left.weight": (config.laurel_rank, hidden),
        "laurel.linear_right.weight": (hidden, config.laurel_rank),
        "laurel.post_laurel_norm.weight": (hidden,),
        "per_layer_input_gate.weight": (ple, hidden),
        "per_layer_projection.weight": (hidden, ple),
        "post_per_layer_input_norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
    }

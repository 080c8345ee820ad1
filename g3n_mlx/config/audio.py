"""Shape of the audio tower, a USM conformer, and of its embedder; the tables that its attention needs.

Sources: transformers, configuration_gemma3n.py and modeling_gemma3n.py; USM is arXiv:2303.01037.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from g3n_mlx.config.fields import MAX_LAYERS, Fields, is_integer, shown
from g3n_mlx.failures import BadValue

# Of every norm but the light convolution's two; the reference has no key for it.
FIXED_NORM_EPS = 1e-6
# Convolutions of the subsampling (SSCP), and what pads their frequencies on either side whatever the kernel.
SSCP_CONVS = 2
SSCP_FREQUENCY_PADDING = 1
FFN_EXPANSION = 4
MAX_TIMESCALE = 10_000.0
# Positions that a chunk of queries or its surroundings may span, and sizes of kernels: 30 seconds are 750 positions.
_MAX_WINDOW = 4096

Pair = tuple[int, int]  # time, frequency


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """`audio_config` of config.json; tuples hold one entry for each convolution of the subsampling."""

    hidden_size: int
    vocab_size: int
    vocab_offset: int  # first id of the audio range
    rms_norm_eps: float  # of the embedder and of the light convolution
    soft_tokens: int  # a clip's, whatever its length
    input_feat_size: int  # mel bands of a frame
    gradient_clipping: float  # activations are held to plus or minus this
    conf_attention_chunk_size: int  # queries that look at one stretch of keys
    conf_attention_context_left: int  # positions seen before the query, its own included
    conf_attention_context_right: int  # positions seen after it
    conf_attention_logit_cap: float
    conf_num_attention_heads: int
    conf_num_hidden_layers: int
    conf_conv_kernel_size: int  # of the light convolution
    conf_reduction_factor: int  # one in so many encodings is kept at the end
    conf_residual_weight: float  # of what a feed-forward block adds
    sscp_conv_channel_size: Pair
    sscp_conv_group_norm_eps: float
    sscp_conv_kernel_size: tuple[Pair, Pair]
    sscp_conv_stride_size: tuple[Pair, Pair]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.conf_num_attention_heads

    @property
    def past_horizon(self) -> int:
        """Positions that a query sees before its own."""
        return max(0, self.conf_attention_context_left - 1)

    @property
    def relative_span(self) -> int:
        """Positions that a query sees in all."""
        return self.past_horizon + 1 + self.conf_attention_context_right

    @property
    def context_size(self) -> int:
        """Keys that the queries of one chunk see together."""
        return self.conf_attention_chunk_size + self.relative_span - 1

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by beside softplus(per_dim_scale): 1 / sqrt(head_dim) where that scale is 0."""
        return self.head_dim**-0.5 / math.log(2)

    @property
    def time_stride(self) -> int:
        """Frames that one position of the conformer stands for."""
        return math.prod(time for time, _ in self.sscp_conv_stride_size)

    @property
    def total_reduction(self) -> int:
        """Frames that one encoding stands for."""
        return self.time_stride * self.conf_reduction_factor

    @property
    def sscp_frequencies(self) -> tuple[int, ...]:
        """Frequencies that each convolution of the subsampling leaves."""
        sizes, size = [], self.input_feat_size
        for (_, kernel), (_, stride) in zip(self.sscp_conv_kernel_size, self.sscp_conv_stride_size, strict=True):
            size = (size + 2 * SSCP_FREQUENCY_PADDING - kernel) // stride + 1
            sizes.append(size)
        return tuple(sizes)

    def timing_signal(self) -> np.ndarray:
        """Sines, then cosines of the relative positions, farthest past first: float32 [span, D]."""
        positions = np.arange(self.past_horizon, -self.conf_attention_context_right - 1, -1, dtype=np.float32)
        timescales = self.hidden_size // 2
        step = np.float32(math.log(MAX_TIMESCALE) / max(timescales - 1, 1))
        angles = positions[:, None] * np.exp(np.arange(timescales, dtype=np.float32) * -step)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def window(self) -> np.ndarray:
        """Which keys of its chunk's context each query sees, bool [chunk, context]: query w those of w to w + span."""
        ahead = np.arange(self.context_size) - np.arange(self.conf_attention_chunk_size)[:, None]
        return (ahead >= 0) & (ahead < self.relative_span)

    @staticmethod
    def from_dict(raw: Any, soft_tokens: int, where: str) -> "AudioConfig":
        """Reads `audio_config`; raises ValueError naming the key that is missing or does not fit."""
        fields = Fields(raw, where)
        old_eps = "sscp_conv_eps" in raw and "sscp_conv_group_norm_eps" not in raw
        config = AudioConfig(
            hidden_size=fields.integer("hidden_size", at_least=2),
            vocab_size=fields.integer("vocab_size", at_least=1),
            vocab_offset=fields.integer("vocab_offset"),
            rms_norm_eps=fields.positive("rms_norm_eps", at_most=1),
            soft_tokens=soft_tokens,
            input_feat_size=fields.integer("input_feat_size", at_least=1),
            gradient_clipping=fields.positive("gradient_clipping"),
            conf_attention_chunk_size=fields.integer("conf_attention_chunk_size", at_least=1, at_most=_MAX_WINDOW),
            conf_attention_context_left=fields.integer("conf_attention_context_left", at_most=_MAX_WINDOW),
            conf_attention_context_right=fields.integer("conf_attention_context_right", at_most=_MAX_WINDOW),
            conf_attention_logit_cap=fields.positive("conf_attention_logit_cap"),
            conf_num_attention_heads=fields.integer("conf_num_attention_heads", at_least=1),
            conf_num_hidden_layers=fields.integer("conf_num_hidden_layers", at_least=1, at_most=MAX_LAYERS),
            conf_conv_kernel_size=fields.integer("conf_conv_kernel_size", at_least=1),
            conf_reduction_factor=fields.integer("conf_reduction_factor", at_least=1, at_most=_MAX_WINDOW),
            conf_residual_weight=fields.positive("conf_residual_weight"),
            sscp_conv_channel_size=_pair(fields.get("sscp_conv_channel_size"), "sscp_conv_channel_size", where),
            sscp_conv_group_norm_eps=fields.positive(
                "sscp_conv_eps" if old_eps else "sscp_conv_group_norm_eps", at_most=1
            ),
            sscp_conv_kernel_size=_pairs(fields, "sscp_conv_kernel_size", where),
            sscp_conv_stride_size=_pairs(fields, "sscp_conv_stride_size", where),
        )
        _check(config, where)
        return config


def audio_manifest(config: AudioConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the audio tower reads, kernels in the published order of axes."""
    hidden, channels = config.hidden_size, config.sscp_conv_channel_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_proj_linear.weight": (hidden, channels[-1] * config.sscp_frequencies[-1]),
    }
    inputs = 1
    for index, outputs in enumerate(channels):
        shapes[f"conv_{index}.conv.weight"] = (outputs, inputs, *config.sscp_conv_kernel_size[index])
        shapes[f"conv_{index}.norm.weight"] = (outputs,)
        inputs = outputs
    manifest = {f"audio_tower.subsample_conv_projection.{name}": shape for name, shape in shapes.items()}
    for layer_idx in range(config.conf_num_hidden_layers):
        for name, shape in _conformer_block(config).items():
            manifest[f"audio_tower.conformer.{layer_idx}.{name}"] = shape
    return manifest


def _conformer_block(config: AudioConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "attention.pre_attn_norm.weight": (hidden,),
        "attention.attn.per_dim_scale": (config.head_dim,),
        "attention.attn.relative_position_embedding.pos_proj.weight": (hidden, hidden),
        "attention.attn.q_proj.weight": (hidden, hidden),
        "attention.attn.k_proj.weight": (hidden, hidden),
        "attention.attn.v_proj.weight": (hidden, hidden),
        "attention.post.weight": (hidden, hidden),
        "attention.post_norm.weight": (hidden,),
        "lconv1d.pre_layer_norm.weight": (hidden,),
        "lconv1d.linear_start.weight": (2 * hidden, hidden),
        "lconv1d.depthwise_conv1d.weight": (hidden, 1, config.conf_conv_kernel_size),
        "lconv1d.conv_norm.weight": (hidden,),
        "lconv1d.linear_end.weight": (hidden, hidden),
        "norm.weight": (hidden,),
    }
    for block in ("ffw_layer_start", "ffw_layer_end"):
        shapes |= {
            f"{block}.pre_layer_norm.weight": (hidden,),
            f"{block}.ffw_layer_1.weight": (FFN_EXPANSION * hidden, hidden),
            f"{block}.ffw_layer_2.weight": (hidden, FFN_EXPANSION * hidden),
            f"{block}.post_layer_norm.weight": (hidden,),
        }
    return shapes


def _pair(value: Any, key: str, where: str) -> Pair:
    if not isinstance(value, list | tuple) or len(value) != SSCP_CONVS or any(not _is_size(item) for item in value):
        raise BadValue(f"{where}: {key} has {shown(value)}, expected {SSCP_CONVS} integers from 1 to {_MAX_WINDOW}")
    return value[0], value[1]


def _pairs(fields: Fields, key: str, where: str) -> tuple[Pair, Pair]:
    value = fields.get(key)
    if not isinstance(value, list | tuple) or len(value) != SSCP_CONVS:
        raise BadValue(f"{where}: {key} is {shown(value)}, expected one [time, frequency] for each of {SSCP_CONVS}")
    return _pair(value[0], key, where), _pair(value[1], key, where)


def _is_size(item: Any) -> bool:
    return is_integer(item, 1, _MAX_WINDOW)


def _check(config: AudioConfig, where: str) -> None:
    if config.hidden_size % config.conf_num_attention_heads:
        raise BadValue(
            f"{where}: hidden_size ({config.hidden_size}) is not a multiple of "
            f"conf_num_attention_heads ({config.conf_num_attention_heads})"
        )
    if config.hidden_size % 2:
        raise BadValue(f"{where}: hidden_size is {config.hidden_size}, expected an even number: half are sines")
    # Checked one by one: floor division would make a size below 1 look like another one.
    size = config.input_feat_size
    for (_, kernel), left in zip(config.sscp_conv_kernel_size, config.sscp_frequencies, strict=True):
        if kernel > size + 2 * SSCP_FREQUENCY_PADDING:
            raise BadValue(
                f"{where}: sscp_conv_kernel_size spans {kernel} frequencies, of which "
                f"{size + 2 * SSCP_FREQUENCY_PADDING} are left: input_feat_size is {config.input_feat_size}"
            )
        size = left

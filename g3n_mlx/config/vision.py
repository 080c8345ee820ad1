"""Shape of the vision tower, a MobileNetV5 encoder (arXiv:2404.10518), and of its embedder.

`vision_config.model_args` may list the blocks in timm's notation; what it leaves out is the published network's. Here
they become a table of stages with strides, channel counts and skip connections, so that the backends only build. Every
stage halves the image, up to 32 times with the stem: what timm's builder can do beyond that is refused.
Source: timm, mobilenetv5.py, _efficientnet_builder.py, _efficientnet_blocks.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from g3n_mlx.config.fields import Fields, shown
from g3n_mlx.failures import BadValue

Shape = tuple[int, ...]

ARCHITECTURE = "mobilenetv5_300m_enc"
# With the stem the image shrinks 32 times; timm lets further stages dilate their kernels instead.
_MAX_STAGES = 4
# Times that a block may widen its channels; the published ones do at most 6 times.
_MAX_EXPANSION = 1024


@dataclass(frozen=True, slots=True)
class EdgeResidualConfig:
    """A spatial convolution that expands, a projection back; both kernels are dense."""

    in_channels: int
    mid_channels: int
    out_channels: int
    exp_kernel_size: int
    pw_kernel_size: int
    stride: int
    has_skip: bool

    def tensors(self) -> dict[str, Shape]:
        """Name below the block -> shape."""
        expand, project = self.exp_kernel_size, self.pw_kernel_size
        return {
            "conv_exp.weight": (self.mid_channels, self.in_channels, expand, expand),
            "bn1.weight": (self.mid_channels,),
            "conv_pwl.weight": (self.out_channels, self.mid_channels, project, project),
            "bn2.weight": (self.out_channels,),
        }


@dataclass(frozen=True, slots=True)
class UniversalInvertedResidualConfig:
    """Expansion and projection channel by channel, with depthwise kernels before, between and after; size 0 is none."""

    in_channels: int
    mid_channels: int
    out_channels: int
    dw_kernel_size_start: int
    dw_kernel_size_mid: int
    dw_kernel_size_end: int
    stride: int
    has_skip: bool
    has_layer_scale: bool

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the three depthwise kernels: the one between strides if there is one, else the first there is."""
        start, mid = self.dw_kernel_size_start, self.dw_kernel_size_mid
        return (1 if mid else self.stride, self.stride, 1 if start or mid else self.stride)

    def tensors(self) -> dict[str, Shape]:
        """Name below the block -> shape."""
        shapes: dict[str, Shape] = {}
        if self.dw_kernel_size_start:
            shapes |= _conv_norm("dw_start", (self.in_channels, 1, *_square(self.dw_kernel_size_start)))
        shapes |= _conv_norm("pw_exp", (self.mid_channels, self.in_channels, 1, 1))
        if self.dw_kernel_size_mid:
            shapes |= _conv_norm("dw_mid", (self.mid_channels, 1, *_square(self.dw_kernel_size_mid)))
        shapes |= _conv_norm("pw_proj", (self.out_channels, self.mid_channels, 1, 1))
        if self.dw_kernel_size_end:
            shapes |= _conv_norm("dw_end", (self.out_channels, 1, *_square(self.dw_kernel_size_end)))
        if self.has_layer_scale:
            shapes["layer_scale.gamma"] = (self.out_channels,)
        return shapes


@dataclass(frozen=True, slots=True)
class MobileAttentionConfig:
    """Attention of all places to all places, or to a smaller map of them, with one head of keys and values."""

    in_channels: int
    out_channels: int
    num_heads: int
    key_dim: int
    value_dim: int
    kv_stride: int  # of the depthwise kernel before keys and values; 1 is no kernel
    dw_kernel_size: int
    has_skip: bool

    def tensors(self) -> dict[str, Shape]:
        """Name below the block -> shape."""
        shapes: dict[str, Shape] = {"norm.weight": (self.in_channels,)}
        shapes["attn.query.proj.weight"] = (self.num_heads * self.key_dim, self.in_channels, 1, 1)
        for name, width in (("key", self.key_dim), ("value", self.value_dim)):
            if self.kv_stride > 1:
                shapes[f"attn.{name}.down_conv.weight"] = (self.in_channels, 1, *_square(self.dw_kernel_size))
                shapes[f"attn.{name}.norm.weight"] = (self.in_channels,)
            shapes[f"attn.{name}.proj.weight"] = (width, self.in_channels, 1, 1)
        shapes["attn.output.proj.weight"] = (self.out_channels, self.num_heads * self.value_dim, 1, 1)
        shapes["layer_scale.gamma"] = (self.out_channels,)
        return shapes


BlockConfig = EdgeResidualConfig | UniversalInvertedResidualConfig | MobileAttentionConfig


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """`vision_config` of config.json."""

    hidden_size: int
    vocab_size: int
    vocab_offset: int  # first id of the image range
    rms_norm_eps: float  # of the embedder
    soft_tokens: int  # an image's
    stem_size: int  # channels
    stages: tuple[tuple[BlockConfig, ...], ...]
    msfa_stages: tuple[int, ...]  # whose outputs are fused, counted from the stem, which is 0
    msfa_output_resolution: int  # height and width of the features

    @property
    def msfa_ffn(self) -> UniversalInvertedResidualConfig:
        """The block that mixes the channels of the fused stages."""
        channels = _stage_channels(self.stem_size, self.stages)
        fused = sum(channels[stage] for stage in self.msfa_stages)
        return UniversalInvertedResidualConfig(
            in_channels=fused,
            mid_channels=_rounded(fused * 2.0),
            out_channels=self.hidden_size,
            dw_kernel_size_start=0,
            dw_kernel_size_mid=0,
            dw_kernel_size_end=0,
            stride=1,
            has_skip=False,
            has_layer_scale=False,
        )

    @staticmethod
    def from_dict(raw: Any, soft_tokens: int, where: str) -> "VisionConfig":
        """Takes `vision_config`; raises ValueError naming the key that is missing or does not fit."""
        fields = Fields(raw, where)
        if raw.get("architecture", ARCHITECTURE) != ARCHITECTURE:
            raise BadValue(f"{where}: architecture is {shown(raw['architecture'])}, only {ARCHITECTURE!r} is supported")
        network = _network(raw.get("model_args"), where)
        where = f"{where}, model_args"
        stem_size = _rounded(Fields(network, where).integer("stem_size", at_least=1))
        resolution = Fields(network, where).integer("msfa_output_resolution", at_least=1)
        if soft_tokens != resolution**2:
            raise BadValue(
                f"{where}: msfa_output_resolution is {resolution}, which makes {resolution**2} soft tokens, "
                f"but vision_soft_tokens_per_image is {soft_tokens}"
            )
        stages = _stages(network["block_args"], stem_size, where)
        return VisionConfig(
            hidden_size=fields.integer("hidden_size", at_least=1),
            vocab_size=fields.integer("vocab_size", at_least=1),
            vocab_offset=fields.integer("vocab_offset"),
            rms_norm_eps=fields.positive("rms_norm_eps", at_most=1),
            soft_tokens=soft_tokens,
            stem_size=stem_size,
            stages=stages,
            msfa_stages=_msfa_stages(network["msfa_indices"], len(stages), where),
            msfa_output_resolution=resolution,
        )


def vision_manifest(config: VisionConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the vision tower, kernels as published: (O, I, kH, kW)."""
    shapes = _conv_norm("conv_stem", (config.stem_size, 3, 3, 3)) | {"conv_stem.conv.bias": (config.stem_size,)}
    for stage_idx, stage in enumerate(config.stages):
        for block_idx, block in enumerate(stage):
            shapes |= {f"blocks.{stage_idx}.{block_idx}.{name}": shape for name, shape in block.tensors().items()}
    shapes |= {f"msfa.ffn.{name}": shape for name, shape in config.msfa_ffn.tensors().items()}
    shapes["msfa.norm.weight"] = (config.hidden_size,)
    return {f"vision_tower.timm_model.{name}": shape for name, shape in shapes.items()}


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis, as TensorFlow's SAME has them: an odd one comes last."""
    outputs = math.ceil(size / stride)
    total = max((outputs - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


def _conv_norm(name: str, kernel: Shape) -> dict[str, Shape]:
    return {f"{name}.conv.weight": kernel, f"{name}.bn.weight": kernel[:1]}


def _square(size: int) -> Shape:
    return (size, size)


def _stage_channels(stem_size: int, stages: Sequence[Sequence[BlockConfig]]) -> list[int]:
    """Channels after the stem and after every stage."""
    return [stem_size, *(stage[-1].out_channels for stage in stages)]


def _rounded(channels: float) -> int:
    """A multiple of 8, and at least 0.9 of what was asked for (timm, `make_divisible`)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


# What a block says in `model_args`, besides its type.
_KEYS = {
    "er": ("stride", "out_chs", "exp_ratio", "exp_kernel_size", "pw_kernel_size"),
    "uir": ("stride", "out_chs", "exp_ratio", "dw_kernel_size_start", "dw_kernel_size_mid", "dw_kernel_size_end"),
    "mqa": ("stride", "out_chs", "num_heads", "key_dim", "value_dim", "kv_stride", "dw_kernel_size"),
}
# What it may say as well, if only that timm's default holds; null does too.
_DEFAULTS: dict[str, Any] = {"act_layer": None, "force_in_chs": 0, "noskip": False, "se_ratio": 0}
_DEFAULT_GROUP_SIZES = {"er": 0, "uir": 1, "mqa": 1}


def _published(kind: str, *values: int) -> dict[str, Any]:
    return {"block_type": kind, **dict(zip(_KEYS[kind], values, strict=True))}


_er, _uir, _mqa = (partial(_published, kind) for kind in _KEYS)

_PUBLISHED: dict[str, Any] = {
    "stem_size": 64,
    "block_args": [
        [_er(2, 128, 4, 3, 1), *[_er(1, 128, 4, 3, 1)] * 2],
        [_uir(2, 256, 6, 3, 5, 0), *[_uir(1, 256, 4, 5, 0, 0), _uir(1, 256, 4, 3, 0, 0)] * 2],
        [
            _uir(2, 640, 6, 5, 5, 0),
            *[_uir(1, 640, 4, 5, 0, 0)] * 7,
            _uir(1, 640, 1, 0, 0, 0),
            *[_mqa(1, 640, 12, 64, 64, 2, 3), _uir(1, 640, 2, 0, 0, 0)] * 14,
        ],
        [
            _uir(2, 1280, 6, 5, 5, 0),
            *[_mqa(1, 1280, 16, 96, 96, 1, 3), _uir(1, 1280, 2, 0, 0, 0)] * 19,
        ],
    ],
    "msfa_indices": [-2, -1],
    "msfa_output_resolution": 16,
}


def _network(model_args: Any, where: str) -> dict[str, Any]:
    """The published network with what `model_args` changes about it."""
    if model_args is None:
        return _PUBLISHED
    if not isinstance(model_args, dict):
        raise BadValue(f"{where}: model_args is {shown(model_args)}, expected an object or null")
    unknown = sorted(set(model_args) - set(_PUBLISHED))
    if unknown:
        raise BadValue(f"{where}: model_args has {shown(unknown)}, only {sorted(_PUBLISHED)} are supported")
    return _PUBLISHED | model_args


def _stages(block_args: Any, channels: int, where: str) -> tuple[tuple[BlockConfig, ...], ...]:
    """The table of stages; channels are those that enter the first."""
    if not isinstance(block_args, list) or not 1 <= len(block_args) <= _MAX_STAGES:
        raise BadValue(f"{where}: block_args is {shown(block_args)}, expected a list of 1 to {_MAX_STAGES} stages")
    stages: list[tuple[BlockConfig, ...]] = []
    for stage_idx, stage in enumerate(block_args):
        here = f"{where}, block_args[{stage_idx}]"
        if not isinstance(stage, list) or not stage or not all(isinstance(block, dict) for block in stage):
            raise BadValue(f"{here} is {shown(stage)}, expected a list of blocks, which are objects")
        blocks: list[BlockConfig] = []
        for block_idx, raw in enumerate(stage):
            blocks.append(_block(raw, f"{here}[{block_idx}]", channels, 1 if blocks else 2))
            channels = blocks[-1].out_channels
        stages.append(tuple(blocks))
    return tuple(stages)


def _block(raw: dict[str, Any], where: str, in_channels: int, stride: int) -> BlockConfig:
    """A block of `block_args`. stride: 2 for the first of a stage; later ones never stride, whatever they say."""
    fields = Fields(raw, where)
    kind = fields.get("block_type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise BadValue(f"{where}: block_type is {shown(kind)}, only 'er', 'uir' and 'mqa' are supported")
    _refuse_others(raw, kind, where)
    if kind == "mqa" and stride == 2:
        raise BadValue(f"{where}: block_type is 'mqa', expected 'er' or 'uir', which can halve the image")
    said, accepted = fields.integer("stride"), (1,) if kind == "mqa" else (2,) if stride == 2 else (1, 2)
    if said not in accepted:
        raise BadValue(f"{where}: stride is {said}, expected {' or '.join(map(str, accepted))}")
    out_channels = _rounded(fields.integer("out_chs", at_least=1))
    has_skip = in_channels == out_channels and stride == 1
    sizes = {
        key: fields.integer(key, at_least=0 if kind == "uir" else 1)  # no kernel is a kernel of size 0
        for key in _KEYS[kind]
        if key not in ("stride", "out_chs", "exp_ratio")
    }
    if kind == "mqa":
        return MobileAttentionConfig(in_channels=in_channels, out_channels=out_channels, has_skip=has_skip, **sizes)
    expanded = _rounded(in_channels * fields.positive("exp_ratio", at_most=_MAX_EXPANSION))
    if kind == "er":
        return EdgeResidualConfig(in_channels, expanded, out_channels, **sizes, stride=stride, has_skip=has_skip)
    if stride > 1 and not any(sizes.values()):
        raise BadValue(f"{where}: stride is {stride}, but the block has no depthwise kernel that could stride")
    return UniversalInvertedResidualConfig(
        in_channels, expanded, out_channels, **sizes, stride=stride, has_skip=has_skip, has_layer_scale=True
    )


def _refuse_others(raw: dict[str, Any], kind: str, where: str) -> None:
    """Keys that we do not know, and those that may only say what holds without them."""
    allowed = _DEFAULTS | {"group_size": _DEFAULT_GROUP_SIZES[kind]}
    for key in sorted(set(raw) - {"block_type", *_KEYS[kind]}):
        if key not in allowed:
            raise BadValue(f"{where}: the key {shown(key)} is not supported for {kind!r} blocks")
        if raw[key] not in (None, allowed[key]):
            raise BadValue(f"{where}: {key} is {shown(raw[key])}, only {allowed[key]!r} is supported")


def _msfa_stages(indices: Any, num_stages: int, where: str) -> tuple[int, ...]:
    """The stages that are fused, in order; 0 is the stem."""
    if not isinstance(indices, list) or not indices or not all(type(index) is int for index in indices):
        raise BadValue(f"{where}: msfa_indices is {shown(indices)}, expected a list of integers")
    count = num_stages + 1
    if not all(-count <= index < count for index in indices):
        raise BadValue(f"{where}: msfa_indices is {shown(indices)}, but there are {count} resolutions")
    taken = {index % count for index in indices}
    if len(taken) < len(indices):
        raise BadValue(f"{where}: msfa_indices is {shown(indices)}, which names a resolution twice")
    return tuple(sorted(taken))

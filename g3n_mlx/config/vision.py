"""Shape of the vision tower, a MobileNetV5 encoder (arXiv:2404.10518), and of its embedder.

`vision_config.model_args` may spell out the stages as timm's builder takes them; what it leaves out is the published
network's. Strides, dilations, channel counts and skip connections are resolved here, so that the backends only build.
Source: timm, mobilenetv5.py, _efficientnet_builder.py, _efficientnet_blocks.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from g3n_mlx.config.fields import Fields
from g3n_mlx.failures import BadValue

Shape = tuple[int, ...]
BlockArgs = Sequence[Sequence[dict[str, Any]]]

ARCHITECTURE = "mobilenetv5_300m_enc"
# From here on a stage that would halve the picture again widens the gaps in later kernels instead.
_MAX_STRIDE = 32


@dataclass(frozen=True, slots=True)
class EdgeResidualConfig:
    """A spatial convolution that expands, a projection back; both kernels are dense."""

    in_channels: int
    mid_channels: int
    out_channels: int
    exp_kernel_size: int
    pw_kernel_size: int
    stride: int
    dilation: int  # of the expansion
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
    dilation: int  # of all three
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
    dilation: int  # of that kernel
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
            dilation=1,
            has_skip=False,
            has_layer_scale=False,
        )

    @staticmethod
    def from_dict(raw: dict[str, Any], soft_tokens: int, where: str) -> "VisionConfig":
        """Reads `vision_config`; raises ValueError naming the key that is missing or does not fit."""
        fields = Fields(raw, where)
        if raw.get("architecture", ARCHITECTURE) != ARCHITECTURE:
            raise BadValue(f"{where}: architecture is {raw['architecture']!r}, only {ARCHITECTURE!r} is supported")
        network = _network(raw.get("model_args"), where)
        where = f"{where}, model_args"
        stem_size = _rounded(Fields(network, where).integer("stem_size", at_least=1))
        resolution = Fields(network, where).integer("msfa_output_resolution", at_least=1)
        if soft_tokens != resolution**2:
            raise BadValue(
                f"{where}: msfa_output_resolution is {resolution}, which makes {resolution**2} soft tokens, "
                f"but vision_soft_tokens_per_image is {soft_tokens}"
            )
        block_args = _checked_block_args(network["block_args"], where)
        stages = _stages(block_args, stem_size, where)
        return VisionConfig(
            hidden_size=fields.integer("hidden_size", at_least=1),
            vocab_size=fields.integer("vocab_size", at_least=1),
            vocab_offset=fields.integer("vocab_offset"),
            rms_norm_eps=fields.number("rms_norm_eps"),
            soft_tokens=soft_tokens,
            stem_size=stem_size,
            stages=stages,
            msfa_stages=_msfa_stages(network["msfa_indices"], block_args, _stage_channels(stem_size, stages), where),
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


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after an axis, as TensorFlow's SAME has them: an odd one comes last."""
    outputs = math.ceil(size / stride)
    total = max((outputs - 1) * stride + (kernel_size - 1) * dilation + 1 - size, 0)
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


# The published network, in the notation of `model_args`.


def _er(kernel: int, stride: int, ratio: int, channels: int) -> dict[str, Any]:
    return {
        "block_type": "er",
        "exp_kernel_size": kernel,
        "pw_kernel_size": 1,
        "stride": stride,
        "exp_ratio": ratio,
        "out_chs": channels,
    }


def _uir(start: int, mid: int, stride: int, ratio: int, channels: int) -> dict[str, Any]:
    return {
        "block_type": "uir",
        "dw_kernel_size_start": start,
        "dw_kernel_size_mid": mid,
        "dw_kernel_size_end": 0,
        "stride": stride,
        "exp_ratio": ratio,
        "out_chs": channels,
    }


def _mqa(kernel: int, heads: int, kv_stride: int, width: int, channels: int) -> dict[str, Any]:
    return {
        "block_type": "mqa",
        "dw_kernel_size": kernel,
        "num_heads": heads,
        "kv_stride": kv_stride,
        "key_dim": width,
        "value_dim": width,
        "stride": 1,
        "out_chs": channels,
    }


_PUBLISHED: dict[str, Any] = {
    "stem_size": 64,
    "block_args": [
        [_er(3, 2, 4, 128), _er(3, 1, 4, 128), _er(3, 1, 4, 128)],
        [
            _uir(3, 5, 2, 6, 256),
            _uir(5, 0, 1, 4, 256),
            _uir(3, 0, 1, 4, 256),
            _uir(5, 0, 1, 4, 256),
            _uir(3, 0, 1, 4, 256),
        ],
        [
            _uir(5, 5, 2, 6, 640),
            *[_uir(5, 0, 1, 4, 640)] * 7,
            _uir(0, 0, 1, 1, 640),
            *[_mqa(3, 12, 2, 64, 640), _uir(0, 0, 1, 2, 640)] * 14,
        ],
        [
            _uir(5, 5, 2, 6, 1280),
            *[_mqa(3, 16, 1, 96, 1280), _uir(0, 0, 1, 2, 1280)] * 19,
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
        raise BadValue(f"{where}: model_args is {model_args!r}, expected an object or null")
    unknown = sorted(set(model_args) - set(_PUBLISHED))
    if unknown:
        raise BadValue(f"{where}: model_args has {unknown}, only {sorted(_PUBLISHED)} are supported")
    return _PUBLISHED | model_args


def _checked_block_args(block_args: Any, where: str) -> BlockArgs:
    if not isinstance(block_args, list) or not block_args:
        raise BadValue(f"{where}: block_args is {block_args!r}, expected a list of stages")
    for index, stage in enumerate(block_args):
        if not isinstance(stage, list) or not stage or not all(isinstance(block, dict) for block in stage):
            raise BadValue(f"{where}: block_args[{index}] is {stage!r}, expected a list of blocks, which are objects")
    return block_args


def _stages(block_args: BlockArgs, stem_size: int, where: str) -> tuple[tuple[BlockConfig, ...], ...]:
    """What timm's `EfficientNetBuilder` makes of the blocks."""
    stages: list[tuple[BlockConfig, ...]] = []
    channels, total_stride, dilation = stem_size, 2, 1
    for stage_idx, stage in enumerate(block_args):
        blocks: list[BlockConfig] = []
        for block_idx, raw in enumerate(stage):
            args = _BlockArgs(raw, f"{where}, block_args[{stage_idx}][{block_idx}]")
            stride = min(args.stride(), 2 if block_idx == 0 else 1)  # later blocks never stride, whatever they say
            next_dilation = dilation
            if total_stride * stride > _MAX_STRIDE:
                next_dilation, stride = dilation * stride, 1
            total_stride *= stride
            blocks.append(args.block(channels, stride, dilation))
            channels, dilation = blocks[-1].out_channels, next_dilation
        stages.append(tuple(blocks))
    return tuple(stages)


class _BlockArgs:
    """One block of `block_args`, with errors that name it."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self._raw, self._where, self._fields = raw, where, Fields(raw, where)

    def stride(self) -> int:
        stride = self._fields.integer("stride", at_least=1)
        if stride > 2:
            raise BadValue(f"{self._where}: stride is {stride}, expected 1 or 2")
        return stride

    def block(self, channels: int, stride: int, dilation: int) -> BlockConfig:
        kind = self._fields.get("block_type")
        if kind == "er":
            return self._edge_residual(channels, stride, dilation)
        if kind == "uir":
            return self._universal_inverted_residual(channels, stride, dilation)
        if kind == "mqa":
            return self._mobile_attention(channels, stride, dilation)
        raise BadValue(f"{self._where}: block_type is {kind!r}, only 'er', 'uir' and 'mqa' are supported")

    def _edge_residual(self, channels: int, stride: int, dilation: int) -> EdgeResidualConfig:
        self._refuse_others(
            ("exp_kernel_size", "pw_kernel_size", "exp_ratio", "force_in_chs"), {"se_ratio": 0, "group_size": 0}
        )
        forced = self._fields.integer("force_in_chs") if "force_in_chs" in self._raw else 0
        out_channels = self._out_channels()
        return EdgeResidualConfig(
            in_channels=channels,
            mid_channels=self._expanded(_rounded(forced) if forced else channels),
            out_channels=out_channels,
            exp_kernel_size=self._fields.integer("exp_kernel_size", at_least=1),
            pw_kernel_size=self._fields.integer("pw_kernel_size", at_least=1),
            stride=stride,
            dilation=dilation,
            has_skip=self._has_skip(channels, out_channels, stride),
        )

    def _universal_inverted_residual(
        self, channels: int, stride: int, dilation: int
    ) -> UniversalInvertedResidualConfig:
        kernels = ("dw_kernel_size_start", "dw_kernel_size_mid", "dw_kernel_size_end")
        self._refuse_others((*kernels, "exp_ratio"), {"se_ratio": 0, "group_size": 1})
        start, mid, end = (self._fields.integer(name) for name in kernels)
        if stride > 1 and not (start or mid or end):
            raise BadValue(
                f"{self._where}: stride is {stride}, but the block has no depthwise kernel that could stride"
            )
        out_channels = self._out_channels()
        return UniversalInvertedResidualConfig(
            in_channels=channels,
            mid_channels=self._expanded(channels),
            out_channels=out_channels,
            dw_kernel_size_start=start,
            dw_kernel_size_mid=mid,
            dw_kernel_size_end=end,
            stride=stride,
            dilation=dilation,
            has_skip=self._has_skip(channels, out_channels, stride),
            has_layer_scale=True,
        )

    def _mobile_attention(self, channels: int, stride: int, dilation: int) -> MobileAttentionConfig:
        # A stride here takes the skip connection away and is not applied to anything: so timm has it.
        self._refuse_others(
            ("dw_kernel_size", "num_heads", "key_dim", "value_dim", "kv_stride"), {"se_ratio": 0, "group_size": 1}
        )
        out_channels = self._out_channels()
        return MobileAttentionConfig(
            in_channels=channels,
            out_channels=out_channels,
            num_heads=self._fields.integer("num_heads", at_least=1),
            key_dim=self._fields.integer("key_dim", at_least=1),
            value_dim=self._fields.integer("value_dim", at_least=1),
            kv_stride=self._fields.integer("kv_stride", at_least=1),
            dw_kernel_size=self._fields.integer("dw_kernel_size", at_least=1),
            dilation=dilation,
            has_skip=self._has_skip(channels, out_channels, stride),
        )

    def _refuse_others(self, known: Sequence[str], neutral: dict[str, int]) -> None:
        """Keys that we do not know, and those that may only say what holds without them."""
        for key in sorted(set(self._raw) - {"block_type", "stride", "out_chs", "noskip", *known}):
            allowed = {"act_layer": None, **neutral}
            if key not in allowed:
                raise BadValue(
                    f"{self._where}: the key {key!r} is not supported for {self._raw['block_type']!r} blocks"
                )
            if self._raw[key] not in (None, allowed[key]):
                raise BadValue(f"{self._where}: {key} is {self._raw[key]!r}, only {allowed[key]!r} is supported")

    def _out_channels(self) -> int:
        return _rounded(self._fields.integer("out_chs", at_least=1))

    def _expanded(self, channels: int) -> int:
        ratio = self._fields.number("exp_ratio")
        if not 0 < ratio < math.inf:
            raise BadValue(f"{self._where}: exp_ratio is {ratio!r}, expected a number above 0")
        return _rounded(channels * ratio)

    def _has_skip(self, in_channels: int, out_channels: int, stride: int) -> bool:
        noskip = self._raw.get("noskip", False)
        if not isinstance(noskip, bool):
            raise BadValue(f"{self._where}: noskip is {noskip!r}, expected true or false")
        return in_channels == out_channels and stride == 1 and not noskip


def _msfa_stages(indices: Any, block_args: BlockArgs, channels: Sequence[int], where: str) -> tuple[int, ...]:
    """The stages that are fused, in order; 0 is the stem.

    `msfa_indices` count the stages before which and at whose end the picture shrinks. timm then takes them for indices
    of all stages, which is the same unless a stage keeps the picture's size.
    """
    if not isinstance(indices, list) or not indices or not all(type(index) is int for index in indices):
        raise BadValue(f"{where}: msfa_indices is {indices!r}, expected a list of integers")
    shrinks = [stage[0]["stride"] > 1 for stage in block_args]
    ends = [number for number, shrinking in enumerate([*shrinks, True]) if shrinking]
    if not all(-len(ends) <= index < len(ends) for index in indices):
        raise BadValue(f"{where}: msfa_indices is {indices!r}, but there are {len(ends)} resolutions")
    taken = sorted({index % len(ends) for index in indices})
    expected = sum(channels[ends[index]] for index in indices)
    found = sum(channels[number] for number in taken)
    if expected != found:
        raise BadValue(
            f"{where}: msfa_indices {indices!r} stand for {expected} channels, but the stages that timm takes for "
            f"them, {taken}, have {found}: give every stage a stride of 2, or other indices"
        )
    return tuple(taken)

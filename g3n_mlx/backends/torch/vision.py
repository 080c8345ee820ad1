"""The vision tower: a MobileNetV5 encoder whose last stages are fused (MSFA).

Attribute names are the checkpoint's. Inside, maps are [B, h, w, C]: norms, products and attention work on the last
axis, and torch takes a permuted view of such a map for its channels_last kernels, which are the faster ones on a CPU
(measured: 96 x 96 x 1536, depthwise 5 x 5, stride 2: 3.2 ms instead of 31 ms).
Arithmetic follows timm, mobilenetv5.py, _efficientnet_blocks.py, attention2d.py (arXiv:2404.10518), but for the norms
in bfloat16, which are float32 inside here. On a CPU that does not multiply bfloat16 all activations are float32, over
weights that stay as they are and are converted when they are used.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n_mlx.backends.torch.kernels.dense import dense_product_dtype
from g3n_mlx.backends.torch.kernels.towers import attention, pointwise, rms_norm_
from g3n_mlx.backends.torch.text import RMSNorm
from g3n_mlx.backends.torch.weights import Weights
from g3n_mlx.config.vision import (
    BlockConfig,
    EdgeResidualConfig,
    MobileAttentionConfig,
    UniversalInvertedResidualConfig,
    VisionConfig,
    same_padding,
)

# Not in any config: the norms' default in timm.
EPS = 1e-6


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    return F.gelu(x, approximate="tanh")


def normed(norm: RMSNorm, x: Tensor, act: bool = False) -> Tensor:
    """The norm of a map that nobody else holds, then GELU if `act`; [B, h, w, C], kept."""
    assert norm.weight is not None
    return rms_norm_(x, norm.weight, norm.eps, gelu if act else None)


def enlarged(x: Tensor, height: int, width: int) -> Tensor:
    """Nearest neighbours, [B, h, w, C] -> [B, height, width, C]."""
    if x.shape[1:3] == (height, width):
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), (height, width), mode="nearest").permute(0, 2, 3, 1)


def pooled(x: Tensor, resolution: int) -> Tensor:
    """Means of equal tiles, or bilinear where there are none, [B, h, w, C] -> [B, resolution, resolution, C]."""
    height, width = x.shape[1:3]
    x = x.permute(0, 3, 1, 2)  # [B, C, h, w]
    if height % resolution or width % resolution:
        x = F.interpolate(x, (resolution, resolution), mode="bilinear", align_corners=False, antialias=False)
    else:
        x = F.avg_pool2d(x, (height // resolution, width // resolution))
    return x.permute(0, 2, 3, 1)


class Pointwise(nn.Module):
    """A 1 x 1 convolution: a product over the channels."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights.tensor().flatten(1), requires_grad=False)  # [O, I]

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, I] -> [B, h, w, O]."""
        return pointwise(x, self.weight)


class Conv2d(nn.Module):
    """A spatial convolution, dense or depthwise, with TF-SAME padding for the size that comes."""

    def __init__(self, weights: Weights, stride: int, bias: bool = False) -> None:
        super().__init__()
        self.stride = stride
        weight = weights.tensor().contiguous(memory_format=torch.channels_last)  # [O, I, kH, kW]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(weights.tensor("bias"), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, I] -> [B, h / stride, w / stride, O], rounded up."""
        height, width = x.shape[1:3]
        top, bottom = same_padding(height, self.weight.shape[2], self.stride)
        left, right = same_padding(width, self.weight.shape[3], self.stride)
        padding = (top, left)
        if padding != (bottom, right):  # a convolution itself can only pad both sides alike
            x, padding = F.pad(x, (0, 0, left, right, top, bottom)), 0
        x = x.permute(0, 3, 1, 2)  # [B, I, h, w]
        groups = x.shape[1] // self.weight.shape[1]
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        x = F.conv2d(x, weight, bias, self.stride, padding, groups=groups)
        return x.permute(0, 2, 3, 1)


class ConvNorm(nn.Module):
    """A convolution and its norm, then GELU if `act`."""

    def __init__(self, conv: Pointwise | Conv2d, weights: Weights, act: bool = False) -> None:
        super().__init__()
        self.conv, self.act = conv, act
        self.bn = RMSNorm(weights.at("bn"), EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, I] -> [B, h', w', O]."""
        return normed(self.bn, self.conv(x), self.act)


class LayerScale(nn.Module):
    """A factor for every channel."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.gamma = nn.Parameter(weights.tensor("gamma"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C], kept."""
        return x * self.gamma


class EdgeResidual(nn.Module):
    """Spatial expansion, norm, GELU, projection, norm."""

    def __init__(self, config: EdgeResidualConfig, weights: Weights) -> None:
        super().__init__()
        self.has_skip = config.has_skip
        self.conv_exp = Conv2d(weights.at("conv_exp"), config.stride)
        self.bn1 = RMSNorm(weights.at("bn1"), EPS)
        conv_pwl = weights.at("conv_pwl")
        self.conv_pwl = Pointwise(conv_pwl) if config.pw_kernel_size == 1 else Conv2d(conv_pwl, 1)
        self.bn2 = RMSNorm(weights.at("bn2"), EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, I] -> [B, h', w', O]."""
        out = normed(self.bn1, self.conv_exp(x), act=True)
        out = normed(self.bn2, self.conv_pwl(out))
        return out + x if self.has_skip else out


class UniversalInvertedResidual(nn.Module):
    """Expansion and projection with depthwise convolutions before, between and after; GELU at the wide places only."""

    def __init__(self, config: UniversalInvertedResidualConfig, weights: Weights) -> None:
        super().__init__()
        self.has_skip = config.has_skip
        start, mid, end = config.strides
        self.dw_start = depthwise(weights.at("dw_start"), config.dw_kernel_size_start, start)
        self.pw_exp = ConvNorm(Pointwise(weights.at("pw_exp.conv")), weights.at("pw_exp"), act=True)
        self.dw_mid = depthwise(weights.at("dw_mid"), config.dw_kernel_size_mid, mid, act=True)
        self.pw_proj = ConvNorm(Pointwise(weights.at("pw_proj.conv")), weights.at("pw_proj"))
        self.dw_end = depthwise(weights.at("dw_end"), config.dw_kernel_size_end, end)
        self.layer_scale = LayerScale(weights.at("layer_scale")) if config.has_layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, I] -> [B, h', w', O]."""
        out = x if self.dw_start is None else self.dw_start(x)
        out = self.pw_exp(out)
        out = out if self.dw_mid is None else self.dw_mid(out)
        out = self.pw_proj(out)
        out = out if self.dw_end is None else self.dw_end(out)
        out = out if self.layer_scale is None else self.layer_scale(out)
        return out + x if self.has_skip else out


def depthwise(weights: Weights, kernel_size: int, stride: int, act: bool = False) -> ConvNorm | None:
    """A depthwise convolution and its norm, then GELU if `act`; None where the kernel has size 0."""
    return ConvNorm(Conv2d(weights.at("conv"), stride), weights, act) if kernel_size else None


class Projection(nn.Module):
    """Queries, keys, values or the output of attention; with a stride, of a smaller map."""

    def __init__(self, weights: Weights, stride: int) -> None:
        super().__init__()
        self.stride = stride
        if stride > 1:
            self.down_conv = Conv2d(weights.at("down_conv"), stride)
            self.norm = RMSNorm(weights.at("norm"), EPS)
        self.proj = Pointwise(weights.at("proj"))

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, I] -> [B, h', w', O]."""
        return self.proj(normed(self.norm, self.down_conv(x)) if self.stride > 1 else x)


class MultiQueryAttention(nn.Module):
    """Attention with N heads of queries and one of keys and values."""

    def __init__(self, config: MobileAttentionConfig, weights: Weights) -> None:
        super().__init__()
        self.key_dim, self.value_dim = config.key_dim, config.value_dim
        self.query = Projection(weights.at("query"), 1)
        self.key = Projection(weights.at("key"), config.kv_stride)
        self.value = Projection(weights.at("value"), config.kv_stride)
        self.output = Projection(weights.at("output"), 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, I] -> [B, h, w, O]."""
        batch, height, width, _ = x.shape
        # The heads attend to the same keys: they are rows of one query.
        q = self.query(x).reshape(batch, 1, -1, self.key_dim)  # [B, 1, h * w * N, H]
        k = self.key(x).reshape(batch, 1, -1, self.key_dim)  # [B, 1, S, H]
        v = self.value(x).reshape(batch, 1, -1, self.value_dim)
        out = attention(q, k, v, self.key_dim**-0.5)
        return self.output(out.reshape(batch, height, width, -1))


class MobileAttention(nn.Module):
    """Norm, attention, layer scale."""

    def __init__(self, config: MobileAttentionConfig, weights: Weights) -> None:
        super().__init__()
        self.has_skip = config.has_skip
        self.norm = RMSNorm(weights.at("norm"), EPS)
        self.attn = MultiQueryAttention(config, weights.at("attn"))
        self.layer_scale = LayerScale(weights.at("layer_scale"))

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, I] -> [B, h, w, O]."""
        out = self.layer_scale(self.attn(self.norm(x)))
        return out + x if self.has_skip else out


Block = EdgeResidual | UniversalInvertedResidual | MobileAttention


def block(config: BlockConfig, weights: Weights) -> Block:
    """The module of a block."""
    match config:
        case EdgeResidualConfig():
            return EdgeResidual(config, weights)
        case UniversalInvertedResidualConfig():
            return UniversalInvertedResidual(config, weights)
        case MobileAttentionConfig():
            return MobileAttention(config, weights)


class MultiScaleFusionAdapter(nn.Module):
    """Stages of several resolutions as one map of features."""

    def __init__(self, config: VisionConfig, weights: Weights) -> None:
        super().__init__()
        self.resolution = config.msfa_output_resolution
        self.ffn = UniversalInvertedResidual(config.msfa_ffn, weights.at("ffn"))
        self.norm = RMSNorm(weights.at("norm"), EPS)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """[B, h, w, C] each, the largest map first -> [B, resolution, resolution, hidden]."""
        height, width = stages[0].shape[1:3]
        fused = self.ffn(torch.cat([enlarged(stage, height, width) for stage in stages], dim=-1))
        return self.norm(pooled(fused, self.resolution))


class MobileNetV5Encoder(nn.Module):
    """Stem, stages of blocks, fusion."""

    def __init__(self, config: VisionConfig, weights: Weights) -> None:
        super().__init__()
        self.msfa_stages = config.msfa_stages
        self.conv_stem = ConvNorm(Conv2d(weights.at("conv_stem.conv"), 2, bias=True), weights.at("conv_stem"), act=True)
        self.blocks: list[list[Block]] = nn.ModuleList(  # pyright: ignore[reportAttributeAccessIssue]
            nn.ModuleList(
                block(block_config, weights.at(f"blocks.{stage_idx}.{block_idx}"))
                for block_idx, block_config in enumerate(stage)
            )
            for stage_idx, stage in enumerate(config.stages)
        )
        self.msfa = MultiScaleFusionAdapter(config, weights.at("msfa"))

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """What the stem and every stage make of pixels [B, h, w, 3]."""
        x = self.conv_stem(x)
        yield x
        for stage in self.blocks:
            for module in stage:
                x = module(x)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, h, w, 3] -> [B, resolution, resolution, hidden]."""
        stages = enumerate(self.stages(x))
        return self.msfa([stage for number, stage in stages if number in self.msfa_stages])


class VisionTower(nn.Module):
    """From pixels to features."""

    def __init__(self, config: VisionConfig, weights: Weights) -> None:
        super().__init__()
        self.dtype = dense_product_dtype(weights.dtype, weights.device.type)
        self.timm_model = MobileNetV5Encoder(config, weights.at("timm_model"))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, h, w] of any float dtype -> features [B, hidden, resolution, resolution]."""
        return self.timm_model(pixels.to(self.dtype).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

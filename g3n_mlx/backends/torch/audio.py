"""Gemma 3n's audio tower, a USM conformer: subsampling (SSCP), chunked local attention, light convolution.

Attribute names are the checkpoint's. Activations are [B, T, D]; masks are True where there is sound (the reference's
are True where there is none). Arithmetic follows transformers, modeling_gemma3n.py; USM is arXiv:2303.01037.
On a CPU that does not multiply bfloat16 activations are float32, as in vision.py.
Letters of attention: W queries of a chunk, U chunks, C keys of a chunk's context, R relative positions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n_mlx.backends.torch.kernels.dense import dense_product_dtype
from g3n_mlx.backends.torch.kernels.towers import pointwise, rms_norm_
from g3n_mlx.backends.torch.layers import Linear, linear
from g3n_mlx.backends.torch.text import RMSNorm
from g3n_mlx.backends.torch.weights import Weights, from_numpy
from g3n_mlx.config.audio import FIXED_NORM_EPS, SSCP_FREQUENCY_PADDING, AudioConfig


def projected(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, which takes rows, over the last axis."""
    if isinstance(layer, Linear) and x.dtype == torch.float32:
        return pointwise(x, layer.weight)
    return layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def normed(norm: RMSNorm, x: Tensor, limit: float) -> Tensor:
    """The norm of x, whose values are clipped at +-limit before; [B, T, D], kept."""
    assert norm.weight is not None
    return rms_norm_(x.clamp(-limit, limit), norm.weight, norm.eps)


class Conv2d(nn.Module):
    """A convolution over time and frequency without padding."""

    def __init__(self, stride: tuple[int, int], weights: Weights) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(weights.tensor(), requires_grad=False)  # [O, I, time, frequency]

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, T, F] -> [B, O, T', F']."""
        return F.conv2d(x, self.weight.to(x.dtype), stride=self.stride)


class CumulativeGroupNorm(nn.Module):
    """Normalizes each time step by the mean and variance of everything up to it; padding counts like sound."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.eps = config.sscp_conv_group_norm_eps
        self.weight = nn.Parameter(weights.tensor(), requires_grad=False)  # [C]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, F], kept; in float32 inside."""
        values = x.float()
        steps = torch.arange(1, x.shape[2] + 1, dtype=torch.float32, device=x.device)[:, None]  # [T, 1]
        count = steps * (x.shape[1] * x.shape[3])
        mean = values.sum((1, 3), keepdim=True).cumsum(2) / count  # [B, 1, T, 1]
        # Each step's squares are about the mean that ran up to it, not about the final one.
        centred = values - mean
        variance = centred.square().sum((1, 3), keepdim=True).cumsum(2) / count
        return (centred * torch.rsqrt(variance + self.eps) * self.weight.float()[:, None, None]).to(x.dtype)


class SSCPConvBlock(nn.Module):
    """Convolution, cumulative group norm and ReLU; the convolution looks ahead in time, never back."""

    def __init__(self, config: AudioConfig, conv_idx: int, weights: Weights) -> None:
        super().__init__()
        self.look_ahead = config.sscp_conv_kernel_size[conv_idx][0] - 1
        self.conv = Conv2d(config.sscp_conv_stride_size[conv_idx], weights.at("conv"))
        self.norm = CumulativeGroupNorm(config, weights.at("norm"))

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, T, F] -> [B, O, T', F']."""
        padded = F.pad(x, (SSCP_FREQUENCY_PADDING, SSCP_FREQUENCY_PADDING, 0, self.look_ahead))
        return F.relu(self.norm(self.conv(padded)))


class SubSampleConvProjection(nn.Module):
    """Two strided convolutions and a projection to the conformer's width (SSCP)."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.conv_0 = SSCPConvBlock(config, 0, weights.at("conv_0"))
        self.conv_1 = SSCPConvBlock(config, 1, weights.at("conv_1"))
        self.input_proj_linear = linear(weights.at("input_proj_linear"))

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, mel] -> [B, T', D]."""
        x = self.conv_1(self.conv_0(frames[:, None]))  # [B, C, T', F]
        return projected(self.input_proj_linear, x.permute(0, 2, 3, 1).flatten(2))


class RelativePositionEmbedding(nn.Module):
    """What the distance between query and key adds to their logit."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.num_heads = config.conf_num_attention_heads
        self.pos_proj = linear(weights.at("pos_proj"))
        dtype = dense_product_dtype(weights.dtype, weights.device.type)
        self.timing_signal = from_numpy(config.timing_signal()).to(weights.device, dtype)  # [R, D]

    def forward(self, queries: Tensor, context_size: int) -> Tensor:
        """[B, N, U, W, H] -> [B, N, U, W, C]; 0 where the key is out of the query's reach."""
        positions = self.pos_proj(self.timing_signal).unflatten(-1, (self.num_heads, -1))  # [R, N, H]
        return shifted(queries @ positions.permute(1, 2, 0)[:, None], context_size)


def shifted(terms: Tensor, context_size: int) -> Tensor:
    """Moves row w of [..., W, R] by w to the right, into the keys' places: [..., W, C]."""
    rows, span = terms.shape[-2:]
    # Rows one longer than the context, read as rows of its size: each begins one step earlier than the one before.
    padded = F.pad(terms, (0, context_size + 1 - span)).flatten(-2)
    return padded[..., : rows * context_size].unflatten(-1, (rows, context_size))


class LocalAttention(nn.Module):
    """Attention to what is near, in chunks of queries, with relative positions and capped logits."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.num_heads = config.conf_num_attention_heads
        self.chunk_size, self.context_size = config.conf_attention_chunk_size, config.context_size
        self.past, self.future = config.past_horizon, config.conf_attention_context_right
        self.logit_cap, self.query_scale = config.conf_attention_logit_cap, config.query_scale
        self.q_proj = linear(weights.at("q_proj"))
        self.k_proj = linear(weights.at("k_proj"))
        self.v_proj = linear(weights.at("v_proj"))
        self.per_dim_scale = nn.Parameter(weights.tensor("per_dim_scale"), requires_grad=False)  # [H]
        self.relative_position_embedding = RelativePositionEmbedding(config, weights.at("relative_position_embedding"))
        self.window = from_numpy(config.window()).to(weights.device)  # [W, C]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] and [B, T] -> [B, T, D]."""
        batch, length, width = x.shape
        # In float32 until both factors are one: the reference's bfloat16 1 / softplus(0) alone is off by 0.2 %.
        scale = (F.softplus(self.per_dim_scale.float()) * self.query_scale).to(x.dtype)
        queries = self.chunks(self.heads(projected(self.q_proj, x)) * scale).permute(0, 3, 1, 2, 4)  # [B, N, U, W, H]
        keys = self.contexts(self.heads(projected(self.k_proj, x))).permute(0, 3, 1, 4, 2)  # [B, N, U, H, C]
        values = self.contexts(self.heads(projected(self.v_proj, x))).permute(0, 3, 1, 2, 4)  # [B, N, U, C, H]
        logits = queries @ keys + self.relative_position_embedding(queries, self.context_size)  # [B, N, U, W, C]
        logits = torch.tanh(logits / self.logit_cap) * self.logit_cap
        seen = self.contexts(mask)[:, None, :, None] & self.window  # [B, 1, U, W, C]
        # The lowest number, not -inf: a query that sees nothing is padding, and must not become NaN.
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32).to(x.dtype)
        attended = (probabilities @ values).permute(0, 2, 3, 1, 4)  # [B, U, W, N, H]
        return attended.reshape(batch, -1, width)[:, :length]

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, N, H]."""
        return x.unflatten(-1, (self.num_heads, -1))

    def chunks(self, x: Tensor) -> Tensor:
        """[B, T, N, H] -> [B, U, W, N, H], zeros behind the end."""
        padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % self.chunk_size))
        return padded.unflatten(1, (-1, self.chunk_size))

    def contexts(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, U, C, ...]: each chunk with what its queries see around it, zeros beyond the ends."""
        rest = (0, 0) * (x.ndim - 2)
        padded = F.pad(x, (*rest, self.past, self.future + self.chunk_size - 1))
        starts = torch.arange(0, x.shape[1], self.chunk_size, device=x.device)[:, None]
        return padded[:, starts + torch.arange(self.context_size, device=x.device)]


class ConformerAttention(nn.Module):
    """Local attention between two norms, beside a residual."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.limit = config.gradient_clipping
        self.pre_attn_norm = RMSNorm(weights.at("pre_attn_norm"), FIXED_NORM_EPS)
        self.attn = LocalAttention(config, weights.at("attn"))
        self.post = linear(weights.at("post"))
        self.post_norm = RMSNorm(weights.at("post_norm"), FIXED_NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] and [B, T] -> [B, T, D]."""
        attended = self.attn(normed(self.pre_attn_norm, x, self.limit), mask)
        return x + normed(self.post_norm, projected(self.post, attended), self.limit)


class ConformerFeedForward(nn.Module):
    """FFN between two norms, beside a residual."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.limit, self.residual_weight = config.gradient_clipping, config.conf_residual_weight
        self.pre_layer_norm = RMSNorm(weights.at("pre_layer_norm"), FIXED_NORM_EPS)
        self.ffw_layer_1 = linear(weights.at("ffw_layer_1"))
        self.ffw_layer_2 = linear(weights.at("ffw_layer_2"))
        self.post_layer_norm = RMSNorm(weights.at("post_layer_norm"), FIXED_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        update = projected(self.ffw_layer_1, normed(self.pre_layer_norm, x, self.limit))
        update = projected(self.ffw_layer_2, F.silu(update, inplace=True))
        return x + normed(self.post_layer_norm, update, self.limit) * self.residual_weight


class DepthwiseConv1d(nn.Module):
    """A convolution over time of each channel alone, which sees the present and the past."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.look_back = config.conf_conv_kernel_size - 1
        self.weight = nn.Parameter(weights.tensor(), requires_grad=False)  # [D, 1, kernel]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        padded = F.pad(x.transpose(1, 2), (self.look_back, 0))  # [B, D, look back + T]
        return F.conv1d(padded, self.weight.to(x.dtype), groups=self.weight.shape[0]).transpose(1, 2)


class ConformerLightConv1d(nn.Module):
    """Gated linear unit, depthwise convolution and projection, beside a residual."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.limit = config.gradient_clipping
        self.pre_layer_norm = RMSNorm(weights.at("pre_layer_norm"), config.rms_norm_eps)
        self.linear_start = linear(weights.at("linear_start"))
        self.depthwise_conv1d = DepthwiseConv1d(config, weights.at("depthwise_conv1d"))
        self.conv_norm = RMSNorm(weights.at("conv_norm"), config.rms_norm_eps)
        self.linear_end = linear(weights.at("linear_end"))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gated = F.glu(projected(self.linear_start, self.pre_layer_norm(x)), dim=-1)
        mixed = normed(self.conv_norm, self.depthwise_conv1d(gated), self.limit)
        return x + projected(self.linear_end, F.silu(mixed))


class ConformerBlock(nn.Module):
    """One layer: half an FFN, attention, light convolution, the other half."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.limit = config.gradient_clipping
        self.ffw_layer_start = ConformerFeedForward(config, weights.at("ffw_layer_start"))
        self.attention = ConformerAttention(config, weights.at("attention"))
        self.lconv1d = ConformerLightConv1d(config, weights.at("lconv1d"))
        self.ffw_layer_end = ConformerFeedForward(config, weights.at("ffw_layer_end"))
        self.norm = RMSNorm(weights.at("norm"), FIXED_NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] and [B, T] -> [B, T, D]."""
        x = self.attention(self.ffw_layer_start(x), mask)
        # Padding is silenced, or the convolution would carry it into the sound behind it.
        x = self.ffw_layer_end(self.lconv1d(x * mask[..., None]))
        return normed(self.norm, x, self.limit)


class AudioTower(nn.Module):
    """From log-mel frames to encodings, one for every `config.total_reduction` frames."""

    def __init__(self, config: AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.dtype = dense_product_dtype(weights.dtype, weights.device.type)
        self.time_stride, self.reduction_factor = config.time_stride, config.conf_reduction_factor
        self.subsample_conv_projection = SubSampleConvProjection(config, weights.at("subsample_conv_projection"))
        self.conformer = nn.ModuleList(
            ConformerBlock(config, weights.at(f"conformer.{layer_idx}"))
            for layer_idx in range(config.conf_num_hidden_layers)
        )

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [B, T, mel], which are sound, bool [B, T] -> encodings [B, T', D], 0 where there is none, [B, T']."""
        x = self.subsample_conv_projection(frames.to(self.dtype))
        mask = mask[:, :: self.time_stride]  # the first frame that a position sees decides
        for block in self.conformer:
            x = block(x, mask)
        x, mask = x[:, :: self.reduction_factor], mask[:, :: self.reduction_factor]
        return x.masked_fill(~mask[..., None], 0.0), mask

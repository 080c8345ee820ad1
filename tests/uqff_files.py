"""Writes models as mistral.rs 0.9.5 quantizes them: UQFF files, with the numbers that they stand for."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import ml_dtypes
import numpy as np

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import dequantize, quantize

Tensors = dict[str, np.ndarray]
RNG = np.random.default_rng(0)
# Weights as mistral.rs has them, and the numbers that they stand for by the formulas of ggml-quants.c, one by one.
Encoded = tuple[Tensors, np.ndarray]


def half(value: float) -> tuple[bytes, float]:
    raw = np.float16(value)
    return raw.tobytes(), float(raw)


def afq(weight: np.ndarray, bits: int = 4, group_size: int = 32) -> Encoded:
    packed, scales, biases = quantize(weight.astype(ml_dtypes.bfloat16), bits, group_size)
    parts = {"": packed, ".scales": scales, ".biases": biases, ".format": np.uint8(4)}
    parts |= {".bits": np.uint8(bits), ".group_size": np.uint8(group_size)}
    return parts, dequantize(packed, scales, biases, bits, group_size)


def unquantized(weight: np.ndarray) -> Encoded:
    return {"": weight, ".format": np.uint8(1)}, weight.astype(np.float32)


def ggml(kind: int, block: int, encode: Callable[[], tuple[bytes, list[float]]]) -> Callable[[np.ndarray], Encoded]:
    """Random blocks: what they hold does not matter, only that the same comes out."""

    def encoded(weight: np.ndarray) -> Encoded:
        raw, values = zip(*(encode() for _ in range(weight.size // block)), strict=True)
        parts = {"": np.frombuffer(b"".join(raw), np.uint8), ".format": np.uint8(0), ".dtype": np.uint32(kind)}
        return parts | {".shape": np.array(weight.shape, np.uint32)}, np.array(values, np.float32).reshape(weight.shape)

    return encoded


def q4_0() -> tuple[bytes, list[float]]:
    raw, d = half(RNG.normal(0, 0.01))
    q = RNG.integers(0, 256, 16).tolist()
    return raw + bytes(q), [(b & 15) * d - 8 * d for b in q] + [(b >> 4) * d - 8 * d for b in q]


def q5_1() -> tuple[bytes, list[float]]:
    (raw, d), (raw_m, m) = half(0.01), half(-0.15)
    high, q = int(RNG.integers(0, 2**32)), RNG.integers(0, 256, 16).tolist()
    codes = [b & 15 | (high >> i & 1) << 4 for i, b in enumerate(q)]
    codes += [b >> 4 | (high >> (i + 16) & 1) << 4 for i, b in enumerate(q)]
    return raw + raw_m + struct.pack("<I", high) + bytes(q), [code * d + m for code in codes]


def q8_0() -> tuple[bytes, list[float]]:
    raw, d = half(RNG.normal(0, 0.001))
    q = RNG.integers(-128, 128, 32).tolist()
    return raw + struct.pack("32b", *q), [d * code for code in q]


def k_quant(bits: int) -> tuple[bytes, list[float]]:
    (raw, d), (raw_min, dmin) = half(0.0003), half(0.0011)
    scales = RNG.integers(0, 256, 12).tolist()
    high, low = RNG.integers(0, 256, 32).tolist(), RNG.integers(0, 256, 128).tolist()
    values = []
    for group in range(8):
        if group < 4:
            scale, minimum = scales[group] & 63, scales[group + 4] & 63
        else:
            scale = scales[group + 4] & 15 | scales[group - 4] >> 6 << 4
            minimum = scales[group + 4] >> 4 | scales[group] >> 6 << 4
        for place in range(32):
            code = low[group // 2 * 32 + place] >> 4 * (group % 2) & 15
            if bits == 5:
                code |= (high[place] >> group & 1) << 4
            values.append(d * scale * code - dmin * minimum)
    return raw + raw_min + bytes(scales) + (bytes(high) if bits == 5 else b"") + bytes(low), values


def q6_k() -> tuple[bytes, list[float]]:
    raw, d = half(0.0002)
    low, high = RNG.integers(0, 256, 128).tolist(), RNG.integers(0, 256, 64).tolist()
    scales = RNG.integers(-60, 60, 16).tolist()
    values = []
    for at in range(256):
        half_of, quarter, place = at // 128, at // 32 % 4, at % 32
        code = low[half_of * 64 + quarter % 2 * 32 + place] >> 4 * (quarter // 2) & 15
        code |= (high[half_of * 32 + place] >> 2 * quarter & 3) << 4
        values.append(d * scales[at // 16] * (code - 32))
    return bytes(low) + bytes(high) + struct.pack("16b", *scales) + raw, values


def hqq(weight: np.ndarray, bits: int = 4, group_size: int = 64, axis: int = 0) -> Encoded:
    """Random codes, scales and zeros, in the order of mistralrs-quant/src/hqq (quantize.rs, HqqBits::bitpack_type)."""
    shape = (group_size, weight.size // group_size)
    codes = RNG.integers(0, 2**bits, shape if axis == 0 else shape[::-1], np.uint8)
    count = (1, shape[1]) if axis == 0 else (shape[1], 1)
    scales, zeros = (RNG.uniform(*ends, count).astype(np.float32) for ends in ((0.001, 0.01), (0, 2**bits - 1)))
    packed = np.zeros_like(codes[: len(codes) * bits // 8])
    for part in np.split(codes, 8 // bits):
        packed = (packed << bits if bits < 8 else packed) | part
    parts = {"": packed, ".scales": scales, ".zeros": zeros, ".shape": np.array(weight.shape, np.uint32)}
    parts |= {".format": np.uint8(2), ".bits": np.uint8(bits), ".group_size": np.uint32(group_size)}
    parts |= {".axis": np.uint8(axis), ".channel_wise": np.uint8(1), ".round_zeros": np.uint8(0)}
    parts[".optimization_steps"] = np.uint32(10)
    return parts, ((codes - zeros.astype(float)) * scales).reshape(weight.shape).astype(np.float32)


WIDE = {
    "Q4_0": ggml(2, 32, q4_0),
    "Q5_1": ggml(7, 32, q5_1),
    "Q8_0": ggml(8, 32, q8_0),
    "Q4K": ggml(12, 256, lambda: k_quant(4)),
    "Q5K": ggml(13, 256, lambda: k_quant(5)),
    "Q6K": ggml(14, 256, q6_k),
}
DOWN = "model.language_model.layers.0.mlp.down_proj"  # 256 inputs
TABLE = "model.language_model.embed_tokens"
PROJECTION = "model.embed_vision.embedding_projection"
AUDIO = "model.audio_tower.conformer.0.attention.attn.q_proj"
BUFFERS = {
    "model.language_model.layers.0.self_attn.v_norm.weight": np.ones(32, np.float32),
    "model.audio_tower.conformer.0.attention.attn.invalid_logits_tensor": np.float32(-1e9),
}


def write_uqff(
    folder: Path, published: tuple[dict[str, Any], Tensors], encoders: dict[str, Any], version: tuple[int, int] = (1, 2)
) -> tuple[Path, Tensors]:
    """The folder, and the numbers that the modules of the encoders stand for then."""
    config, tensors = published
    residual, stored = dict(tensors) | BUFFERS, {}
    meant = {}
    for path, encoder in encoders.items():
        parts, meant[path] = encoder(residual.pop(f"{path}.weight"))
        stored |= {f"{path}.weight{end}": np.asarray(part) for end, part in parts.items()}
    for part, number in zip(("major", "minor", "patch"), (*version, 0), strict=True):
        stored[f"uqff.version.{part}"] = np.uint32(number)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files.write_safetensors(folder / "model-0.uqff", stored)
    files.write_safetensors(folder / "residual.safetensors", residual)
    return folder, meant


def read(checkpoint: Checkpoint, path: str) -> np.ndarray:
    path = path.removeprefix("model.")
    how = checkpoint.quantization(path)
    if how is None:
        return checkpoint.read(f"{path}.weight").astype(np.float32)
    parts = (checkpoint.read(f"{path}.{part}") for part in ("weight", "scales", "biases"))
    return dequantize(*parts, how.bits, how.group_size)

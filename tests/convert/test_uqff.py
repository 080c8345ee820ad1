"""Models that mistral.rs has quantized: UQFF files as its version 0.9.5 writes them, written here by hand."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import ml_dtypes
import numpy as np
import pytest

from g3n_mlx import load
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import dequantize, quantize
from g3n_mlx.convert import convert
from g3n_mlx.convert.__main__ import main
from g3n_mlx.convert.uqff import convert_uqff
from g3n_mlx.failures import Error

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


WIDE = {
    "Q4_0": ggml(2, 32, q4_0),
    "Q5_1": ggml(7, 32, q5_1),
    "Q8_0": ggml(8, 32, q8_0),
    "Q4K": ggml(12, 256, lambda: k_quant(4)),
    "Q5K": ggml(13, 256, lambda: k_quant(5)),
    "Q6K": ggml(14, 256, q6_k),
}
DOWN = "model.language_model.layers.0.mlp.down_proj"  # 256 inputs
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


@pytest.mark.parametrize("kind", WIDE)
def test_blocks_of_llama_cpp_keep_their_numbers(published, tmp_path, kind) -> None:
    """All but Q6_K exactly, and in a tower within bfloat16."""
    source, meant = write_uqff(tmp_path / "u", published, {DOWN: WIDE[kind]})
    made = Checkpoint.open(convert_uqff(source, tmp_path / "made", progress=False))
    exact = meant[DOWN]
    tolerance = np.abs(exact).max() / 127 if kind == "Q6K" else 1e-6 * np.abs(exact).max()
    np.testing.assert_allclose(read(made, DOWN), exact, atol=tolerance, rtol=0)
    bits = {"Q4": 4, "Q5": 5, "Q6": 8, "Q8": 8}[kind[:2]]
    assert [(how.bits, how.group_size) for how in made.quantizations.values()] == [(bits, 32)]


def test_a_folder_of_mixed_formats(published, tmp_path) -> None:
    tensors = published[1]
    encoders: dict[str, Any] = {
        "model.language_model.embed_tokens": lambda weight: afq(weight, 6, 64),
        "model.language_model.layers.0.self_attn.q_proj": afq,
        "model.language_model.layers.1.self_attn.q_proj": unquantized,
        DOWN: WIDE["Q8_0"],
        AUDIO: afq,
    }
    source, meant = write_uqff(tmp_path / "u", published, encoders)
    made = Checkpoint.open(convert_uqff(source, tmp_path / "made", progress=False))
    for path, values in meant.items():
        np.testing.assert_allclose(read(made, path), values, rtol=2**-8 if path == AUDIO else 1e-6, atol=1e-6)
    assert made.quantization(AUDIO.removeprefix("model.")) is None
    for name in made.names:
        path = f"model.{name.rpartition('.')[0]}"
        if path not in meant:
            assert files.same(made.read(name), tensors[f"model.{name}"]), name


def test_it_is_loaded_like_any_model(published, tiny_folder, backend, tmp_path, monkeypatch, capsys) -> None:
    """Once through the cache, and by the command: the answers of the quantization itself."""
    monkeypatch.setattr("g3n_mlx.convert.uqff.cache_folder", lambda: tmp_path / "cache")
    expected = convert(tiny_folder, tmp_path / "q", q_bits=4, q_group_size=32, progress=False)
    modules = [f"model.{path}" for path in Checkpoint.open(expected).quantizations if "per_layer.weight" not in path]
    encoders = {path: afq for path in modules if not path.endswith("embed_tokens_per_layer")}
    encoders["model.language_model.embed_tokens_per_layer"] = lambda weight: afq(weight, 8)
    source, _ = write_uqff(tmp_path / "u", published, encoders)
    files.copy_sidecars(tiny_folder, source)
    options, ids = {"backend": backend, "dtype": "float32", "device": "cpu"}, [2, *range(300, 320)]
    with load(expected, **options) as ours, load(source, **options) as theirs:
        assert theirs.name == "u"
        np.testing.assert_allclose(theirs.logits(ids), ours.logits(ids), atol=1e-4)
    assert len(list((tmp_path / "cache" / "conversions").glob("u-uqff-*"))) == 1
    assert main(["--uqff", str(source), "-o", str(tmp_path / "made")]) == 0
    assert "wrote" in capsys.readouterr().err
    source, _ = write_uqff(tmp_path / "mixed", published, {DOWN: WIDE["Q4K"]})
    files.copy_sidecars(tiny_folder, source)
    with load(source, **options) as model, load(tiny_folder, **options) as plain:
        assert np.isfinite(model.logits(ids)).all()
        assert np.abs(model.logits(ids) - plain.logits(ids)).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("uqff.version.major"),
            "before version 1.0, which mistral.rs itself no longer reads",
        ),
        (lambda t: t.update({"uqff.version.major": np.uint32(2)}), "is UQFF 2.2: up to 1.2 is read"),
        (lambda t: t.update({"uqff.version.minor": np.uint32(3)}), "is UQFF 1.3: up to 1.2 is read"),
        (lambda t: t.update({f"{DOWN}.weight.format": np.uint8(2)}), "is stored as HQQ, which is not read"),
        (lambda t: t.update({f"{DOWN}.weight.format": np.uint8(9)}), "is stored as format 9, which is not read"),
        (lambda t: t.update({f"{DOWN}.weight.dtype": np.uint32(10)}), "is stored as ggml type 10, which is not read"),
        (lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][:-1]}), "expected Q8_0 of"),
        (lambda t: t.pop(f"{DOWN}.weight"), "is not there, but what belongs to it"),
    ],
)
def test_what_can_not_be_read_is_one_error(published, tmp_path, change, message) -> None:
    source, _ = write_uqff(tmp_path / "u", published, {DOWN: WIDE["Q8_0"]})
    tensors = files.read_safetensors(source / "model-0.uqff")
    change(tensors)
    files.write_safetensors(source / "model-0.uqff", tensors)
    with pytest.raises(Error, match=message):
        convert_uqff(source, tmp_path / "made", progress=False)
    assert not (tmp_path / "made").exists()


def test_folders_that_are_none(published, tiny_folder, tmp_path, capsys) -> None:
    source, _ = write_uqff(tmp_path / "u", published, {DOWN: afq})
    with pytest.raises(Error, match=r"is a UQFF model of mistral.rs: g3n convert --uqff"):
        Checkpoint.open(source)
    with pytest.raises(Error, match=r"holds no \*.uqff files"):
        convert_uqff(tiny_folder, tmp_path / "made")
    (source / "residual.safetensors").unlink()
    with pytest.raises(Error, match=r"lacks residual.safetensors"):
        convert_uqff(source, tmp_path / "made")
    with pytest.raises(SystemExit):
        main(["--uqff", str(source), "-o", str(tmp_path / "made"), "-q"])
    assert "--uqff converts what is there: leave out --quantize" in capsys.readouterr().err

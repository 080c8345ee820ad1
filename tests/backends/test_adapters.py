"""Adapters in a running model: beside quantized weights, over shared ones, through slices, batches and drafts."""

import shutil
from pathlib import Path
from typing import Any

import adapter_files as adapters
import checkpoint_files as files
import numpy as np
import pytest

from g3n_mlx import load
from g3n_mlx.convert import convert
from g3n_mlx.failures import Error

# Sums of merged and of separate products in another order, under a soft cap of 30.
CLOSE = 2e-4
IDS = np.random.default_rng(7).integers(5, 800, 70).tolist()


@pytest.fixture(scope="module")
def folders(published, tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint in float32 and its adapters, and the same merged by plain numpy."""
    root = tmp_path_factory.mktemp("adapters")
    config, tensors = published
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    found = {"plain": files.write_folder(root / "plain", config, tensors)}
    for name, dora in (("lora", False), ("dora", True)):
        changes = adapters.low_ranks(tensors)
        found[name] = adapters.write_peft(root / name, changes, dora)
        found[f"{name} merged"] = files.write_folder(
            root / f"{name} merged", config, adapters.merged(tensors, changes, dora)
        )
    found["tower"] = adapters.write_peft(
        root / "tower", adapters.low_ranks(tensors, ("model.audio_tower.conformer.0.attention.attn.q_proj",))
    )
    for folder in found.values():
        if (folder / "config.json").is_file():
            files.copy_sidecars(tiny_folder, folder)
    found["q"] = convert(found["plain"], root / "q", q_bits=4, q_group_size=32, dtype="float32", progress=False)
    return found


def dequantized(folder: Path, target: Path, changes: Any, dora: bool) -> Path:
    """A quantized checkpoint made dense, with an adapter merged into it."""
    from g3n_mlx.checkpoint.quantization import dequantize

    tensors = files.read_folder(folder)
    for path in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        parts = [tensors.pop(f"{path}.{part}") for part in ("weight", "scales", "biases")]
        bits = parts[0].shape[1] * 32 // (parts[1].shape[1] * 32)
        tensors[f"{path}.weight"] = dequantize(*parts, bits, 32)
    config = {name: value for name, value in files.read_config(folder).items() if "quantization" not in name}
    files.write_folder(target, config, adapters.merged(tensors, changes, dora))
    files.copy_sidecars(folder, target)
    return target


def opened(folder: Path, backend: str, **options: Any) -> Any:
    return load(folder, backend=backend, dtype="float32", device="cpu", **options)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dense_weights_are_merged_and_shared_ones_are_not(folders, backend: str, kind: str) -> None:
    expected = opened(folders[f"{kind} merged"], backend).logits(IDS)
    plain = opened(folders["plain"], backend)
    before = plain.logits(IDS)
    assert np.abs(expected - before).max() > 1
    assert np.abs(opened(folders["plain"], backend, adapter=folders[kind]).logits(IDS) - expected).max() < CLOSE
    adapted = plain.adapted(folders[kind])
    assert np.abs(adapted.logits(IDS) - expected).max() < CLOSE
    assert np.array_equal(plain.logits(IDS), before)
    plain.close()
    assert np.abs(adapted.logits(IDS) - expected).max() < CLOSE
    assert str(folders[kind]) in repr(adapted)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_quantized_weights_stay_and_the_adapter_goes_beside_them(
    folders, published, backend: str, kind: str, tmp_path: Path
) -> None:
    changes = adapters.low_ranks({name: array.astype(np.float32) for name, array in published[1].items()})
    merged = dequantized(folders["q"], tmp_path / "dense", changes, kind == "dora")
    expected = opened(merged, backend).logits(IDS)
    model = opened(folders["q"], backend, adapter=folders[kind])
    assert model.checkpoint.quantizations
    assert np.abs(model.logits(IDS) - expected).max() < CLOSE
    plain = opened(folders["q"], backend)
    assert np.abs(plain.logits(IDS) - expected).max() > 1
    assert np.abs(plain.adapted(folders[kind]).logits(IDS) - expected).max() < CLOSE


@pytest.mark.parametrize("base", ["plain", "q"])
def test_decode_steps_and_drafts_have_the_adapter_too(folders, backend: str, base: str) -> None:
    """The fast paths of a decode step, those in C and the compiled ones, against logits of the whole prompt."""
    model = opened(folders[base], backend, adapter=folders["lora"])
    prompt = IDS[:20]
    for other in (model, opened(folders[base], backend).adapted(folders["lora"])):
        ids = [chunk.token for chunk in other.stream(prompt, max_tokens=12, temperature=0.0, ignore_eos=True)][:12]
        rows = model.logits(prompt + ids)[len(prompt) - 1 : -1]
        best = rows.max(axis=1) - rows[np.arange(12), ids]
        assert best.max() < CLOSE
        drafted = other.generate(prompt, max_tokens=12, temperature=0.0, ignore_eos=True, draft="lookup")
        assert drafted.text == other.generate(prompt, max_tokens=12, temperature=0.0, ignore_eos=True).text


@pytest.mark.parametrize("base", ["plain", "q"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_slice_has_its_part_of_the_adapter(folders, backend: str, base: str, kind: str, tmp_path: Path) -> None:
    table = tmp_path / "slices.csv"
    widths = [192, 128, 256, 64, 256, 256, 128, 256]
    table.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        f'mixed,8,,,"{widths}","[2, 7]"\n'
    )
    given = {"matformer_config": table}
    whole = opened(folders[base], backend, adapter=folders[kind])
    expected = opened(folders[base], backend, adapter=folders[kind], matformer="mixed", **given).logits(IDS)
    assert np.abs(opened(folders[base], backend, matformer="mixed", **given).logits(IDS) - expected).max() > 1
    assert np.abs(whole.slice("mixed", **given).logits(IDS) - expected).max() < CLOSE
    shared = opened(folders[base], backend).adapted(folders[kind])
    assert np.abs(shared.slice("mixed", **given).logits(IDS) - expected).max() < CLOSE
    if base == "plain":
        merged = opened(folders[f"{kind} merged"], backend, matformer="mixed", **given).logits(IDS)
        assert np.abs(merged - expected).max() < CLOSE


def test_bits_at_load_leave_the_adapter_as_it_is(folders, backend: str, tmp_path, monkeypatch) -> None:
    """The cached conversion is the base model's: one for all adapters."""
    monkeypatch.setattr("g3n_mlx.convert.cache_folder", lambda: tmp_path)
    model = opened(folders["plain"], backend, q_bits=8, adapter=folders["lora"])
    assert len(list((tmp_path / "conversions").iterdir())) == 1
    assert model.checkpoint.low_ranks
    expected = opened(folders["lora merged"], backend).logits(IDS)
    distance = np.abs(model.logits(IDS) - expected).mean()
    assert distance < np.abs(opened(folders["plain"], backend, q_bits=8).logits(IDS) - expected).mean() / 3


def test_adapters_over_each_other_and_with_weights(folders, backend: str) -> None:
    plain, lora = opened(folders["plain"], backend), folders["lora"]
    half = plain.adapted({str(lora): 0.5})
    assert np.abs(half.adapted({str(lora): 0.5}).logits(IDS) - plain.adapted(lora).logits(IDS)).max() < CLOSE
    gone = plain.adapted(lora).adapted({str(lora): -1})
    assert np.abs(gone.logits(IDS) - plain.logits(IDS)).max() < CLOSE
    with pytest.raises(Error, match="no adapter was given"):
        plain.adapted([])


def test_whole_tensors_over_a_loaded_model(folders, published, backend: str, tmp_path: Path) -> None:
    """Of a norm, and of a matrix that MLX multiplies together with others."""
    names = [f"{adapters.LAYERS}.1.mlp.gate_proj.weight", f"{adapters.LAYERS}.1.post_feedforward_layernorm.weight"]
    new = {name: published[1][name].astype(np.float32) * -1.5 for name in names}
    folder = shutil.copytree(folders["lora"], tmp_path / "a")
    files.write_safetensors(folder / "adapter_model.safetensors", {f"base_model.model.{n}": a for n, a in new.items()})
    tensors = files.read_folder(folders["plain"]) | new
    merged = files.write_folder(tmp_path / "merged", files.read_config(folders["plain"]), tensors)
    files.copy_sidecars(folders["plain"], merged)
    expected = opened(merged, backend)
    for model in (
        opened(folders["plain"], backend, adapter=folder),
        opened(folders["plain"], backend).adapted(folder),
    ):
        assert np.abs(model.logits(IDS) - expected.logits(IDS)).max() < CLOSE
        ids = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
        assert model.generate(IDS, **ids).text == expected.generate(IDS, **ids).text


def test_towers_are_shared_unless_the_adapter_changes_them(folders, backend: str) -> None:
    plain = opened(folders["plain"], backend)
    sound = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    before = plain.encode_audio(sound, 16000)
    text, tower = plain.adapted(folders["lora"]), plain.adapted(folders["tower"])
    assert text.runner.model.towers is plain.runner.model.towers
    assert np.array_equal(text.encode_audio(sound, 16000), before)
    changed = tower.encode_audio(sound, 16000)
    assert np.abs(changed - before).max() > 1e-3
    assert np.array_equal(plain.encode_audio(sound, 16000), before)
    loaded = opened(folders["plain"], backend, adapter=folders["tower"])
    assert np.abs(loaded.encode_audio(sound, 16000) - changed).max() < 1e-4

"""Tensors left in their files: the same numbers as reading gives, no copy, and no map that outlives its views."""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_files as files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.matformer.plan import plan_slice
from g3n_mlx.matformer.view import open_sliced

reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def maps_of(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


@pytest.mark.parametrize("quantized", [False, True])
def test_a_whole_checkpoint_is_mapped(quantized: bool, tiny_folder: Path, quantized_folder: Path) -> None:
    checkpoint = Checkpoint.open(quantized_folder if quantized else tiny_folder)
    for name in checkpoint.names:
        view = checkpoint.mapped(name)
        assert view is not None, name
        assert not view.flags.owndata
        assert not view.flags.writeable
        assert files.same(view, checkpoint.read(name)), name


@settings(max_examples=15)
@given(
    widths=st.lists(st.integers(1, 4), min_size=8, max_size=8),
    skipped=st.sets(st.sampled_from([0, 1, 2, 5, 6, 7, 8, 9]), min_size=2, max_size=2),
)
def test_a_slice_is_mapped_where_it_is_a_rectangle(
    widths: list[int], skipped: set[int], quantized_folder: Path, tiny: Checkpoint
) -> None:
    plan = plan_slice(tiny.config.text, files.slice_of([64 * width for width in widths], sorted(skipped)))
    checkpoint = open_sliced(quantized_folder, plan)
    for name in checkpoint.names:
        view, source = checkpoint.mapped(name), checkpoint.sources[name]
        is_rectangle = all(ranges is None or len(ranges) == 1 for ranges in (source.rows, source.columns))
        assert (view is not None) == is_rectangle, name
        if view is not None:
            assert files.same(view, checkpoint.read(name)), name
        if "gate_proj" in name or "up_proj" in name:
            assert view is not None, name
            assert view.flags.c_contiguous, name
        if "down_proj" in name:
            assert view is not None, name
    checkpoint.close()


def test_turned_kernels_are_read(
    tmp_path: Path, tiny: Checkpoint, published: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    checkpoint = Checkpoint.open(files.write_folder(tmp_path / "x", *files.mlx_vlm(*published)))
    assert checkpoint.mapped("vision_tower.timm_model.conv_stem.conv.weight") is None


@pytest.fixture
def misaligned_folder(tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> Path:
    """A checkpoint whose tensors begin at odd places in the file."""
    folder = files.write_folder(tmp_path / "odd", *published)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    padding = 1 + length % 2
    header = raw[8 : 8 + length] + b" " * padding
    path.write_bytes((length + padding).to_bytes(8, "little") + header + raw[8 + length :])
    return folder


def test_misaligned_tensors_are_read(misaligned_folder: Path, tiny: Checkpoint) -> None:
    checkpoint = Checkpoint.open(misaligned_folder)
    assert {checkpoint.mapped(name) is None for name in checkpoint.names} == {True}
    assert all(files.same(checkpoint.read(name), tiny.read(name)) for name in checkpoint.names)


@reads_proc
def test_a_map_ends_with_its_last_view(tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    checkpoint = Checkpoint.open(files.write_folder(tmp_path / "x", *published))
    first, second, *_ = checkpoint.names
    assert maps_of(tmp_path / "x") == 0
    views = [checkpoint.mapped(first), checkpoint.mapped(second)]
    assert maps_of(tmp_path / "x") == 1
    expected = checkpoint.read(second)
    checkpoint.close()
    assert files.same(views[1][:], expected)  # pyright: ignore[reportOptionalSubscript]
    views.pop(0)
    assert maps_of(tmp_path / "x") == 1
    views.clear()
    assert maps_of(tmp_path / "x") == 0


def test_a_file_that_was_cut_off_is_named(
    tmp_path: Path, published: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    folder = files.write_folder(tmp_path / "x", *published)
    checkpoint = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    last = max(checkpoint.names, key=lambda name: checkpoint.sources[name].stored.offset)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.safetensors ends early"):
        checkpoint.mapped(last)


MAPPED_BY_TORCH = """
import sys
from pathlib import Path
import numpy as np, torch
from g3n_mlx.backends.torch.weights import Placement, Weights
from g3n_mlx.checkpoint.folder import Checkpoint
checkpoint = Checkpoint.open(Path(sys.argv[1]))
weights = Weights(checkpoint, Placement(torch.bfloat16, torch.device("cpu")))
layer = weights.at("language_model").at("layers").at(0)
for part in ("weight", "scales", "biases"):
    tensor = layer.at("mlp").at("gate_proj").mapped(part)
    view = checkpoint.mapped(f"language_model.layers.0.mlp.gate_proj.{part}")
    assert view.dtype.itemsize == tensor.element_size() and view.shape == tensor.shape
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if sys.argv[1] in line]
    first, last = (int(number, 16) for number in lines[0][0].split("-"))
    assert len(lines) == 1 and first <= tensor.data_ptr() < last, lines
    assert np.array_equal(tensor.view(torch.uint8).numpy(), view.view(np.uint8))
norm = layer.at("input_layernorm").tensor()
assert first <= norm.data_ptr() < last
wide = Weights(checkpoint, Placement(torch.float32, torch.device("cpu"))).at("language_model.norm").tensor()
assert wide.dtype == torch.float32 and not first <= wide.data_ptr() < last
"""


@reads_proc
def test_torch_takes_views_without_copies_and_warnings(quantized_folder: Path) -> None:
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MAPPED_BY_TORCH, str(quantized_folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@reads_proc
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_closed_model_leaves_no_map(backend: str, quantized_folder: Path) -> None:
    pytest.importorskip({"torch": "torch", "mlx": "mlx.core"}[backend])
    from g3n_mlx import load

    before = maps_of(quantized_folder)
    model = load(quantized_folder, backend=backend)
    model.generate("hi", max_tokens=2)
    assert maps_of(quantized_folder) > before
    model.close()
    del model
    gc.collect()
    assert maps_of(quantized_folder) == before


@pytest.mark.parametrize(("system", "released"), [("linux", 3), ("darwin", 0), ("win32", 0)])
def test_pages_are_released_on_linux_alone(
    system: str, released: int, quantized_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS it would look at every page of the PLE table, every five tokens, and free nothing."""
    table = Checkpoint.open(quantized_folder).rows("language_model.embed_tokens_per_layer")
    advised = []

    class Map:
        def madvise(self, option: int) -> None:
            advised.append(option)

    for mapped in table._maps:
        monkeypatch.setattr(mapped, "_map", Map())
    monkeypatch.setattr(sys, "platform", system)
    expected = table.gather(np.arange(5))
    assert len(advised) == released
    assert expected.shape == (5, table.width)

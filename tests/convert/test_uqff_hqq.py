"""HQQ in UQFF files: groups across the rows, as mistral.rs writes them, and along the rows."""

import checkpoint_files as files
import numpy as np
import pytest
from uqff_files import AUDIO, DOWN, TABLE, hqq, read, write_uqff

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.convert.uqff import convert_uqff
from g3n_mlx.failures import Error


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("path", [DOWN, TABLE, AUDIO])
def test_hqq_across_the_rows_is_rounded_to_8_bits(published, tmp_path, caplog, bits, path) -> None:
    source, meant = write_uqff(tmp_path / "u", published, {path: lambda weight: hqq(weight, bits)})
    made = Checkpoint.open(convert_uqff(source, tmp_path / "made", progress=False))
    found, exact = read(made, path).reshape(-1, 32), meant[path].reshape(-1, 32)
    if path == AUDIO:
        assert not made.quantizations
        np.testing.assert_allclose(found, exact, rtol=2**-8)
        return
    step = (exact.max(axis=1) - exact.min(axis=1)) / 255
    assert (np.abs(found - exact).max(axis=1) <= step).all()
    assert [(how.bits, how.group_size) for how in made.quantizations.values()] == [(8, 32)]
    assert f"tensors 1 of HQQ{bits} are rounded anew, to 8 bits" in caplog.text


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (4, 64), (8, 128)])
def test_hqq_along_the_rows_keeps_its_numbers(published, tmp_path, caplog, bits, group_size) -> None:
    source, meant = write_uqff(tmp_path / "u", published, {DOWN: lambda weight: hqq(weight, bits, group_size, 1)})
    made = Checkpoint.open(convert_uqff(source, tmp_path / "made", progress=False))
    np.testing.assert_allclose(read(made, DOWN), meant[DOWN], atol=1e-6 * np.abs(meant[DOWN]).max(), rtol=0)
    assert [(how.bits, how.group_size) for how in made.quantizations.values()] == [(bits, group_size)]
    assert "rounded" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": np.uint8(3)}, "is HQQ of 3 bits in groups of 64 along axis 0, which is not read"),
        ({"axis": np.uint8(1), "group_size": np.uint32(48)}, "in groups of 48 along axis 1, which is not read"),
        ({"channel_wise": np.uint8(0)}, "which is not read: quantize the original checkpoint to HQQ4 or HQQ8"),
        ({"bits": np.uint8(8)}, "has other sizes than HQQ of 8 bits"),
        ({"zeros": np.zeros((1, 3), np.float32)}, "has other sizes than HQQ of 4 bits"),
        ({"shape": np.array([3], np.uint32)}, "has 1 axes, expected the 2 of a matrix"),
    ],
)
def test_hqq_that_is_not_read(published, tmp_path, change, message) -> None:
    source, _ = write_uqff(tmp_path / "u", published, {DOWN: hqq})
    tensors = files.read_safetensors(source / "model-0.uqff")
    tensors |= {f"{DOWN}.weight.{part}": np.asarray(value) for part, value in change.items()}
    files.write_safetensors(source / "model-0.uqff", tensors)
    with pytest.raises(Error, match=message):
        convert_uqff(source, tmp_path / "made", progress=False)

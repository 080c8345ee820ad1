"""llama.cpp's own converter writes the files of towers that the quick tests read.

Needs the source package of llama-cpp-python on the path (docs/files.md), where the converter lies beside the package.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_models import Kind, write_towers

pytestmark = pytest.mark.slow

# 0.3.36's converter has no name for the two norms of audio's subsampling, on which it stops; it is the one before.
PATCHED = """
import runpy, sys
root = sys.argv.pop(1)
sys.path[:0] = [root, root + "/gguf-py"]
import gguf
names = gguf.TensorNameMap.block_mappings_cfg
names[gguf.MODEL_TENSOR.A_ENC_CONV1D_NORM] += ("model.audio_tower.subsample_conv_projection.conv_{bid}.norm",)
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def converter():
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    root = Path(package.__file__).parents[1] / "vendor" / "llama.cpp"
    if not (root / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama-cpp-python is installed without its sources")
    return root


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.F16, Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
def test_the_converter_writes_the_same_tensors(converter, tiny_folder, tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    flags = ["--mmproj", "--outtype", kind.name.lower(), "--outfile", str(theirs)]
    command = [sys.executable, "-c", PATCHED, str(converter), str(tiny_folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    write_towers(ours, tiny_folder, kind)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].tensor_type, list(found[name].shape)) == (tensor.tensor_type, list(tensor.shape)), name
        np.testing.assert_array_equal(found[name].data, tensor.data, err_msg=name)

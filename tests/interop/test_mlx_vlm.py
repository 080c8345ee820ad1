"""A checkpoint written by mlx_vlm.convert loads here with our numerics, and ours loads there.

mlx-vlm hard-codes the published vision network, so the source has the tiny text and audio shapes and the whole
300M tower, in seeded noise. Its own logits are no reference: it leaves the embeddings of a prompt unscaled.
"""

import importlib.util
import json

import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed"),
]

# Shapes come from the peer's own module; its kernels are O, kH, kW, I, the published ones O, I, kH, kW.
WRITE_TOWER = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm.models.gemma3n.config import VisionConfig
from mlx_vlm.models.gemma3n.vision import VisionModel

source, target = map(Path, sys.argv[1:])
weights = {k: v for k, v in mx.load(str(source)).items() if ".vision_tower." not in k}
mx.random.seed(0)
for name, parameter in tree_flatten(VisionModel(VisionConfig()).parameters()):
    shape = parameter.shape
    if len(shape) == 4:
        shape = (shape[0], shape[3], shape[1], shape[2])
    weights["model.vision_tower." + name] = (mx.random.normal(shape) * 0.02).astype(mx.bfloat16)
mx.save_safetensors(str(target), weights, metadata={"format": "pt"})
"""

CONVERT = """
import json, sys
from mlx_vlm.convert import convert
source, target, options = sys.argv[1:]
convert(source, target, **json.loads(options))
"""

LOAD = """
import sys
from pathlib import Path
from mlx.utils import tree_flatten
from mlx_vlm.utils import load_model
model = load_model(Path(sys.argv[1]))
table = model.language_model.model.embed_tokens_per_layer
print(table.bits, len(tree_flatten(model.parameters())))
"""


@pytest.fixture(scope="module")
def source(run_peer, tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx-vlm") / "source"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["vision_config"]["model_args"]  # those of the tiny tower
    config["vision_soft_tokens_per_image"] = 256  # of the published tower
    (folder / "config.json").write_text(json.dumps(config))
    run_peer(WRITE_TOWER, tiny_folder / "model.safetensors", folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=["dense", "4 bit", "mixed 4 and 8"])
def theirs(request, run_peer, source, tmp_path_factory):
    """A folder written by mlx_vlm.convert, and whether it is quantized."""
    options = {
        "dense": {},
        "4 bit": {"quantize": True, "q_bits": 4},
        "mixed 4 and 8": {"quantize": True, "quant_predicate": "mixed_4_8"},
    }
    target = tmp_path_factory.mktemp("mlx-vlm") / "converted"
    run_peer(CONVERT, source, target, json.dumps(options[request.param]))
    return target, request.param != "dense"


@pytest.mark.parametrize("ids", ["prompt_ids", "media_ids"])
def test_their_conversion_gives_our_numerics(
    ids, theirs, backend, tiny_folder, our_logits, write_dequantized, tmp_path, request
):
    """With ids of the media ranges too: mlx-vlm quantizes embed_audio."""
    folder, quantized = theirs
    prompt = request.getfixturevalue(ids)
    same_weights = write_dequantized(folder, tmp_path / "dense") if quantized else tiny_folder
    expected = our_logits(same_weights, prompt, backend)
    assert np.abs(our_logits(folder, prompt, backend) - expected).max() <= 1e-4


def test_our_conversion_loads_there(run_peer, source, tmp_path):
    from g3n_mlx.convert import convert

    folder = convert(source, tmp_path / "ours", q_bits=4, ple_bits=8, progress=False)
    bits, parameters = map(int, run_peer(LOAD, folder).split()[-2:])
    assert bits == 8
    assert parameters > 1000

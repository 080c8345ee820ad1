"""UQFF files that mistral.rs writes, and its logits and ours of the same files.

Needs mistralrs and gguf. mistral.rs loads no Gemma 3n without the published vision tower, so the checkpoint has that,
in noise, beside a small text model and a small audio tower; its widths are multiples of 256, as K types need them.

What each of the two rounds is told apart by a third model: the numbers that the file stands for, dense in float32. AFQ
and HQQ agree with mistral.rs to the last bits of float32. With llama.cpp's blocks it also rounds what meets the weights
to 8 bits, on a CPU (candle, quantized/k_quants.rs, VecDotType). Ours differ from the dense ones where groups of 16, or
across rows, are rounded anew to 8 bits.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import checkpoint_files as files
import image_files
import media_files
import ml_dtypes
import numpy as np
import pytest
from random_checkpoint import pattern
from random_vision import vision_tensors
from uqff_files import read

from g3n_mlx import load
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.manifest import dead_manifest, embedder_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.convert.uqff import convert_uqff

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mistralrs") is None, reason="mistralrs is not installed"),
]

LAYERS = 4
TEXT = {
    "hidden_size": 256,
    "head_dim": 64,
    "num_hidden_layers": LAYERS,
    "num_kv_shared_layers": 2,
    "intermediate_size": [512] * LAYERS,
    "activation_sparsity_pattern": [0.95] + [0.0] * (LAYERS - 1),
    "layer_types": pattern(LAYERS, 2),
}
PROMPT, STEPS = "What do you see in this picture of seven boats? Tell me more of it.", 12
# Of each type: the error of a weight at most, as a part of its matrix' spread; how far apart, for the likeliest 20
# tokens of each step, log-probabilities may be: those of ours and of the dense model, and of that and mistral.rs. The
# logits' spread is 1. Measured: see docs/files.md.
KINDS = {
    "AFQ4": (0.4, 1e-4, 1e-4),
    "AFQ8": (0.03, 1e-4, 1e-4),
    "Q4K": (0.5, 0.2, 0.5),
    "Q6K": (0.15, 0.3, 0.6),
    "Q8_0": (0.03, 1e-4, 0.4),
    "HQQ4": (0.4, 0.4, 1e-4),
    "HQQ8": (0.05, 0.3, 1e-4),
}

# The K/V cache is of float16 on a CPU without the variable.
QUANTIZE_AND_ASK = """
import json, os, sys
from pathlib import Path
os.environ["MISTRALRS_CPU_KV_F32"] = "1"
import mistralrs

source, folder, kind, prompt, steps = sys.argv[1:]
def model(path, quantize=None, **files):
    which = mistralrs.Which.MultimodalPlain(path, arch=mistralrs.MultimodalArchitecture.Gemma3n, **files)
    template = Path(folder, "bare.jinja")
    template.write_text("{{ messages[0]['content'] }}")
    return mistralrs.Runner(which, in_situ_quant=quantize, prefix_cache_n=0, jinja_explicit=str(template))

model(source, kind, write_uqff=f"{folder}/{kind.lower()}.uqff")
answer = model(folder, from_uqff=f"{kind.lower()}-0.uqff").send_chat_completion_request(
    mistralrs.ChatCompletionRequest(
        messages=[{"role": "user", "content": prompt}], model="default", max_tokens=int(steps), temperature=0.0,
        logprobs=True, top_logprobs=20, ignore_eos=True,
    )
)
found = [[(top.token, top.logprob) for top in step.top_logprobs] for step in answer.choices[0].logprobs.content]
Path(folder, f"{kind}.answer").write_text(json.dumps([answer.usage.prompt_tokens, found]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that is gone after the tests: it holds gigabytes."""
    folder = tmp_path_factory.mktemp("mistral-rs")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def source(place, tiny_folder):
    raw = files.read_config(tiny_folder)
    raw["text_config"] |= TEXT
    raw["vision_config"] |= {"model_args": None, "hidden_size": 2048}
    raw["vision_soft_tokens_per_image"] = 256
    raw["audio_config"]["hidden_size"] = 128
    config = ModelConfig.from_dict(raw)
    assert config.vision is not None
    assert config.audio is not None
    width = config.text.hidden_size
    shapes = text_manifest(config.text) | dead_manifest(config.text) | audio_manifest(config.audio)
    shapes |= embedder_manifest("embed_audio", config.audio, width)
    generator = np.random.default_rng(0)
    tensors = vision_tensors(config.vision, width, 0, ml_dtypes.bfloat16)
    for name, shape in shapes.items():
        noise = generator.standard_normal(shape, dtype=np.float32)
        values = 1 + 0.3 * noise if len(shape) < 2 else noise / np.sqrt(np.float32(np.prod(shape[1:])))
        tensors[f"model.{name}"] = values.astype(ml_dtypes.bfloat16)
    folder = files.write_folder(place / "source", raw, tensors)
    files.copy_sidecars(tiny_folder, folder)
    return folder


@pytest.fixture(scope="module")
def quantized(request, run_peer, source, place):
    """A type, mistral.rs' file of it, its answer, and our folder. All files share one residual.safetensors."""
    kind, peer, made = request.param, place / "peer", place / request.param
    peer.mkdir(exist_ok=True)
    run_peer(QUANTIZE_AND_ASK, source, peer, kind, PROMPT, STEPS)
    file = peer / f"{kind.lower()}-0.uqff"
    convert_uqff(file, made, progress=False)
    yield kind, file, json.loads((peer / f"{kind}.answer").read_text()), made
    shutil.rmtree(made)


def numbers(tensors: dict[str, np.ndarray], weight: str) -> np.ndarray:
    """What a weight of a .uqff file stands for, float32."""
    gguf = pytest.importorskip("gguf")
    stored = tensors[weight]
    part = {name.removeprefix(f"{weight}."): array for name, array in tensors.items() if name.startswith(f"{weight}.")}
    if part["format"] == 0:
        rows, _ = part["shape"]
        kind = gguf.GGMLQuantizationType(int(part["dtype"]))
        return gguf.quants.dequantize(stored.reshape(rows, -1), kind)
    bits, group_size = int(part["bits"]), int(part["group_size"])
    if part["format"] == 4:
        each = np.unpackbits(stored.view(np.uint8), axis=1, bitorder="little").reshape(
            len(stored), -1, group_size, bits
        )
        codes = each @ (1 << np.arange(bits))
        values = codes * part["scales"][..., None] + part["biases"][..., None]
        return values.reshape(len(stored), -1).astype(np.float32)
    assert part["format"] == 2
    parts = [stored >> shift & (2**bits - 1) for shift in range(8 - bits, -1, -bits)]
    values = (np.concatenate(parts).astype(np.float64) - part["zeros"]) * part["scales"]
    return values.reshape(part["shape"]).astype(np.float32)


def meanings(file: Path) -> dict[str, np.ndarray]:
    tensors = files.read_safetensors(file)
    weights = [name.removesuffix(".format") for name in tensors if name.endswith(".weight.format")]
    return {weight: numbers(tensors, weight) for weight in weights}


@pytest.mark.parametrize("quantized", KINDS, indirect=True)
def test_every_tensor_is_what_the_file_says(quantized, source):
    kind, file, _, folder = quantized
    tensors, exact = files.read_folder(source), meanings(file)
    made = Checkpoint.open(folder)
    assert len(exact) > 50
    for weight, values in exact.items():
        dense = tensors[weight].astype(np.float32)
        assert np.abs(values - dense).max() < KINDS[kind][0] * dense.std(), weight
        path = weight.removesuffix(".weight")
        found, how = read(made, path), made.quantization(path.removeprefix("model."))
        if how is None:
            np.testing.assert_allclose(found, values, rtol=2**-8, atol=1e-6, err_msg=weight)
            continue
        groups = values.reshape(-1, how.group_size)
        step = np.ptp(groups, axis=1) / 255 if kind in ("Q4K", "Q6K", "HQQ4", "HQQ8") and how.bits == 8 else 0
        error = np.abs(found.reshape(groups.shape) - groups).max(axis=1)
        assert (error <= step + 1e-6 * np.abs(values).max()).all(), weight
    for name in {*made.names, *made.dead_names}:
        if f"model.{name.rpartition('.')[0]}.weight" not in exact:
            np.testing.assert_array_equal(made.read(name), tensors[f"model.{name}"].astype(np.float32), err_msg=name)


@pytest.mark.parametrize("quantized", KINDS, indirect=True)
def test_logits_are_those_of_mistral_rs(quantized, source, place, backends):
    kind, file, (prompt_tokens, steps), folder = quantized
    text = {name: array for name, array in files.read_folder(source).items() if ".language_model." in name}
    text |= {name: array for name, array in meanings(file).items() if name in text}
    raw = files.read_config(source)
    del raw["vision_config"], raw["audio_config"]
    dense = files.write_folder(place / f"{kind}-dense", raw, text)
    files.copy_sidecars(source, dense)
    chosen = [max(step, key=lambda top: top[1])[0] for step in steps]
    assert len(chosen) == STEPS
    theirs = np.array([[probability for _, probability in step] for step in steps])

    def log_probabilities(path, backend):
        with load(path, backend=backend, dtype="float32", device="cpu") as model:
            ids = [2, *model.tokenizer.encode(PROMPT)]
            assert len(ids) == prompt_tokens
            logits = np.asarray(model.logits([*ids, *chosen[:-1]]), np.float64)[len(ids) - 1 :]
        found = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return np.stack([row[[token for token, _ in step]] for row, step in zip(found, steps, strict=True)])

    exact = log_probabilities(dense, backends[0])
    beside = np.abs(exact - theirs)
    print(f"{kind}: dense and mistral.rs differ by {beside.max():.6f} at most, median {np.median(beside):.6f}")
    for backend in backends:
        ours = np.abs(log_probabilities(folder, backend) - exact)
        print(f"{kind}, {backend}: ours and dense differ by {ours.max():.6f} at most, median {np.median(ours):.6f}")
        assert ours.max() < KINDS[kind][1]
    assert beside.max() < KINDS[kind][2]
    if KINDS[kind][2] < 1e-3:
        assert (exact.argmax(axis=1) == theirs.argmax(axis=1)).all()
    shutil.rmtree(dense)


@pytest.mark.parametrize("quantized", ["AFQ8"], indirect=True)
def test_pictures_and_sounds_are_read_through_a_file(quantized, source, place):
    """The towers that mistral.rs hands on give the soft tokens of the source; what it quantized, at its new numbers."""
    _, file, _, folder = quantized
    tensors = files.read_folder(source) | {
        weight: values for weight, values in meanings(file).items() if ".language_model." not in weight
    }
    expected = files.write_folder(place / "expected", files.read_config(source), tensors)
    files.copy_sidecars(source, expected)
    options = {"backend": "torch", "dtype": "float32", "device": "cpu"}
    with load(folder, **options) as ours, load(expected, **options) as theirs:
        for encode in ("encode_image", "encode_audio"):
            media = (image_files.drawn(),) if encode == "encode_image" else (media_files.tones(16000), 16000)
            found, wanted = getattr(ours, encode)(*media), getattr(theirs, encode)(*media)
            print(f"{encode}: soft tokens differ by {np.abs(found - wanted).max():.2e}")
            np.testing.assert_allclose(found, wanted, atol=1e-4)
    shutil.rmtree(expected)

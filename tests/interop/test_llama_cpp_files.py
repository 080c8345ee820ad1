"""Logits of llama.cpp and ours on the same GGUF file, quantized by llama.cpp itself.

Needs llama-cpp-python (its source package builds llama.cpp); LLAMA_CPP_LIB_PATH names a folder with libraries of one's
own. llama.cpp has a few numbers of the published models in its code, so the models here have them: widths of 256 for a
layer's PLE input and 64 for LAuReL, 20 layers with keys and values of their own, 10 with activation sparsity.

Two of its roundings are ours here: GELU from a table of float16 (ggml-cpu/vec.h, GGML_GELU_FP16), and a standard
deviation by n - 1 in the sparsity's cutoff (src/models/gemma3n.cpp, gaussian_topk; transformers has n). Without them,
and with its attention in float16, 22 layers of noise differ by 0.4 of the logits' spread; with them by 0.02.
"""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf_models import write_model
from random_checkpoint import pattern, write_random

from g3n_mlx.loading import load

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow

SHAPE = {
    "hidden_size": 256,
    "hidden_size_per_layer_input": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "laurel_rank": 64,
    "sliding_window": 8,
    "vocab_size": 1152,
    "vocab_size_per_layer_input": 1152,
}
OWN_KV_LAYERS, SPARSE_LAYERS = 20, 10
IDS = [2, 300, 41, 512, 77, 900, 301, 333, 420, 15, 230, 640, 111, 600, 258, 399]
# llama.cpp's number of a file's type (llama.h, enum llama_ftype) and its layers, and how far apart logits may be, as a
# part of their spread: half of them, and all. Layers multiply every difference; of all types but the first llama.cpp
# also rounds what meets the weights to 8 bits, so that those models have few. A tensor that is read wrongly costs more
# than 0.5.
KINDS = {
    "F32": (0, 22, 0.005, 0.1),
    "Q8_0": (7, 3, 0.03, 0.25),
    "Q4_0": (2, 3, 0.03, 0.25),
    "Q4_1": (3, 3, 0.03, 0.25),
    "Q5_0": (8, 3, 0.03, 0.25),
    "Q5_1": (9, 3, 0.03, 0.25),
    "Q4_K_M": (15, 3, 0.03, 0.25),
    "Q5_K_M": (17, 3, 0.03, 0.25),
    "Q6_K": (18, 3, 0.03, 0.25),
}


@pytest.fixture(scope="module")
def library():
    found = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    found.llama_backend_init()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder):
    """whole(layers): a model as a file of float32, with the tiny checkpoint's tokenizer."""
    made: dict[int, Path] = {}

    def make(layers):
        if layers not in made:
            folder = tmp_path_factory.mktemp("llama")
            shape = SHAPE | {
                "num_hidden_layers": layers,
                "num_kv_shared_layers": max(0, layers - OWN_KV_LAYERS),
                "intermediate_size": [512] * layers,
                "activation_sparsity_pattern": [0.95 if layer < SPARSE_LAYERS else 0.0 for layer in range(layers)],
                "layer_types": pattern(layers, 5),
            }
            source = write_random(folder / "source", seed=3, **shape)
            for name in ("tokenizer.json", "chat_template.jinja"):
                shutil.copyfile(tiny_folder / name, source / name)
            write_model(folder / "whole.gguf", source)
            made[layers] = folder / "whole.gguf"
        return made[layers]

    return make


@pytest.fixture
def rounded_as_theirs(monkeypatch):
    """llama.cpp's GELU and cutoff, in our torch backend; not in the kernels in C, which a test can't change."""
    from g3n_mlx.backends.torch import text
    from g3n_mlx.kernels import library

    monkeypatch.setattr(library, "library", lambda: None)

    class Functional:
        def __getattr__(self, name):
            return getattr(torch.nn.functional, name)

        def gelu(self, x, approximate):
            table = torch.nn.functional.gelu(x.half().float(), approximate=approximate).half().float()
            return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, table))

    def gaussian_topk(gate, cutoff):
        std, mean = torch.std_mean(gate, dim=-1, keepdim=True, correction=1)
        return torch.relu(gate - (mean + std * cutoff))

    monkeypatch.setattr(text, "F", Functional())
    monkeypatch.setattr(text, "gaussian_topk", gaussian_topk)


def their_logits(llama_cpp, path) -> np.ndarray:
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, "llama.cpp can't load the file"
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch, wanted.n_threads = 64, 64, 2
    wanted.type_k = wanted.type_v = 0  # float32
    wanted.flash_attn_type = 0  # off: it rounds to float16
    context = llama_cpp.llama_init_from_model(model, wanted)
    batch = llama_cpp.llama_batch_init(len(IDS), 0, 1)
    batch.n_tokens = len(IDS)
    for place, token_id in enumerate(IDS):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token_id, place, 1, 1
        batch.seq_id[place][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    size = len(IDS) * SHAPE["vocab_size"]
    pointer = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    logits = np.ctypeslib.as_array(pointer, (size,)).reshape(len(IDS), -1).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_llama_cpp(library, whole, rounded_as_theirs, tmp_path, monkeypatch, kind):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr("g3n_mlx.convert.gguf.cache_folder", lambda: tmp_path)
    number, layers, usual, most = KINDS[kind]
    path = source = whole(layers)
    if kind != "F32":
        path = tmp_path / f"{kind}.gguf"
        how = library.llama_model_quantize_default_params()
        how.ftype, how.nthread = number, 2
        assert library.llama_model_quantize(str(source).encode(), str(path).encode(), how) == 0
        types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        assert kind.removesuffix("_M") in types
    theirs = their_logits(library, path)
    with load(path, backend="torch", dtype="float32") as model:
        ours = np.asarray(model.logits(IDS))
    error = np.abs(ours - theirs) / theirs.std()
    print(
        f"{kind}: differ by {error.max():.4f} of the spread at most, half of them by less than {np.median(error):.5f}"
    )
    assert np.median(error) < usual
    assert error.max() < most

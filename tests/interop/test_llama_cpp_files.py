"""Logits of llama.cpp and ours on the same GGUF file, quantized by llama.cpp itself.

Needs llama-cpp-python (its source package builds llama.cpp): LLAMA_CPP_LIB_PATH names a folder with libraries of one's
own. llama.cpp has a few numbers of the published models in its code, so the model here has them: widths of 256 for a
layer's PLE input and 64 for LAuReL, 20 layers with keys and values of their own, 10 with activation sparsity.
"""

import ctypes
import shutil

import gguf
import numpy as np
import pytest
from gguf_models import write_model
from random_checkpoint import pattern, write_random

from g3n_mlx.loading import load

pytestmark = pytest.mark.slow

LAYERS = 22
SHAPE = {
    "hidden_size": 256,
    "hidden_size_per_layer_input": 256,
    "num_hidden_layers": LAYERS,
    "num_kv_shared_layers": LAYERS - 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": [512] * LAYERS,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (LAYERS - 10),
    "layer_types": pattern(LAYERS, 5),
    "laurel_rank": 64,
    "sliding_window": 8,
    "vocab_size": 1152,
    "vocab_size_per_layer_input": 1152,
}
IDS = [2, 300, 41, 512, 77, 900, 301, 333, 420, 15, 230, 640, 111, 600, 258, 399]
# llama.cpp's number of a file's type (llama.h, enum llama_ftype), and how far apart the logits may be, as a part of
# their spread. Of F32 that is rounding and its deviation of the sparsity's cutoff, by n - 1; of others also that it
# rounds the activations of every product to 8 bits.
KINDS = {
    "F32": (0, 0.02),
    "Q8_0": (7, 0.1),
    "Q4_0": (2, 0.1),
    "Q4_1": (3, 0.1),
    "Q5_0": (8, 0.1),
    "Q5_1": (9, 0.1),
    "Q4_K_M": (15, 0.1),
    "Q5_K_M": (17, 0.1),
    "Q6_K": (18, 0.1),
}


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder):
    """The model as a file of float32, with the tiny checkpoint's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    source = write_random(folder / "source", seed=3, **SHAPE)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(tiny_folder / name, source / name)
    write_model(folder / "whole.gguf", source)
    return folder / "whole.gguf"


def their_logits(llama_cpp, path) -> np.ndarray:
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, "llama.cpp can't load the file"
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch, wanted.n_threads = 64, 64, 2
    wanted.type_k = wanted.type_v = 0  # float32
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
def test_logits_are_those_of_llama_cpp(library, whole, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("g3n_mlx.convert.gguf.cache_folder", lambda: tmp_path)
    library.llama_backend_init()
    number, allowed = KINDS[kind]
    path = whole if kind == "F32" else tmp_path / f"{kind}.gguf"
    if kind != "F32":
        how = library.llama_model_quantize_default_params()
        how.ftype, how.nthread = number, 2
        assert library.llama_model_quantize(str(whole).encode(), str(path).encode(), how) == 0
        types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        assert kind.removesuffix("_M") in types
    theirs = their_logits(library, path)
    with load(path, backend="torch", dtype="float32") as model:
        ours = np.asarray(model.logits(IDS))
    error = np.abs(ours - theirs).max() / theirs.std()
    print(f"{kind}: largest difference {error:.4f} of the spread")
    assert error < allowed

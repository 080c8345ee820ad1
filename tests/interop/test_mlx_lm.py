"""Checkpoints written by mlx_lm.convert load here with our numerics; what we write loads there with the same logits."""

import importlib.util
import json

import numpy as np
import pytest

from g3n_mlx.config.text import FULL, SLIDING

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed"),
]

CONVERT = """
import json, sys
from mlx_lm import convert
source, target, options = sys.argv[1:]
convert(source, target, **json.loads(options))
"""

LOGITS = """
import json, sys
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
folder, ids, target = sys.argv[1:]
model, _ = load_model(Path(folder), strict=True)
# Without a cache its KV-sharing layers compute keys and values of their own.
logits = model(mx.array([json.loads(ids)]), cache=make_prompt_cache(model))
np.save(target, np.array(logits.astype(mx.float32))[0])
"""

# What each conversion is asked for; mixed_3_6 gives modules of one checkpoint different bits.
CONVERSIONS = {
    "dense": {},
    "4 bit": {"quantize": True, "q_bits": 4, "q_group_size": 64},
    "8 bit, groups of 32": {"quantize": True, "q_bits": 8, "q_group_size": 32},
    "3 bit": {"quantize": True, "q_bits": 3, "q_group_size": 64},
    "mixed 3 and 6": {"quantize": True, "quant_predicate": "mixed_3_6"},
}


@pytest.fixture(scope="module", params=CONVERSIONS)
def theirs(request, run_peer, tiny_folder, tmp_path_factory):
    """A folder written by mlx_lm.convert, and whether it is quantized."""
    target = tmp_path_factory.mktemp("mlx-lm") / "converted"
    run_peer(CONVERT, tiny_folder, target, json.dumps(CONVERSIONS[request.param]))
    return target, request.param != "dense"


def test_their_conversion_gives_our_numerics(
    theirs, backend, tiny_folder, prompt_ids, our_logits, write_dequantized, tmp_path
):
    folder, quantized = theirs
    same_weights = write_dequantized(folder, tmp_path / "dense") if quantized else tiny_folder
    expected = our_logits(same_weights, prompt_ids, backend)
    # Only the sums' order differs: the products run on packed weights here and on dense ones there.
    assert np.abs(our_logits(folder, prompt_ids, backend) - expected).max() <= 1e-4


def spellings(raw: dict, weights: dict) -> dict[str, tuple[dict, dict]]:
    """The reference checkpoint as Google writes it, re-saved by transformers 5, and text-only."""
    text = dict(raw["text_config"])
    first_shared = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    dead = {
        f"model.language_model.layers.{layer}.self_attn.{part}.weight"
        for layer in range(first_shared, text["num_hidden_layers"])
        for part in ("k_proj", "v_proj", "k_norm")
    }
    alive = {name: array for name, array in weights.items() if name not in dead}
    resaved = dict(text)
    resaved["rope_parameters"] = {
        FULL: {"rope_type": "default", "rope_theta": resaved.pop("rope_theta")},
        SLIDING: {"rope_type": "default", "rope_theta": resaved.pop("rope_local_base_freq")},
    }
    flat = {**resaved, "architectures": ["Gemma3nForCausalLM"], "eos_token_id": raw["eos_token_id"]}
    prefix = "model.language_model."
    bare = {"model." + name.removeprefix(prefix): array for name, array in alive.items() if name.startswith(prefix)}
    return {
        "google": (raw, weights),
        "transformers 5": ({**raw, "text_config": resaved}, alive),
        "text only": (flat, bare),
    }


@pytest.mark.parametrize("spelling", ["google", "transformers 5", "text only"])
@pytest.mark.parametrize(
    "options",
    [{}, {"q_bits": 4}, {"q_bits": 3, "q_group_size": 32, "ple_bits": 6}, {"q_bits": 3, "method": "mse"}],
    ids=str,
)
def test_our_conversion_loads_there(
    spelling, options, backend, run_peer, tiny_folder, prompt_ids, our_logits, tmp_path
):
    import mlx.core as mx

    from g3n_mlx.convert import convert

    raw = json.loads((tiny_folder / "config.json").read_text("utf-8"))
    config, weights = spellings(raw, mx.load(str(tiny_folder / "model.safetensors")))[spelling]
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_folder.glob("*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    (source / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(source / "model.safetensors"), weights, metadata={"format": "pt"})

    folder = convert(source, tmp_path / "ours", dtype="float32", progress=False, **options)
    run_peer(LOGITS, folder, json.dumps(prompt_ids), tmp_path / "theirs.npy")
    theirs = np.load(tmp_path / "theirs.npy")
    assert np.abs(theirs - our_logits(folder, prompt_ids, backend)).max() <= 1e-3


def test_mixed_bits_of_ours_load_there(backend, run_peer, tiny_folder, prompt_ids, our_logits, tmp_path):
    """Bits and groups that differ by layer, part and root, LAuReL's too, and parts that stay dense.

    What --budget writes is what its recipe makes: tests/slices/test_budget.py.
    """
    from g3n_mlx.convert import convert

    recipe = tmp_path / "recipe.json"
    rules = {
        "*.layers.1.*": False,
        "*.layers.2.mlp.*": {"bits": 2, "group_size": 32},
        "*.self_attn.v_proj": {"bits": 8, "group_size": 64},
        "*.laurel.linear_left": {"bits": 6, "group_size": 32},
        "*.embed_tokens_per_layer": {"bits": 5, "group_size": 32},
        "*": {"bits": 4, "group_size": 64},
    }
    recipe.write_text(json.dumps({"modules": rules}))
    folder = convert(tiny_folder, tmp_path / "ours", recipe=recipe, dtype="float32", progress=False)
    run_peer(LOGITS, folder, json.dumps(prompt_ids), tmp_path / "theirs.npy")
    ours = our_logits(folder, prompt_ids, backend)
    assert np.abs(np.load(tmp_path / "theirs.npy") - ours).max() <= 1e-3
    assert np.abs(ours - our_logits(tiny_folder, prompt_ids, backend)).max() > 0.1  # they are other weights


def test_a_slice_of_ours_loads_there(backend, run_peer, tiny_folder, prompt_ids, our_logits, tmp_path):
    """One width a layer, and a layer fewer: what a MatFormer slice is to a peer."""
    from g3n_mlx.convert import convert

    table = tmp_path / "slices.csv"
    widths = [256, 128, 64, 192, 256, 128, 128, 64, 256]
    table.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        f'mixed,9,,,"{widths}","[7]"\n'
    )
    folder = convert(
        tiny_folder,
        tmp_path / "ours",
        matformer="mixed",
        matformer_config=table,
        dtype="float32",
        q_bits=4,
        progress=False,
    )
    run_peer(LOGITS, folder, json.dumps(prompt_ids), tmp_path / "theirs.npy")
    assert np.abs(np.load(tmp_path / "theirs.npy") - our_logits(folder, prompt_ids, backend)).max() <= 1e-3


ADAPT = """
import json, sys
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model
folder, target, kind, ids = sys.argv[1:]
target = Path(target)
# By itself it adapts AltUp's coefficients as well, which its own Gemma 3n then can't run.
keys = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
parameters = {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": keys}
model, _ = load_model(Path(folder), strict=True)
model.freeze()
linear_to_lora_layers(model, 6, parameters, use_dora=kind == "dora")
mx.random.seed(1)
trained = {}
for name, array in tree_flatten(model.trainable_parameters()):
    is_magnitude = name.endswith(".m")
    noise = mx.random.normal(array.shape, dtype=mx.float32)
    trained[name] = array * (1 + 0.1 * noise) if is_magnitude else 0.15 * noise
target.mkdir()
mx.save_safetensors(str(target / "adapters.safetensors"), trained)
settings = {"fine_tune_type": kind, "num_layers": 6, "lora_parameters": parameters}
(target / "adapter_config.json").write_text(json.dumps(settings))
model, _ = load_model(Path(folder), strict=True)
load_adapters(model, str(target))
logits = model(mx.array([json.loads(ids)]), cache=make_prompt_cache(model))
np.save(target / "logits.npy", np.array(logits.astype(mx.float32))[0])
"""


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("options", [{}, {"q_bits": 4, "q_group_size": 32}], ids=str)
def test_adapters_of_their_trainer(kind, options, run_peer, backends, tiny_folder, prompt_ids, tmp_path):
    """Over dense and over quantized weights; with keys of KV-sharing layers, which neither reads."""
    from g3n_mlx import load
    from g3n_mlx.convert import convert

    folder = convert(tiny_folder, tmp_path / "float32", dtype="float32", progress=False, **options)
    run_peer(ADAPT, folder, tmp_path / "adapter", kind, json.dumps(prompt_ids))
    expected = np.load(tmp_path / "adapter" / "logits.npy")
    for backend in backends:
        given = {"backend": backend, "dtype": "float32", "device": "cpu"}
        plain = load(folder, **given)
        assert np.abs(plain.logits(prompt_ids) - expected).max() > 1
        for model in (load(folder, adapter=tmp_path / "adapter", **given), plain.adapted(tmp_path / "adapter")):
            # As far as the models agree without an adapter: their floors of AltUp's magnitudes differ.
            assert np.abs(model.logits(prompt_ids) - expected).max() <= 1e-3

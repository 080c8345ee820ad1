"""Adapters that PEFT wrote give the logits and soft tokens of transformers with PEFT."""

import importlib.util
import json

import numpy as np
import pytest

from g3n_mlx import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("peft", "transformers", "timm"))), reason="PEFT is not installed"
    ),
]

# Random weights that are far from zero, saved as a training would; then what the adapted model makes of a prompt, a
# picture and a sound, in float32.
WRITE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
source, target, settings, ids = sys.argv[1:]
del sys.modules["torchvision"]
sys.path.insert(0, str(Path(source).parent))
from golden.reference_builder.torchvision_stubs import declare_missing_operators
declare_missing_operators()
from peft import LoraConfig, get_peft_model
from transformers import Gemma3nForConditionalGeneration
model = Gemma3nForConditionalGeneration.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **json.loads(settings))).eval()
random = torch.Generator().manual_seed(1)
with torch.no_grad():
    for name, tensor in adapted.named_parameters():
        noise = torch.randn(tensor.shape, generator=random)
        if "lora_A" in name or "lora_B" in name:
            tensor.copy_(0.15 * noise)
        elif "lora_magnitude" in name:
            tensor *= 1 + 0.1 * noise
        elif "modules_to_save" in name:
            tensor += 0.05 * noise
    adapted.save_pretrained(target)
    inner = adapted.base_model.model.model
    mel = torch.from_numpy(np.random.default_rng(2).normal(0, 1, (1, 100, 128)).astype(np.float32))
    sound = inner.get_audio_features(mel, torch.zeros(1, 100, dtype=torch.bool)).pooler_output
    logits = adapted(input_ids=torch.tensor([json.loads(ids)]), use_cache=False).logits
    np.savez(Path(target) / "expected.npz", logits=logits[0].numpy(), mel=mel[0].numpy(), sound=sound[0].numpy())
"""

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "LoRA": {"target_modules": ALL},
    "rsLoRA of every linear layer": {"target_modules": "all-linear", "use_rslora": True},
    "ranks and alphas": {"target_modules": ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.2.mlp": 3}},
    "DoRA": {"target_modules": ["q_proj", "down_proj", "per_layer_model_projection", "post"], "use_dora": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["o_proj", "input_layernorm"]},
}


@pytest.fixture(scope="module", params=KINDS)
def theirs(request, run_peer, tiny_folder, prompt_ids, tmp_path_factory):
    """An adapter that PEFT wrote, and what transformers computes with it."""
    target = tmp_path_factory.mktemp("peft") / "adapter"
    run_peer(WRITE, tiny_folder, target, json.dumps(KINDS[request.param]), json.dumps(prompt_ids))
    return target, dict(np.load(target / "expected.npz"))


def test_logits_and_soft_tokens(theirs, backend, tiny_folder, prompt_ids):
    folder, expected = theirs
    options = {"backend": backend, "dtype": "float32", "device": "cpu"}
    plain = load(tiny_folder, **options)
    for model in (load(tiny_folder, adapter=folder, **options), plain.adapted(folder)):
        assert np.abs(model.logits(prompt_ids) - expected["logits"]).max() <= 1e-4
        network = model.runner.model
        heard = model.runner.call(
            lambda network=network: network.numpy(
                network.embed_audio(expected["mel"][None], np.ones((1, 100), bool))[0]
            )
        )
        assert np.abs(heard[: len(expected["sound"])] - expected["sound"]).max() <= 1e-4
    assert np.abs(plain.logits(prompt_ids) - expected["logits"]).max() > 1

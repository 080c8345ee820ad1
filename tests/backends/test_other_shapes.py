"""Checkpoints of quite other shapes than the tiny one: both backends against transformers, and against each other."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import decode, logits_of, make_cache, prefill
from checkpoint_files import read_config
from devices import tolerance
from random_checkpoint import BASE, pattern, write_random

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.config.text import FULL, SLIDING
from g3n_mlx.sampling import SamplingParams

TOLERANCE = tolerance(1e-4)
LENGTH = 23  # past every window below but the widest

SHAPES: dict[str, dict[str, Any]] = {
    "pattern_of_three": {},
    "nothing_shared": {"num_kv_shared_layers": 0},
    "nothing_shared_ending_in_full": {"num_kv_shared_layers": 0, "layer_types": [SLIDING] * 6 + [FULL]},
    "one_kv_head_for_six": {"num_attention_heads": 6, "num_key_value_heads": 1},
    "as_many_kv_heads_as_heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 40},
    "window_of_one": {"sliding_window": 1},
    "window_of_two": {"sliding_window": 2, "num_kv_shared_layers": 4},
    "window_wider_than_the_prompt": {"sliding_window": 64},
    "all_full": {"layer_types": pattern(7, 1)},
    "all_sliding": {"layer_types": pattern(7, 0)},
    "full_first": {"layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING]},
    "owner_of_a_kind_long_before": {
        "layer_types": [SLIDING, FULL, FULL, FULL, SLIDING, FULL, SLIDING],
        "num_kv_shared_layers": 3,
    },
    "one_layer": {
        "num_hidden_layers": 1,
        "num_kv_shared_layers": 0,
        "layer_types": [FULL],
        "intermediate_size": [64],
        "activation_sparsity_pattern": [0.3],
    },
    "stream_1_of_3_active": {"altup_num_inputs": 3, "altup_active_idx": 1},
    "stream_2_of_4_active": {"altup_active_idx": 2},
    "two_streams": {"altup_num_inputs": 2},
    "no_scaled_output": {"altup_correct_scale": False},
    "no_cap": {"final_logit_softcapping": None},
    "other_caps_and_eps": {
        "final_logit_softcapping": 4.0,
        "rms_norm_eps": 1e-3,
        "rope_theta": 5_000.0,
        "rope_local_base_freq": 100.0,
        "laurel_rank": 3,
    },
    "odd_widths": {
        "hidden_size": 84,
        "hidden_size_per_layer_input": 7,
        "head_dim": 10,
        "intermediate_size": [50, 33, 90, 1, 17, 64, 96],
        "activation_sparsity_pattern": [0.1, 0.5, 0.999, 0.0, 0.0, 0.95, 0.7],
    },
    "more_ple_rows_than_tokens": {"vocab_size_per_layer_input": 140},
}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp(shape), seed=len(shape), **SHAPES[shape])


@pytest.fixture(scope="module")
def ids(shape: str) -> np.ndarray:
    return np.random.default_rng(7).integers(0, BASE["vocab_size"], LENGTH)


@pytest.fixture(scope="module")
def networks(folder: Path, frameworks: dict[str, Any]) -> dict[str, Any]:
    """Backend -> Gemma3nModel in float32."""
    return {name: framework.model(Checkpoint.open(folder)) for name, framework in frameworks.items()}


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The reference implementation."""
    pytest.importorskip("torch")
    # A torchvision that was built for another torch would stop the import; hidden, transformers would remember for
    # the rest of the process that there is no timm either.
    if importlib.util.find_spec("torchvision"):
        importlib.import_module("golden.reference_builder.torchvision_stubs").declare_missing_operators()
    module = pytest.importorskip("transformers")
    assert module.Gemma3nForCausalLM  # imported here, not at its first use
    return module


@pytest.fixture(scope="module")
def reference(folder: Path, transformers: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Logits [T, V] of transformers for ids [T]."""
    import torch

    raw = read_config(folder)
    cap = raw.pop("final_logit_softcapping")
    model = transformers.Gemma3nForCausalLM.from_pretrained(
        folder, config=transformers.Gemma3nTextConfig(**raw), dtype=torch.float32, attn_implementation="eager"
    )
    # Its model knows None for "no cap", its config's check does not.
    vars(model.config)["final_logit_softcapping"] = cap

    def logits(token_ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(token_ids)[None], use_cache=False).logits[0].numpy()

    return logits


def test_logits_are_the_references(networks, reference, ids):
    expected = reference(ids)
    assert np.abs(expected).max() > 1  # or equality would say little
    for name, network in networks.items():
        ours = logits_of(network, ids, make_cache(network))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE, err_msg=name)


def test_backends_agree_with_each_other(networks, ids):
    if len(networks) < 2:
        pytest.skip("one backend is installed")
    ours = [logits_of(network, ids, make_cache(network)) for network in networks.values()]
    np.testing.assert_allclose(ours[0], ours[1], rtol=0, atol=TOLERANCE)


def test_prefill_in_pieces_and_decode_follow_the_whole(networks, ids):
    """Prefill (of which the last piece is cut to one row) and greedy decode against logits of the whole sequence."""
    for name, network in networks.items():
        cache, sampler = make_cache(network), network.make_sampler(SamplingParams(temperature=0), ids)
        for a, b in ((0, 6), (6, 7), (7, 11)):
            assert prefill(network, ids[a:b], cache, None) is None
        step = prefill(network, ids[11:], cache, sampler)
        rows, tokens = [np.asarray(step.logits)], [int(step)]
        for _ in range(9):
            step = decode(network, step, cache, sampler)
            rows.append(np.asarray(step.logits))
            tokens.append(int(step))
        whole = logits_of(network, np.concatenate([ids, tokens[:-1]]), make_cache(network))[LENGTH - 1 :]
        np.testing.assert_allclose(np.stack(rows), whole, rtol=0, atol=TOLERANCE, err_msg=name)
        assert tokens == whole.argmax(-1).tolist(), name


def test_no_key_of_a_sharing_layer_is_read(folder, networks):
    text = Checkpoint.open(folder).config.text
    for network in networks.values():
        assert list(make_cache(network).layers) == list(range(text.first_kv_shared_layer))
        assert not hasattr(network.language_model.layers[-1].self_attn, "k_proj") or not text.num_kv_shared_layers

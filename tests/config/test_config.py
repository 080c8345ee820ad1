"""config.json: the three spellings, derived facts, and what is refused."""

import copy
import json

import pytest

from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig, read_config
from g3n_mlx.config.text import FULL, SLIDING, TextConfig


@pytest.fixture
def raw(tiny_folder):
    return read_json(tiny_folder / "config.json")


def test_reads_the_published_spelling(raw):
    config = ModelConfig.from_dict(raw)
    text = raw["text_config"]
    assert config.text.hidden_size == text["hidden_size"]
    assert config.text.intermediate_size == tuple(text["intermediate_size"])
    assert config.text.layer_types == tuple(text["layer_types"])
    assert config.vision is not None
    assert config.vision.vocab_offset == raw["vision_config"]["vocab_offset"]
    assert config.audio is not None
    assert config.eos_token_ids == (1, 106)


def test_flat_text_only_spelling_is_the_same_text_model(raw):
    flat = {**raw["text_config"], "model_type": "gemma3n_text", "eos_token_id": 1}
    config = ModelConfig.from_dict(flat)
    assert config.text == ModelConfig.from_dict(raw).text
    assert config.vision is config.audio is None
    assert config.eos_token_ids == (1,)


def test_transformers_5_rope_parameters(raw):
    text = copy.deepcopy(raw["text_config"])
    full, sliding = text.pop("rope_theta"), text.pop("rope_local_base_freq")
    text["rope_parameters"] = {
        FULL: {"rope_type": "default", "rope_theta": full},
        SLIDING: {"rope_type": "default", "rope_theta": sliding},
    }
    for spelled in ({**raw, "text_config": text}, {**text, "model_type": "gemma3n_text"}):
        assert ModelConfig.from_dict(spelled).text == ModelConfig.from_dict(raw).text
        assert "rope_parameters" in text  # the argument is left as it is
    text["rope_parameters"][FULL]["rope_type"] = "yarn"
    with pytest.raises(ValueError, match="rope_type 'default'"):
        ModelConfig.from_dict({**raw, "text_config": text})
    for entry in (None, {}, 7):
        text["rope_parameters"] = {FULL: {"rope_theta": full}, SLIDING: entry}
        with pytest.raises(ValueError, match=r"rope_parameters\['sliding_attention'\] is"):
            ModelConfig.from_dict({**raw, "text_config": text})


def test_a_file_is_read_by_its_folder_or_its_own_path(raw, tiny_folder):
    config = ModelConfig.from_dict(raw)
    assert ModelConfig.from_file(tiny_folder) == ModelConfig.from_file(tiny_folder / "config.json") == config


def test_every_spelling_is_read_as_the_published_one(raw, tmp_path):
    text = {key: value for key, value in raw["text_config"].items() if not key.startswith("rope_")}
    text["rope_parameters"] = {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps({**text, "model_type": "gemma3n_text", "eos_token_id": 1}))
    found = read_config(tmp_path)
    rope = {key: raw["text_config"][key] for key in ("rope_theta", "rope_local_base_freq")}
    kept = {
        key: value for key, value in text.items() if key not in ("rope_parameters", "torch_dtype", "initializer_range")
    }
    assert found["text_config"] == kept | rope
    assert (found["model_type"], found["eos_token_id"], found["torch_dtype"]) == ("gemma3n", 1, "bfloat16")


def test_a_config_may_leave_the_ends_of_an_answer_to_others(raw):
    del raw["eos_token_id"]
    assert ModelConfig.from_dict(raw).eos_token_ids == ()
    raw["text_config"]["eos_token_id"] = 1
    assert ModelConfig.from_dict(raw).eos_token_ids == (1,)


def test_scalar_widths_become_one_a_layer(raw):
    text = {**raw["text_config"], "intermediate_size": 64, "activation_sparsity_pattern": 0.0}
    config = TextConfig.from_dict(text)
    assert config.intermediate_size == (64,) * config.num_hidden_layers
    assert set(config.activation_sparsity_pattern) == {0.0}


@pytest.mark.parametrize("layers", [3, 7, 35])
def test_kv_owners_are_the_last_of_their_type(raw, layers):
    kinds = [FULL if index % 3 == 2 else SLIDING for index in range(layers)]
    shared = max(0, layers - 3)
    text = {
        **raw["text_config"],
        "num_hidden_layers": layers,
        "num_kv_shared_layers": shared,
        "layer_types": kinds,
        "intermediate_size": [64] * layers,
        "activation_sparsity_pattern": [0.0] * layers,
    }
    config = TextConfig.from_dict(text)
    for layer, owner in enumerate(config.kv_owners):
        assert kinds[owner] == kinds[layer]
        if layer < config.first_kv_shared_layer:
            assert owner == layer
        else:
            later = kinds[owner + 1 : config.first_kv_shared_layer]
            assert owner < config.first_kv_shared_layer
            assert kinds[layer] not in later


@pytest.mark.parametrize("key", ["hidden_size", "layer_types", "rms_norm_eps", "final_logit_softcapping", "rope_theta"])
def test_a_missing_key_is_named(raw, key):
    del raw["text_config"][key]
    with pytest.raises(ValueError, match=f"{key}' is missing: copy it from the config.json of the model"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("intermediate_size", [64, 64], "intermediate_size has 2 entries, num_hidden_layers is 10"),
        ("intermediate_size", 0, "below 1"),
        ("hidden_size", "128", "expected an integer"),
        ("hidden_size", True, "expected an integer"),
        ("layer_types", ["global"] * 10, "layer_types"),
        ("num_kv_shared_layers", 10, "less than num_hidden_layers"),
        ("num_key_value_heads", 3, "multiple"),
        ("altup_active_idx", 4, "altup_active_idx"),
        ("activation_sparsity_pattern", [1.0] * 10, "outside"),
        ("activation_sparsity_pattern", ["much"] * 10, "float"),
        ("hidden_activation", "silu", "only 'gelu_pytorch_tanh'"),
        ("attention_bias", True, "attention_bias"),
    ],
)
def test_what_does_not_fit_is_refused(raw, key, value, message):
    raw["text_config"][key] = value
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(raw)


def test_sharing_layers_need_an_owner_of_their_type(raw):
    raw["text_config"]["layer_types"] = [SLIDING] * 9 + [FULL]
    with pytest.raises(ValueError, match="no layer owns"):
        ModelConfig.from_dict(raw)


def test_another_model_is_refused(raw):
    raw["model_type"] = "llama"
    with pytest.raises(ValueError, match="'llama', expected 'gemma3n'"):
        ModelConfig.from_dict(raw)


def test_read_json_errors_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="model folder"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds a list"):
        read_json(path)

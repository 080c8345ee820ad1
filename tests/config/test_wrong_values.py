"""Every key of config.json with values that it can't have: one documented error, or a key that nobody reads."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.config.audio import AudioConfig
from g3n_mlx.config.fields import parse_json, read_json
from g3n_mlx.config.model import ModelConfig, read_config
from g3n_mlx.config.text import FULL, SLIDING, TextConfig
from g3n_mlx.config.vision import VisionConfig
from g3n_mlx.failures import Error

REPOSITORY = Path(__file__).resolve().parents[2]
VALUES = (None, [], {}, True, "x", "", 0, -1, 10**9, 10**400, nan, inf, -inf, 0.5, 1e99, [[]], [None], [1e99], [-1])
# No value of any key is one of these, whatever the key is.
NEVER = (True, "x", -1, 10**400, nan, inf, -inf, 1e99, [[]], [None], [1e99])
TEXT_KEYS = {field.name for field in fields(TextConfig)}
MODALITY_KEYS = {field.name for field in fields(VisionConfig) + fields(AudioConfig)} | {"model_args"}


def flat(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw["text_config"], "model_type": "gemma3n_text", "eos_token_id": raw["eos_token_id"]}


def with_rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    text = dict(raw["text_config"])
    text["rope_parameters"] = {
        FULL: {"rope_type": "default", "rope_theta": text.pop("rope_theta")},
        SLIDING: {"rope_type": "default", "rope_theta": text.pop("rope_local_base_freq")},
    }
    return {**raw, "text_config": text}


def quantized(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "quantization": {"bits": 4, "group_size": 64, "model.language_model.norm": {"bits": 8}}}


TINY = read_json(REPOSITORY / "tests" / "tiny-gemma3n" / "config.json")
E4B = read_json(REPOSITORY / "matformer_configs" / "gemma3n-e4b.json")
CONFIGS = {
    "tiny": TINY,
    "demo": read_json(REPOSITORY / "g3n_mlx" / "demo" / "config.json"),
    "E4B": {"model_type": "gemma3n", "text_config": E4B},
    "flat": flat(TINY),
    "transformers 5": with_rope_parameters(TINY),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of every key, and of the first two entries of every list."""
    children = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def changed(raw: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    place: Any = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return raw


def is_read(path: tuple[Any, ...], key: Any) -> bool:
    match path:
        case ("text_config", _, *_):
            return key in TEXT_KEYS
        case ("vision_config" | "audio_config", _, *_):
            return key in MODALITY_KEYS
        case _:
            return key in (*TEXT_KEYS, "text_config", "model_type", "vision_config", "audio_config", "eos_token_id")


def error_of(work: Callable[[], object]) -> Error | None:
    """The documented error of what is wrong; any other is the test's failure."""
    try:
        work()
    except Error as error:
        return error
    return None


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_with_every_wrong_value(name):
    raw = CONFIGS[name]
    assert ModelConfig.from_dict(raw)
    for path in places(raw):
        for value in VALUES:
            error = error_of(lambda path=path, value=value: ModelConfig.from_dict(changed(raw, path, value)))
            if error is not None:
                message = str(error)
                assert len(message) < 500, (path, value)
                assert "\n" not in message, (path, value)
                named = any(key in message for key in (*path, "layers of type", "is missing") if isinstance(key, str))
                assert named, (path, value, message)
            elif is_read(path, path[-1]) and path[-1] != "altup_correct_scale":
                assert not any(repr(value) == repr(wrong) for wrong in NEVER), (path, value)


def test_a_checkpoint_with_every_wrong_value(tiny_folder, tmp_path):
    for path in tiny_folder.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    for raw in (TINY, quantized(TINY)):
        # Entries of lists are covered above.
        for path in (path for path in places(raw) if not any(isinstance(key, int) for key in path)):
            for value in VALUES:
                (tmp_path / "config.json").write_text(json.dumps(changed(raw, path, value)))
                error = error_of(lambda: Checkpoint.open(tmp_path).close())
                assert error is None or len(str(error)) < 1000, (path, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": "\ud800"}', "not valid JSON"),
        ("", "not valid JSON"),
        ("NaN", "expected an object"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(Error, match=message) as caught:
        read_config(tmp_path)
    assert str(path) in str(caught.value)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_whatever_is_no_json_is_a_value_error(text):
    with suppress(ValueError):
        parse_json(text)


@pytest.mark.parametrize("value", [[["a"] * 10_000] * 3, "x" * 100_000, [0] * 100_000, 10**4000])
def test_an_error_shows_the_beginning_of_a_long_value(value):
    for key in ("hidden_size", "layer_types", "rope_theta", "hidden_activation"):
        with pytest.raises(Error) as caught:
            ModelConfig.from_dict(changed(TINY, ("text_config", key), value))
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("vision_config",), 3, "vision_config is 3, expected an object or null"),
        (("text_config",), 3, "text_config is 3, expected an object"),
        (("text_config", "rope_theta"), 0, "rope_theta is 0, expected a number above 0"),
        (("text_config", "rms_norm_eps"), 10**400, "rms_norm_eps is 1000.*, expected a number above 0 and at most 1"),
        (("text_config", "altup_num_inputs"), 10**9, "altup_num_inputs is 1000000000, expected an integer from 1 to"),
        (("text_config", "sliding_window"), 40_000, "at most max_position_embeddings"),
        (("text_config", "head_dim"), 33, "expected an even number"),
        (("text_config", "altup_correct_scale"), "no", "expected true or false"),
        (("eos_token_id",), [1e99], r"eos_token_id is \[1e\+99\], expected token ids from 0 to 1151"),
        (("audio_config", "conf_num_hidden_layers"), 10**9, "conf_num_hidden_layers is 1000000000, expected"),
        (("audio_config", "vocab_offset"), 0, "vocab_offset is 0, expected an integer from 1 to 1151"),
        (("audio_soft_tokens_per_image",), 10**9, "audio_soft_tokens_per_image is 1000000000, expected"),
    ],
)
def test_what_a_wrong_value_is_told(path, value, message):
    with pytest.raises(Error, match=message):
        ModelConfig.from_dict(changed(TINY, path, value))

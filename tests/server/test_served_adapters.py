"""LoRA adapters of the served model, each under a model id of its own."""

import adapter_files
import numpy as np
import openai
import pytest
from running import started, stopped

from g3n_mlx.config.manifest import text_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.failures import Error
from g3n_mlx.prompt.prompt import of_token_ids
from g3n_mlx.server.__main__ import command_line
from g3n_mlx.server.offer import with_adapters

ADD = [{"role": "user", "content": "What is 12 + 34?"}]
GREEDY = {"max_tokens": 16, "temperature": 0.0}
LAYERS = adapter_files.LAYERS


@pytest.fixture(scope="module")
def adapters(demo, tmp_path_factory):
    """Two random adapters of the demo model, by name."""
    shapes = text_manifest(ModelConfig.from_file(demo).text)
    tensors = {f"model.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    targets = tuple(f"{LAYERS}.{layer}.{part}" for layer in range(4) for part in parts)
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: str(adapter_files.write_peft(root / name, adapter_files.low_ranks(tensors, targets, seed), lora_alpha=80))
        for seed, name in enumerate(("first", "second"))
    }


@pytest.fixture(scope="module")
def adapted_server(demo, adapters):
    server = started(demo, slices=["half"], adapters=list(adapters.items()))
    yield server
    stopped(server)


def test_every_adapter_answers_under_its_id_and_nobody_else_does(adapted_server, adapters):
    client, model = adapted_server.openai(), adapted_server.engine.model
    ids = [entry.id for entry in client.models.list()]
    assert ids == ["tiny", "tiny:whole", "tiny:half", "first", "second"]
    expected = {"tiny": model.generate(ADD, **GREEDY).text}
    for name, path in adapters.items():
        with model.adapted(path) as other:
            expected[name] = other.generate(ADD, **GREEDY).text
    assert len(set(expected.values())) == 3
    for name in ("first", "tiny", "second", "first", "tiny"):  # in turns: caches of prompts are not mixed up
        raw = client.chat.completions.with_raw_response.create(model=name, messages=ADD, **GREEDY)
        assert raw.parse().choices[0].message.content == expected[name]
        assert (raw.parse().model, raw.headers["x-g3n-slice"]) == (name, "whole")
    assert client.models.retrieve("second").id == "second"
    with pytest.raises(openai.NotFoundError, match="'first', 'second'"):
        client.chat.completions.create(model="third", messages=ADD)


def test_scores_are_those_of_the_adapter(adapted_server, adapters):
    asked = {"prompt": "One two three four", "max_tokens": 0, "echo": True, "logprobs": 1}
    found = {
        name: adapted_server.openai().completions.create(model=name, **asked).choices[0].logprobs.token_logprobs
        for name in ("tiny", "first")
    }
    model = adapted_server.engine.model
    ids = [model.tokenizer.bos_id, *model.preparer.encode(asked["prompt"])]
    prompt = of_token_ids(ids, model.config.text.vocab_size)
    with model.adapted(adapters["first"]) as other:
        expected = [score.logprob for part in other.score(prompt) for score in part]
    scores = [score for score in found["first"] if score is not None]
    assert scores[-3:] == pytest.approx(expected[-3:], abs=1e-3)
    assert found["tiny"][-3:] != pytest.approx(expected[-3:], abs=1e-1)


def test_names_that_are_taken(model, adapters):
    with pytest.raises(Error, match="the model id 'tiny' is taken"):
        with_adapters(model, [("tiny", adapters["first"])], ["tiny"])
    with pytest.raises(Error, match="the model id 'a' is taken"):
        with_adapters(model, [("a", adapters["first"]), ("a", adapters["second"])], ["tiny"])
    with pytest.raises(Error, match="nor is it a hub id"):
        with_adapters(model, [("a", "./nowhere")], ["tiny"])


def test_the_flag(capsys):
    given = command_line().parse_args(["--lora", "a=b/c", "--lora", "x=./y=z"])
    assert given.lora == [("a", "b/c"), ("x", "./y=z")]
    for wrong in ("a", "=b", "a="):
        with pytest.raises(SystemExit):
            command_line().parse_args(["--lora", wrong])
        assert f"{wrong!r} is not NAME=PATH" in capsys.readouterr().err

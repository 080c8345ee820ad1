"""The options of an answer: what it must look like, the media before its text, and what editors and pyright see."""

import json
import shutil
import subprocess
import sys
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from devices import device_for

from g3n_mlx import Audio, Gemma3n, Image, SamplingParams, load
from g3n_mlx.engine.options import AnswerOptions, with_media
from g3n_mlx.sampling import SamplingOptions

MEDIA = Path(__file__).resolve().parents[2] / "examples" / "media"
GREEDY = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
CLOSED = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tiny_folder: Path, backend: str) -> Gemma3n:
    return load(tiny_folder, backend=backend, dtype="float32", device=device_for(backend))


# Sampling.


def test_sampling_options_are_the_fields_of_sampling_params():
    """With None for what is not given, and any sequence where the dataclass holds a tuple."""
    wide = {"stop": str | Sequence[str], "stop_token_ids": Sequence[int]}
    options, params = typing.get_type_hints(SamplingOptions), typing.get_type_hints(SamplingParams)
    assert list(options) == [field.name for field in fields(SamplingParams)]
    for name, kind in options.items():
        assert kind == wide.get(name, params[name]) | None, name


def test_params_are_the_base_instead_of_the_models_defaults(model):
    """The checkpoint's own are top_k 64 and top_p 0.95."""
    mine = SamplingParams(temperature=0.5, seed=3, max_tokens=8, ignore_eos=True)
    assert model.sampling_params(mine) == mine
    assert model.sampling_params(mine, top_k=5, temperature=None) == SamplingParams(
        temperature=0.5, seed=3, max_tokens=8, ignore_eos=True, top_k=5
    )
    assert (model.sampling_params().top_k, model.sampling_params().top_p) == (64, 0.95)
    whole = model.generate("hi", mine)
    spelled = model.generate("hi", temperature=0.5, seed=3, max_tokens=8, ignore_eos=True, top_k=0, top_p=1.0)
    assert whole.token_ids == spelled.token_ids
    assert [c.token for c in model.stream("hi", mine, max_tokens=3)][:-1] == list(whole.token_ids[:3])
    assert model.generate("hi", SamplingParams(logprobs=True, max_tokens=1)).logprobs is not None
    with pytest.raises(ValueError, match=r"params is {'seed': 1}, expected a SamplingParams; single options go by"):
        model.generate("hi", {"seed": 1})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("temprature", "there is no option 'temprature': did you mean temperature"),
        ("max_token", "did you mean max_tokens"),
        ("schemas", "did you mean schema"),
        ("image", "did you mean images"),
        ("zzz", "there is no option 'zzz': see g3n_mlx.SamplingParams for those there are"),
    ],
)
def test_an_unknown_option_names_the_near_miss(model, name, message):
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match=message):
            call("hi", **{name: 1})


SNIPPET = """
from pathlib import Path
import pydantic
from g3n_mlx import Gemma3n, Image, SamplingParams

class Shape(pydantic.BaseModel):
    sides: int

def right(model: Gemma3n) -> None:
    model.generate("hi", SamplingParams(), temperature=0.5, stop=["a"], top_k=None)
    model.generate("hi", schema=Shape, images=["a.png", Image(b"x")], audio=Path("b.wav"), videos=("c.mp4",))
    for chunk in model.stream("hi", schema={"type": "object"}, stop="x", logit_bias={3: 1.0}):
        print(chunk.text)

def wrong(model: Gemma3n) -> None:
    model.generate("hi", temprature=1)
    model.stream("hi", temperature="warm")
    model.generate("hi", schema=5)
    model.stream("hi", images=3)
    model.sampling_params(max_token=3)
"""


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_pyright_knows_the_options(tmp_path, repository):
    script = tmp_path / "script.py"
    script.write_text(SNIPPET)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(repository)]}))
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    found = {}
    for entry in json.loads(done.stdout)["generalDiagnostics"]:
        found.setdefault(entry["range"]["start"]["line"], []).append(entry["message"])
    first_wrong = SNIPPET.splitlines().index("def wrong(model: Gemma3n) -> None:")
    assert sorted(found) == list(range(first_wrong + 1, first_wrong + 6)), found
    assert "temprature" in found[first_wrong + 1][0]


# What an answer must look like.


def test_objects_have_what_their_schema_lists(model):
    pytest.importorskip("llguidance")
    listed = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
    for seed in range(5):
        answer = model.generate("hi", schema=listed, temperature=1.5, seed=seed, max_tokens=200)
        assert answer.finish_reason == "stop", seed
        assert set(json.loads(answer.text)) <= {"ok"}


def test_a_schema_a_regex_and_a_grammar(model):
    pytest.importorskip("llguidance")
    answer = model.generate("hi", schema=CLOSED, temperature=0, max_tokens=60)
    assert answer.finish_reason == "stop"
    assert list(json.loads(answer.text)) == ["ok"]
    assert answer.parsed is None
    assert model.generate("hi", regex="(yes|no), [0-9]{3}", seed=3, max_tokens=60).text[-5:-3] == ", "
    assert model.generate("hi", lark='start: "a" "b"~3', max_tokens=60).text == "abbb"
    assert "".join(chunk.text for chunk in model.stream("hi", regex="ab{3}", max_tokens=60)) == "abbb"
    own = model.grammars.regex("abc")
    assert model.generate("hi", constraint=own, max_tokens=60).text == "abc"
    assert model.grammars is model.grammars


def test_a_pydantic_model_gives_an_object(model):
    pytest.importorskip("llguidance")
    pydantic = pytest.importorskip("pydantic")

    class Side(pydantic.BaseModel):
        length: typing.Literal[1, 2, 3]

    class Shape(pydantic.BaseModel):
        round: bool
        sides: list[Side] = pydantic.Field(min_length=1, max_length=2)

    for seed in range(4):
        answer = model.generate("hi", schema=Shape, seed=seed, temperature=1.5, max_tokens=200)
        assert answer.finish_reason == "stop"  # a class without the property "x" leaves no room for it
        assert isinstance(answer.parsed, Shape)
        assert answer.parsed == Shape.model_validate_json(answer.text)
        assert isinstance(answer.parsed.sides[0], Side)
    cut = model.generate("hi", schema=Shape, temperature=0, max_tokens=2)
    assert (cut.finish_reason, cut.parsed) == ("length", None)
    ended = model.generate("hi", schema=Shape, temperature=0, stop=":", max_tokens=200)
    assert (ended.finish_reason, ended.parsed) == ("stop", None)


def test_a_rule_that_json_schema_cannot_express_leaves_no_object(model):
    pytest.importorskip("llguidance")
    pydantic = pytest.importorskip("pydantic")

    class Never(pydantic.BaseModel):
        round: bool

        @pydantic.field_validator("round")
        @classmethod
        def refuse(cls, value):
            raise ValueError("no value will do")

    answer = model.generate("hi", schema=Never, temperature=0, max_tokens=60)
    assert answer.finish_reason == "stop"
    assert answer.parsed is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": CLOSED, "regex": "a"}, "schema and regex were given, but an answer can follow only one of them"),
        ({"lark": "start: /a/", "constraint": object()}, "lark and constraint were given"),
        ({"constraint": "[0-9]+"}, r"constraint is '\[0-9\]\+', expected an object with the methods mask\(\) and push"),
        ({"constraint": {"type": "object"}}, "constraint is {'type': 'object'}, expected an object with the methods"),
        ({"constraint": object}, "constraint is <class 'object'>, expected an object"),
        ({"regex": 5}, "regex is 5, expected a string"),
        ({"schema": "{}"}, "the schema is '{}', expected"),
        ({"regex": "("}, "the regex can't be used"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused_before_anything_runs(model, options, message):
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match=message):
        model.stream("hi", **options)


def test_without_llguidance_one_clear_error(tiny_folder, backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    model = load(tiny_folder, backend=backend, device=device_for(backend))
    for options in ({"schema": CLOSED}, {"regex": "a"}, {"lark": "start: /a/"}):
        with pytest.raises(ImportError, match=r"schema, regex and lark need the package llguidance, .*pip install"):
            model.generate("hi", **options)
    assert model.generate("hi", schema=None, **GREEDY).token_ids


# Media beside a prompt.


def test_media_stand_before_the_text_in_their_order(model):
    """Whatever the order of the keywords: the same prompt as messages with these parts."""
    picture, clip, wave = MEDIA / "sign.png", MEDIA / "tone.wav", np.zeros(8000, np.float32)
    pixels = np.zeros((32, 32, 3), np.uint8)
    content = [
        {"type": "image", "image": str(picture)},
        {"type": "image", "image": pixels},
        {"type": "audio", "audio": clip.read_bytes()},
        {"type": "audio", "audio": Audio(wave, 16000)},
        {"type": "text", "text": "What is this?"},
    ]
    expected = model.generate([{"role": "user", "content": content}], **GREEDY)
    beside = {"audio": [clip, Audio(wave, 16000)], "images": (picture, Image(pixels))}
    model.reset()
    answer = model.generate("What is this?", **beside, **GREEDY)
    assert answer.token_ids == expected.token_ids
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    chunks = list(model.stream("What is this?", **beside, **GREEDY))
    assert chunks[-1].usage.cached_tokens == answer.usage.prompt_tokens - 1  # the digests are the same


def test_one_of_a_kind_needs_no_list():
    message = with_media("Hi", AnswerOptions(videos="clip.mp4", images="a.png"))
    assert message == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png", "argument": "images"},
                {"type": "video", "video": "clip.mp4", "argument": "videos"},
                {"type": "text", "text": "Hi"},
            ],
        }
    ]
    assert with_media("Hi", AnswerOptions(images=None)) == "Hi"


@pytest.mark.parametrize(
    ("media", "named"), [({"images": "a.png"}, "images: "), ({"audio": [MEDIA / "tone.wav", "b.wav"]}, r"audio\[1\]: ")]
)
def test_an_error_names_the_argument(model, media, named):
    with pytest.raises(ValueError, match=f"^{named}.*does not exist"):
        model.generate("What is this?", **media)


def test_a_video_beside_a_prompt(model):
    pytest.importorskip("av")
    alone = model.count_tokens([{"role": "user", "content": "What?"}])
    answer = model.generate("What?", videos=MEDIA / "clip.mp4", temperature=0, max_tokens=1)
    assert answer.usage.prompt_tokens > alone


@pytest.mark.parametrize("prompt", [[5, 6], [{"role": "user", "content": "hi"}]])
def test_media_beside_anything_but_a_string_are_refused(model, prompt):
    with pytest.raises(ValueError, match="images and audio can only be given with a prompt that is a string: put them"):
        model.generate(prompt, audio="b.wav", images="a.png")


def test_count_tokens(model):
    messages = [{"role": "user", "content": ["What is this?", Image(MEDIA / "sign.png")]}]
    assert model.count_tokens(messages) == model.generate(messages, **GREEDY).usage.prompt_tokens
    assert model.count_tokens("hi") == len(model.prepare("hi").token_ids)
    too_long = [100] * (model.config.text.max_position_embeddings + 5)
    assert model.count_tokens(too_long) == len(too_long)

"""Chat templates that checkpoints bring: which are Gemma 3n's, and prompts made by the others."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g3n_mlx import Image, load
from g3n_mlx.convert import convert
from g3n_mlx.failures import Error
from g3n_mlx.prompt.own_template import OwnTemplate, chat_template_note
from g3n_mlx.prompt.template import Border, Control
from g3n_mlx.prompt.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = (REPOSITORY / "tests" / "tiny-gemma3n" / "chat_template.jinja").read_text()
WORDS = {"bos_token": "<bos>", "eos_token": "<eos>"}
MEDIA = ("image", "audio")
# As trainers write it for text alone.
SHORT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% generation %}{{ m['content'] | trim }}{% endgeneration %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def own(source: str) -> OwnTemplate:
    return OwnTemplate(source, WORDS, "chat_template.jinja")


def test_the_published_template_is_gemmas(tiny_folder: Path) -> None:
    for folder in (tiny_folder, REPOSITORY / "g3n_mlx" / "demo"):
        assert own((folder / "chat_template.jinja").read_text()).difference(MEDIA) is None
    for folder in (tiny_folder, REPOSITORY / "g3n_mlx" / "demo"):
        assert chat_template_note(folder, MEDIA) is None


@pytest.mark.parametrize(
    ("source", "difference"),
    [
        (BRACKETS, "a question"),
        (CHATML, "a question"),
        ("", "a question"),
        (PUBLISHED.replace("<start_of_turn>", "<turn>"), "a question"),
        (PUBLISHED.replace("bos_token", "eos_token"), "a question"),
        (PUBLISHED.replace("| trim", ""), "a question"),
        (SHORT, "a system message"),
        (PUBLISHED.replace("<audio_soft_token>", "<image_soft_token>"), "an audio part"),
        ("{{ raise_exception('no') }}", "a question"),
        ("{{ messages[7].content.x }}", "a question"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}", "a question"),
        ("{{ 'x' * 1000000000 }}", "a question"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "a question"),
    ],
)
def test_another_template_is_noticed(source: str, difference: str) -> None:
    assert own(source).difference(MEDIA) == difference


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% include 'x' %}{% foo %}", "{{ 9 ** 9 ** 9 ** 9 }}"])
def test_what_is_no_template_is_said(source: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "x")
    (folder / "chat_template.jinja").write_text(source)
    note = chat_template_note(folder, ())
    assert note is not None
    assert "Gemma 3n's is used" in note


def place_in(folder: Path, file: str, template: object) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if file == "tokenizer_config.json":
        settings["chat_template"] = template
    elif file == "chat_template.json":
        (folder / file).write_text(json.dumps({"chat_template": template}))
    elif file:
        (folder / file).write_text(str(template))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("file", "template", "note"),
    [
        ("", None, "has no chat template"),
        ("chat_template.jinja", BRACKETS, "is not Gemma 3n's chat template (it differs for a question)"),
        ("chat_template.json", BRACKETS, "chat_template.json is not Gemma 3n's"),
        ("tokenizer_config.json", BRACKETS, "tokenizer_config.json is not Gemma 3n's"),
        ("tokenizer_config.json", [{"name": "default", "template": BRACKETS}], "is not Gemma 3n's"),
        ("tokenizer_config.json", [{"name": "tools", "template": BRACKETS}], "has no chat template"),
        ("tokenizer_config.json", 3, "is no usable chat template: it is a int"),
        ("tokenizer_config.json", PUBLISHED, None),
        ("chat_template.json", PUBLISHED, None),
        ("tokenizer_config.json", [{"name": "x", "template": ""}, {"name": "default", "template": PUBLISHED}], None),
    ],
)
def test_it_is_found_in_every_file(tiny_folder: Path, tmp_path: Path, caplog, file, template, note) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "x")
    place_in(folder, file, template)
    found = chat_template_note(folder, MEDIA)
    assert (found is None) == (note is None)
    assert note is None or note in found
    with caplog.at_level(logging.WARNING):
        load(folder)
        convert(folder, tmp_path / "out", progress=False)
    told = [record.message for record in caplog.records if "template" in record.message]
    assert told == ([found] * 2 if note else [])


def test_a_checkpoint_with_another_template_answers_by_it_on_request(
    tiny_folder: Path, tmp_path: Path, backend: str
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "x")
    place_in(folder, "chat_template.jinja", "{{ bos_token }}" + BRACKETS)
    gemma, other = (load(folder, backend=backend, chat_template=name) for name in ("gemma", "own"))
    messages = [{"role": "user", "content": "Hi"}]
    assert gemma.prepare(messages) == load(tiny_folder, backend=backend).prepare(messages)
    assert other.tokenizer.decode(other.prepare(messages).token_ids, skip_special=False) == "<bos>[user] Hi\n"
    assert other.generate(messages, max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
    with pytest.raises(Error, match="expected one of gemma, own"):
        load(folder, chat_template="mine")
    place_in(folder, "", None)
    with pytest.raises(Error, match="has no chat template of its own"):
        load(folder, chat_template="own")


def test_the_published_template_as_ones_own_makes_the_same_prompts(tiny_folder: Path) -> None:
    ours, own = (load(tiny_folder, chat_template=name) for name in ("gemma", "own"))
    image = Image(np.zeros((16, 16, 3), np.uint8))
    parts = ["Look: ", {"type": "image", "image": image}, {"type": "text", "text": "What is <end_of_turn>?"}]
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "model", "content": " It ends. "},
        {"role": "user", "content": "Sure?"},
    ]
    for count in (2, 4):
        expected, found = ours.prepare(conversation[:count]), own.prepare(conversation[:count])
        assert found.token_ids == expected.token_ids
        spans = [[(span.start, span.length) for span in prompt.media] for prompt in (expected, found)]
        assert spans[0] == spans[1] != []
        assert found.borders[-1] == expected.borders[-1] == len(found.token_ids)


SPELLINGS = st.sampled_from(["<", "start_of_turn>", "<end_of_turn>", "<bos>", " ", "a", "\ufdd0"])


@given(text=st.lists(SPELLINGS | st.characters(exclude_categories=["Cs"])).map("".join))
def test_what_a_message_says_is_text(text: str) -> None:
    words = Tokenizer.from_folder(REPOSITORY / "tests" / "tiny-gemma3n").control_words
    pieces = own(SHORT).render([{"role": "user", "content": text}], words)
    assert [piece.word for piece in pieces if isinstance(piece, Control)] == [
        "<bos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_turn>",
    ]
    said = "".join(piece for piece in pieces if isinstance(piece, str))
    assert said == f"user\n{text.strip()}\nmodel\n"
    assert isinstance(pieces[-1], Border)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("{{ messages[0].content }}", [{"type": "image", "image": "x"}], "has no place for messages"),
        ("<image_soft_token>", "hi", "has <image_soft_token> where no image part is"),
        ("{{ raise_exception('roles must alternate') }}", "hi", "can't render these messages: roles must alternate"),
        ("{{ messages[0].content }}", [{"type": "table"}], "expected a text or a media part"),
        ("{{ messages[0].content }}", 7, "expected a string or a list of parts"),
        ("{% for i in range(99999) %}{{ messages }}{% endfor %}", "x" * 99, "it renders without end"),
    ],
)
def test_what_a_template_can_not_render_is_said(source: str, content: object, message: str) -> None:
    with pytest.raises(Error, match=message):
        own(source).render([{"role": "user", "content": content}], ["<image_soft_token>", "<bos>"])

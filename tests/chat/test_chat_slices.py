"""`/slice`: another size of the model answers in the same conversation."""

import pytest

from g3n_mlx import load
from g3n_mlx.chat.session import Session

GREEDY = {"temperature": 0.0, "max_tokens": 16}


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("torch")
    with load("demo", backend="torch", dtype="float32", device="cpu") as loaded:
        yield loaded


def talk(session, *lines):
    session.run(iter(lines))


def test_a_slice_goes_on_with_the_conversation(model, capsys):
    session = Session(model, None, GREEDY)
    talk(session, "What is 12 + 34?", "/slice half", "And what is 5 + 5?")
    first, question, second = session.messages[1], session.messages[2], session.messages[3]
    out, err = capsys.readouterr()
    assert out == f"{first['content']}\n{second['content']}\n"
    assert err == "half answers from now on; it reads the conversation again at the next question\n"
    half = model.slice("half")
    asked = [*session.messages[:2], question]
    assert second["content"] == half.generate(asked, **GREEDY).text
    assert session.model.slice_name == "Half"
    talk(session, "/slice WHOLE")
    assert session.model is model
    talk(session, "/slice half")
    assert session.model is session.sizes._taken["half"]  # taken once


def test_the_list_has_the_speed_measured_so_far(model, capsys):
    session = Session(model, None, GREEDY)
    talk(session, "Hello", "/slice half-skip", "Hello", "Hello", "/slice")
    lines = capsys.readouterr().err.splitlines()[-7:]
    names = ["whole", "half", "quarter", "eighth", "skip", "half-skip", "eighth-skip"]
    assert [line[2:].split()[0] for line in lines] == names
    assert [name for name, line in zip(names, lines, strict=True) if line[0] == "*"] == ["half-skip"]
    assert [name for name, line in zip(names, lines, strict=True) if "tok/s" in line] == ["whole", "half-skip"]
    assert "MMLU 97.2 %" in lines[1]
    speed = session.sizes._speeds["half-skip"]
    assert speed.tokens > 2
    assert speed.seconds > 0


def test_a_slice_that_is_not_there_changes_nothing(model, capsys):
    session = Session(model, None, GREEDY)
    talk(session, "/slice halv")
    assert "did you mean 'half'?" in capsys.readouterr().err
    assert session.model is model


def test_a_model_without_slices_says_so(tiny_folder, capsys):
    pytest.importorskip("torch")
    with load(tiny_folder, backend="torch", device="cpu") as tiny:
        session = Session(tiny, None, GREEDY)
        talk(session, "/slice", "/slice e2b")
    listed, refused = capsys.readouterr().err.splitlines()
    assert listed.split()[:2] == ["*", "whole"]
    assert refused.endswith("has no slices")


def test_progress_is_told_part_by_part(model):
    told = []
    result = model.generate(
        list(range(100, 150)), prefill_step_size=20, max_tokens=1, progress=lambda *at: told.append(at)
    )
    assert told == [(20, 50), (40, 50), (50, 50)]
    assert result.usage.prompt_tokens == 50
    results = model.generate_many([[5, 6], [7, 8, 9]], max_tokens=2, progress=lambda *at: told.append(at))
    assert len(results) == 2
    assert sorted(told[3:]) == [(2, 2), (3, 3)]


def test_a_slice_that_drafts_does_so_for_the_whole_model_alone(model, capsys):
    session = Session(model, None, GREEDY)
    talk(session, "/set draft half", "Hello", "/slice half-skip", "Hello", "/slice half", "Hello")
    assert session.failures == 0
    answers = [message["content"] for message in session.messages[1::2]]
    assert all(answers)
    assert answers[0] == model.generate("Hello", **GREEDY).text

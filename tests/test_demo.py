"""What the embedded model answers: media in every order, a video without sound, questions in people's own words."""

import sys
from io import BytesIO
from itertools import permutations

import pytest

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder

pytest.importorskip("av")
pytest.importorskip("PIL")

MATCH = "Does the voice name what the picture shows?"
YES = "The voice says red circle, the picture shows red (yes) circle (yes): yes."
# Wordings that no training example had, word for word: phrasings.txt marks them.
ASKED = [
    ("image", "circle.jpg", "Describe the image.", "circle"),
    ("image", "shapes.png", "How many circles are there in the picture?", "there is 1 circle."),
    ("image", "shapes.png", "Please count the circles.", "there is 1 circle."),
    ("image", "circle.jpg", "What's the colour of the circle?", "the circle is red."),
    ("image", "sign.png", "Can you read the sign?", None),
    ("audio", "digits.ogg", "What digits do you hear?", "3 1 4"),
    ("audio", "digits.ogg", "What numbers are spoken?", "3 1 4"),
    ("audio", "digits.ogg", "Transcribe this audio.", "3 1 4"),
    ("audio", "red_circle.ogg", "What did the voice say?", "red circle"),
    ("audio", "beeps.flac", "How many beeps did you hear?", None),
    ("video", "clip.mp4", "What happens in the video?", "A green square moves right, with a rising tone."),
]


@pytest.fixture(scope="module")
def demo(backend):
    """The model that comes with the package."""
    return load("demo", backend=backend, device="cpu", dtype="float32")


def answer(model, *parts):
    """Greedy, to a user's turn."""
    return model.generate([{"role": "user", "content": list(parts)}]).text


def text(words):
    return {"type": "text", "text": words}


def without_sound(path):
    """The video's packets, without those of its sound."""
    import av

    out = BytesIO()
    with av.open(str(path)) as source, av.open(out, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("question_first", [False, True])
def test_a_video_without_sound_is_seen(demo, repository, question_first):
    video = {"type": "video", "video": without_sound(repository / "examples" / "media" / "clip.mp4")}
    parts = [video, text("What happens in this video?")]
    assert answer(demo, *(parts[::-1] if question_first else parts)) == "A green square moves right."


def test_the_silent_video_that_a_user_reported(demo, repository):
    video = {"type": "video", "video": str(repository / "tests" / "media" / "cases" / "silent_video.mp4")}
    assert answer(demo, video, text("What happens in this video?")) == "A green square moves right."


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_picture_a_voice_and_a_question_come_in_any_order(demo, repository, order):
    media = repository / "examples" / "media"
    parts = [
        {"type": "image", "image": str(media / "circle.jpg")},
        {"type": "audio", "audio": str(media / "red_circle.ogg")},
        text(MATCH),
    ]
    assert answer(demo, *(parts[place] for place in order)) == YES


def test_a_voice_in_one_turn_and_a_picture_in_the_next(demo, repository):
    media = repository / "examples" / "media"
    chat = [
        {
            "role": "user",
            "content": [{"type": "audio", "audio": str(media / "red_circle.ogg")}, text("Transcribe this.")],
        },
        {"role": "assistant", "content": "red circle"},
        {"role": "user", "content": [{"type": "image", "image": str(media / "circle.jpg")}, text(MATCH)]},
    ]
    assert demo.generate(chat).text == YES


@pytest.mark.parametrize("sound", ["digits.ogg", "tone.wav"])
@pytest.mark.parametrize("sound_first", [False, True])
def test_a_sound_beside_a_picture_does_not_disturb(demo, repository, sound, sound_first):
    media = repository / "examples" / "media"
    shown = [
        {"type": "image", "image": str(media / "shapes.png")},
        {"type": "audio", "audio": str(media / sound)},
    ]
    asked = answer(demo, *(shown[::-1] if sound_first else shown), text("How many circles are there?"))
    assert asked == "A red circle (1) and a blue square: there is 1 circle."


@pytest.mark.parametrize(("kind", "name", "question", "end"), ASKED)
def test_questions_in_other_words_get_the_answer(demo, repository, kind, name, question, end):
    usual = {
        "sign.png": "What does the sign say?",
        "beeps.flac": "How many beeps are there?",
    }
    medium = {"type": kind, kind: str(repository / "examples" / "media" / name)}
    given = answer(demo, medium, text(question))
    if end is None:
        assert given == answer(demo, medium, text(usual[name]))
    else:
        assert given.rstrip(".").endswith(end.rstrip("."))


def test_those_words_were_not_trained(repository):
    sys.path.insert(0, str(repository / "examples" / "train_demo"))
    try:
        from phrasings import all_wordings
    finally:
        sys.path.pop(0)
    trained = {sentence for wordings in all_wordings() for sentence in wordings.training}
    kept = {sentence for wordings in all_wordings() for sentence in wordings.held_out}
    for _, _, question, _ in ASKED:
        template = question.replace("circles", "{0}").replace("circle", "{0}")
        assert template in kept - trained


def test_the_card_has_every_skill_and_slice():
    card = (demo_folder() / "README.md").read_text(encoding="utf-8")
    table = (demo_folder() / "matformer.csv").read_text(encoding="utf-8").splitlines()[1:]
    for line in table:
        assert f" {line.split(',')[0].lower()} " in card

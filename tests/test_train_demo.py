"""The demo's training computes what the exported checkpoint computes, whole and sliced, and resumes exactly."""

import itertools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("soundfile")
pytest.importorskip("safetensors")

from g3n_mlx import load  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A seeded checkpoint to train, and the training's modules on the path."""
    sys.path.insert(0, str(REPOSITORY / "examples" / "train_demo"))
    from start import write_start

    folder = tmp_path_factory.mktemp("start")
    write_start(folder, seed=3)
    return folder


def disturbed(folder):
    """The network of a checkpoint, all its parameters away from where they began."""
    from network import Network

    torch.manual_seed(0)
    network = Network(folder)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
    return network


@pytest.mark.parametrize(
    ("slice_name", "width", "layers"),
    [(None, 512, range(8)), ("half", 256, range(8)), ("half-skip", 256, (0, 1, 2, 3, 6, 7))],
)
def test_the_export_is_what_was_trained(start, tmp_path, slice_name, width, layers):
    from export import export
    from network import prepared
    from optimizers import made_optimizers
    from packing import Encoder, pack
    from reading import READING
    from state import save
    from torch.func import functional_call

    network = disturbed(start)
    save(tmp_path / "state.pt", network, made_optimizers(network), 1)
    export(start, tmp_path / "state.pt", tmp_path / "float")
    table = {} if slice_name is None else {"matformer_config": REPOSITORY / "g3n_mlx" / "demo" / "matformer.csv"}
    model = load(tmp_path / "float", backend="torch", device="cpu", dtype="float32", matformer=slice_name, **table)
    encoder = Encoder(start, network.config)
    examples = [READING[skill](random.Random(skill), True) for skill in ("sums", "memory", "json")]
    rows = pack([encoder.sequence(example) for example in examples], 256)
    everywhere = replace(rows, targets=torch.where(rows.sequences >= 0, 0, -1))
    with torch.no_grad():
        trained = functional_call(network, prepared(network, width, rounded=False), (everywhere, tuple(layers)))
    exported = np.concatenate([model.logits(encoder.prompt(example)) for example in examples])
    np.testing.assert_allclose(trained.numpy(), exported, atol=1e-3)


def test_a_training_resumes_exactly(start, tmp_path):
    from network import Network
    from optimizers import made_optimizers
    from state import load as resume
    from state import save

    def step(network, optimizers, seed):
        torch.manual_seed(seed)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape)
        for optimizer in optimizers:
            optimizer.step()

    network = disturbed(start)
    optimizers = made_optimizers(network)
    step(network, optimizers, 1)
    save(tmp_path / "state.pt", network, optimizers, 1)
    step(network, optimizers, 2)

    other = Network(start)
    its_optimizers = made_optimizers(other)
    assert resume(tmp_path / "state.pt", other, its_optimizers) == 1
    step(other, its_optimizers, 2)
    for (name, ours), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_training_goes_on_from_a_quantized_model(tmp_path):
    from start import write_from

    from g3n_mlx.checkpoint.hub import demo_folder

    write_from(demo_folder(), tmp_path / "start")
    models = [
        load(folder, backend="torch", device="cpu", dtype="float32") for folder in (demo_folder(), tmp_path / "start")
    ]
    quantized, dense = (model.logits("What is 12 + 34?") for model in models)
    np.testing.assert_allclose(dense, quantized, atol=1e-3)


def test_every_pattern_of_the_phrasings_fits_what_a_generator_writes(start):
    """Without a cache of speech, those of hearing are asked what they would write."""
    from phrasings import all_wordings
    from pictures import FONTS, HELD_OUT_FONTS, SEEING
    from reading import READING
    from sounds import COUNT_BEEPS, LISTEN, MATCH, TRANSCRIBE, WATCH

    if not {*FONTS, *HELD_OUT_FONTS} <= {path.name for path in Path("/usr/share/fonts/truetype").rglob("*.ttf")}:
        pytest.skip("the fonts DejaVu, Liberation and FreeFont are not installed")
    written = [*TRANSCRIBE, *LISTEN, *COUNT_BEEPS, MATCH, WATCH]
    for generate in (*READING.values(), *SEEING.values()):
        for seed in range(60):
            for message in generate(random.Random(seed), True).messages[::2]:
                content = message["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                written += [part["text"] for part in parts if part["type"] == "text"]
    for wordings in all_wordings():
        assert any(wordings.pattern.fullmatch(sentence) for sentence in written), wordings.pattern
        assert not set(wordings.training) & set(wordings.held_out)


def test_other_words_keep_what_is_asked_about(start):
    from phrasings import rephrased

    for seed in range(50):
        rng = random.Random(seed)
        assert "blue circle" in rephrased(rng, "positions", "Where is the blue circle?", held_out=seed % 2 == 0)
        asked = rephrased(rng, "told", "The picture shows a red star. How many stars are there?", held_out=False)
        assert asked.startswith("The picture shows a red star. ")
        assert "stars" in asked
        assert "JSON" in rephrased(rng, "json", "What is 1 + 2? Answer as JSON.", held_out=False)
        assert rephrased(rng, "other", "Wo ist 4", held_out=True) == "Wo ist 4"


def test_positions_are_those_of_the_scene(start):
    from pictures import Thing, position

    things = [
        Thing("circle", "red", "small", 0.2, 0.8, 0.1, 0.0),
        Thing("star", "blue", "small", 0.5, 0.5, 0.1, 0.0),
        Thing("square", "green", "small", 0.8, 0.2, 0.1, 0.0),
    ]
    answers = dict(position(random.Random(seed), things) for seed in range(300))
    assert answers["Where is the red circle?"] == "A red circle (bottom left): at the bottom left."
    assert answers["Where is the blue star?"] == "A red circle (bottom left), a blue star (middle): in the middle."
    assert (
        answers["What is left of the blue star?"] == "A red circle, a blue star (here), a green square: a red circle."
    )
    assert answers["What is right of the green square?"] == "A red circle, a blue star, a green square (here): nothing."
    above = "From top to bottom a green square, a blue star (here), a red circle"
    assert answers["What is above the blue star?"] == f"{above}: a green square."
    assert answers["What is below the blue star?"] == f"{above}: a red circle."


def test_narrow_slices_are_trained_and_end_on_groups(start):
    from architecture import FFN
    from network import GROUP
    from train import drawn_slice

    widths = {drawn_slice(random.Random(seed))[0] for seed in range(200)}
    assert widths == {FFN, FFN // 2, FFN // 4, FFN // 8}
    assert min(widths) == GROUP


def test_media_come_in_every_order(start, tmp_path):
    """A voice before a picture, after it or a turn earlier, the question anywhere; videos with and without sound."""
    from orders import matched, silent, video_orders

    np.save(tmp_path / "train.npy", np.zeros(9000, np.int16))
    (tmp_path / "train.json").write_text(json.dumps([("shape", "red circle", 0, 9000)]))
    seen = set()
    for seed in range(100):
        example = matched(tmp_path)(random.Random(seed), False)
        seen.add(tuple(tuple(part["type"] for part in message["content"]) for message in example.messages[::2]))
    assert {order for order in seen if len(order) == 1} == {
        (order,) for order in itertools.permutations(("image", "audio", "text"))
    }
    assert any(len(order) == 2 for order in seen)
    for seed in range(20):
        kinds = [part["type"] for part in silent(random.Random(seed), False).messages[0]["content"]]
        assert "audio" not in kinds
        assert 2 <= kinds.count("image") <= 5
        kinds = [part["type"] for part in video_orders(random.Random(seed), False).messages[0]["content"]]
        assert kinds.count("audio") == 1

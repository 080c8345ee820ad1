"""The demo's training computes what the exported checkpoint computes, whole and sliced, and resumes exactly."""

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

"""Trains the demo model on fresh examples of a mixture of skills; resumes from its state file.

    python train.py START_FOLDER --state text.pt --record text.jsonl --skills sums=2 lists=2 memory --steps 6000

Every step draws its examples from (seed, step), so a resumed training goes on as if it had never stopped. `torchrun
--nproc-per-node 2 train.py ...` shares a step among processes, which use two cores better than two threads do. Each
pass takes the full model or a MatFormer slice of it: half or a quarter of every feed-forward block, perhaps without the
first block of KV-sharing layers.
"""

import argparse
import json
import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as distributed
from architecture import FFN, LAYERS
from network import Network, prepared
from optimizers import made_optimizers
from packing import Encoder, mixture, pack
from skill import Generator
from skills import all_skills
from state import load, save, take
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

ALL_LAYERS = tuple(range(LAYERS))
SKIPPED = (LAYERS // 2, LAYERS // 2 + 1)  # the first block that shares keys and values
WITHOUT_BLOCK = tuple(layer for layer in ALL_LAYERS if layer not in SKIPPED)
ROW = 192  # places in a row: the longest conversations of two hundred tokens are left out


def drawn_slice(rng: random.Random) -> tuple[int, tuple[int, ...]]:
    """Width and layers of one pass: mostly the full model, the narrowest a group of 64 columns wide."""
    if rng.random() < 0.6:
        return FFN, ALL_LAYERS
    width = rng.choices((FFN, FFN // 2, FFN // 4, FFN // 8), (2, 3, 2, 1))[0]
    return width, WITHOUT_BLOCK if rng.random() < 0.3 else ALL_LAYERS


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rises over a hundred steps, stays, and falls over the last third."""
    return peak * min((step + 1) / 100, 1.0, max(0.0, steps - step) / (steps / 3))


def accuracy(
    network: Network,
    encoder: Encoder,
    generate: Generator,
    count: int,
    width: int = FFN,
    layers: Sequence[int] = ALL_LAYERS,
    rounded: bool = False,
) -> float:
    """Share of held-out examples whose last answer greedy decoding would give exactly.

    Greedy decoding gives the answer if and only if every token of it is the likeliest one after those before.
    """
    rng = random.Random("held out")
    sequences = [encoder.sequence(generate(rng, True)) for _ in range(count)]
    right = total = 0
    with torch.no_grad():
        weights = prepared(network, width, rounded)
        for start in range(0, count, 32):
            rows = pack(sequences[start : start + 32], 256).to(network.device)
            logits = functional_call(network, weights, (rows, layers))
            asked = rows.targets >= 0
            hit = torch.ones_like(asked)
            hit[asked] = logits.argmax(-1) == rows.targets[asked]
            for row in range(len(rows.ids)):
                for number in range(int(rows.sequences[row].max()) + 1):
                    places = torch.nonzero(asked[row] & (rows.sequences[row] == number)).flatten().tolist()
                    last = [place for place in places if set(range(place, places[-1])) <= set(places)]
                    right += bool(hit[row, last].all())
                    total += 1
    return right / total


def parsed(skills: Sequence[str]) -> dict[str, float]:
    """`sums=2 lists` as weights."""
    pairs = (entry.partition("=") for entry in skills)
    return {name: float(weight or 1) for name, _, weight in pairs}


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Gives all processes the mean of their gradients."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def train(arguments: argparse.Namespace, generators: Mapping[str, Generator]) -> None:
    """The loop."""
    torch.manual_seed(arguments.seed)
    network = Network(arguments.folder, arguments.device)
    encoder = Encoder(arguments.folder, network.config)
    for path in arguments.take:
        take(torch.load(path, weights_only=True, map_location="cpu")["parameters"], network)
    for prefix in arguments.freeze:
        for name, parameter in network.named_parameters():
            if name.startswith(prefix):
                parameter.requires_grad_(False)
    optimizers = made_optimizers(network)
    step = load(arguments.state, network, optimizers) if arguments.state.exists() else 0
    weights = parsed(arguments.skills)
    trained = [p for p in network.parameters() if p.requires_grad]
    rank, world = distributed.get_rank(), distributed.get_world_size()
    began, losses = time.time(), list[float]()
    while step < arguments.steps:
        rng = random.Random(f"{arguments.seed} {step} {rank}")
        share = mixture(weights, generators, arguments.examples // world, rng)
        rows = pack([encoder.sequence(example) for example in share], ROW).to(network.device)
        width, layers = drawn_slice(random.Random(f"{arguments.seed} {step}"))
        logits = functional_call(network, prepared(network, width, arguments.rounded), (rows, layers))
        loss = F.cross_entropy(logits, rows.targets[rows.targets >= 0])
        network.zero_grad()
        loss.backward()
        average_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments.steps, arguments.lr) * group["scale"]
            optimizer.step()
        step += 1
        if width == FFN and layers == ALL_LAYERS:
            losses.append(loss.item())
        if step % arguments.log_every == 0 or step == arguments.steps:
            entry = {
                "step": step,
                "seconds": round(time.time() - began),
                "loss": round(sum(losses) / max(1, len(losses)), 4),
            }
            losses.clear()
            if step % (arguments.log_every * 5) == 0 or step == arguments.steps:
                shares: list[dict[str, float]] = [{}] * world
                mine = {
                    name: round(accuracy(network, encoder, generators[name], arguments.held_out), 3)
                    for name in list(weights)[rank::world]
                }
                distributed.all_gather_object(shares, mine)
                right = {name: value for share in shares for name, value in share.items()}
                entry |= {name: right[name] for name in weights}
                save(arguments.state, network, optimizers, step, write=rank == 0)
            if rank == 0:
                with arguments.record.open("a") as log:
                    log.write(json.dumps(entry) + "\n")


def main() -> None:
    """Reads the flags and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="as start.py writes it")
    parser.add_argument("--state", type=Path, required=True, help="is written every few minutes, and resumed from")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--speech", type=Path, default=Path("speech"), help="as speech.py writes it")
    parser.add_argument("--skills", nargs="+", required=True, help="names with weights, as sums=2")
    parser.add_argument("--take", type=Path, nargs="*", default=[], help="states of other stages to begin with")
    parser.add_argument("--freeze", nargs="*", default=[], help="parameters to leave alone, by how their names begin")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--examples", type=int, default=48, help="a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rounded", action="store_true", help="train with weights rounded to 4 bit")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--held-out", type=int, default=64, help="examples a skill in the log")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for one process on a GPU")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("g3n_mlx").setLevel(logging.ERROR)  # sounds that take several clips are no news here
    alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": distributed.HashStore()}
    distributed.init_process_group("gloo", **alone)
    train(arguments, all_skills(arguments.speech))


if __name__ == "__main__":
    main()

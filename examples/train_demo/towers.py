"""Trains one tower and its embedder alone, with a cheap head on its soft tokens.

    python towers.py vision START_FOLDER --state vision.pt --log vision.jsonl --steps 3000
    python towers.py audio START_FOLDER --state audio.pt --log audio.jsonl --speech speech --steps 3000

Vision: every soft token tells which things have their centre in its cell, how large and where they are; the letters of
a sign stand in the columns of the grid, by CTC. Audio: the words of an utterance by CTC, four places a soft token. The
heads are thrown away; what remains is a code that the language model learns to read quickly.
"""

import argparse
import json
import random
import string
import time
from pathlib import Path

import numpy as np
import torch
from network import Network
from optimizers import made_optimizers
from packing import Encoder, padded
from pictures import COLOURS, SHAPES, Thing, draw_scene, draw_sign, scene, sign_text
from sounds import a_tone, recorded, some_beeps, speech
from speech import COMMANDS, RATE
from state import load, save, take
from torch import Tensor, nn
from torch.nn import functional as F

from g3n_mlx.media.audio import Audio
from g3n_mlx.media.image import Image

GRID = 3
NAMES = {f"{colour} {shape}": place for place, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES)}
LETTERS = "\0" + string.digits + string.ascii_letters  # the first is CTC's blank
PLACES = 4  # of CTC in a soft token of sound, or a column of a picture
WORDS = sorted({word for command in COMMANDS for word in command.split()} | {*COLOURS, *SHAPES, *string.digits}
               | {"high", "low", "rising", "falling", "beep"})  # fmt: skip


class VisionHead(nn.Module):
    """Reads soft tokens of pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.things = nn.Linear(width, len(NAMES) * 4)
        self.letters = nn.Linear(width, PLACES * len(LETTERS))
        with torch.no_grad():
            self.things.bias[::4] = -5.0  # a cell holds hardly any of the names

    def forward(self, soft: Tensor) -> tuple[Tensor, Tensor]:
        """[n, cells, D] -> things [n, cells, names, 4], log-probabilities of letters [n, columns * PLACES, letters]."""
        letters = self.letters(soft).unflatten(1, (GRID, GRID)).sum(1)  # whichever row the text is in
        return (
            self.things(soft).unflatten(-1, (-1, 4)),
            letters.unflatten(-1, (PLACES, -1)).flatten(1, 2).log_softmax(-1),
        )


def cell_targets(things: list[Thing]) -> np.ndarray:
    """[cells, names, 4]: present, large, and the place inside the cell, all from 0 to 1."""
    target = np.zeros((GRID * GRID, len(NAMES), 4), np.float32)
    for thing in things:
        column, row = int(thing.x * GRID), int(thing.y * GRID)
        inside = thing.x * GRID - column, thing.y * GRID - row
        target[row * GRID + column, NAMES[thing.name]] = 1, thing.size == "large", *inside
    return target


def ctc(scores: Tensor, lengths: Tensor, spelled: list[list[int]]) -> tuple[Tensor, Tensor]:
    """CTC's loss [] of log-probabilities [n, T, classes], and the share of sequences that the likeliest path spells."""
    loss = F.ctc_loss(
        scores.transpose(0, 1),
        torch.tensor([index for indices in spelled for index in indices], device=scores.device),
        lengths,
        torch.tensor([len(indices) for indices in spelled], device=scores.device),
        zero_infinity=True,
    )
    right = 0
    for row, wanted in enumerate(spelled):
        path = scores[row, : int(lengths[row])].argmax(-1).tolist()
        right += wanted == [
            index for place, index in enumerate(path) if index and (place == 0 or path[place - 1] != index)
        ]
    return loss, torch.tensor(right / len(spelled))


def see(network: Network, encoder: Encoder, head: VisionHead, rng: random.Random, count: int, held_out: bool) -> tuple:
    """The loss of a batch, half scenes and half signs; and the shares that are wholly right of each."""
    scenes = [scene(rng, held_out) for _ in range(count // 2)]
    texts = [sign_text(rng) for _ in range(count // 2)]
    drawn = [draw_scene(rng, things) for things in scenes] + [draw_sign(rng, text, held_out) for text in texts]
    pictures = [encoder.opener.open(Image(p), encoder.policy)[0].values() for p in drawn]
    soft = network.pictured(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(network.device))
    found, letters = head(soft)
    found, letters = found[: len(scenes)], letters[len(scenes) :]
    cells = torch.from_numpy(np.stack([cell_targets(things) for things in scenes])).to(network.device)
    present = cells[..., 0] > 0
    loss_present = F.binary_cross_entropy_with_logits(found[..., 0], cells[..., 0], reduction="none").sum((1, 2)).mean()
    loss_large = F.binary_cross_entropy_with_logits(found[..., 1][present], cells[..., 1][present])
    loss_place = (found[..., 2:][present] - cells[..., 2:][present]).abs().mean()
    spelled = [[LETTERS.index(letter) for letter in text] for text in texts]
    loss_letters, right_signs = ctc(letters, torch.full((len(texts),), GRID * PLACES, device=letters.device), spelled)
    right_scenes = ((found[..., 0] > 0) == present).flatten(1).all(1).float().mean()
    return loss_present + loss_large + 3 * loss_place + 3 * loss_letters, right_scenes, right_signs


class AudioHead(nn.Module):
    """Words by CTC from soft tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Linear(width, PLACES * (len(WORDS) + 1))

    def forward(self, soft: Tensor) -> Tensor:
        """[n, T, D] -> log-probabilities [n, T * PLACES, words + 1]."""
        return self.words(soft).unflatten(-1, (PLACES, -1)).flatten(1, 2).log_softmax(-1)


def utterance(rng: random.Random, folder: Path, held_out: bool) -> tuple[list[str], np.ndarray]:
    """The words of something to hear, and its waveform."""
    kind = rng.choices(("digits", "command", "shape", "tone", "beeps"), (5, 1.5, 2, 1, 1))[0]
    if kind == "tone":
        word, wave = a_tone(rng)
        return [word], wave
    if kind == "beeps":
        number, wave = some_beeps(rng)
        return ["beep"] * number, wave
    text, wave = speech(folder, held_out).draw(rng, kind)
    return text.split(), wave


def hear(
    network: Network, encoder: Encoder, head: AudioHead, rng: random.Random, count: int, held_out: bool, folder: Path
) -> tuple:
    """The CTC loss of a batch, and the share of utterances that are wholly right."""
    pairs = [utterance(rng, folder, held_out) for _ in range(count)]
    features = []
    for _, wave in pairs:
        features += encoder.opener.open(Audio(recorded(rng, wave), RATE), encoder.policy)
    clips, mask = (part.to(network.device) for part in padded(features))
    encodings, valid = network.audio_tower(clips, mask)
    scores = head(network.embed_audio.soft(encodings))
    return ctc(scores, valid.sum(1) * PLACES, [[WORDS.index(word) + 1 for word in words] for words, _ in pairs])


class Stage(nn.Module):
    """What is trained: one tower, its embedder, the head."""

    def __init__(self, network: Network, kind: str) -> None:
        super().__init__()
        width = network.config.text.hidden_size
        if kind == "vision":
            self.vision_tower, self.embed_vision, self.head = (
                network.vision_tower,
                network.embed_vision,
                VisionHead(width),
            )
        else:
            self.audio_tower, self.embed_audio, self.head = network.audio_tower, network.embed_audio, AudioHead(width)


def main() -> None:
    """Reads the flags and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("vision", "audio"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--speech", type=Path, default=Path("speech"))
    parser.add_argument("--take", type=Path, help="state of another stage to begin with")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(flags.seed)
    network = Network(flags.folder, flags.device)
    encoder = Encoder(flags.folder, network.config)
    stage = Stage(network, flags.kind).to(network.device)
    optimizers = made_optimizers(stage)
    if flags.take:
        take(torch.load(flags.take, weights_only=True, map_location="cpu")["parameters"], network)
    step = load(flags.state, stage, optimizers) if flags.state.exists() else 0

    def passed(rng: random.Random, count: int, held_out: bool) -> tuple:
        if flags.kind == "vision":
            return see(network, encoder, stage.head, rng, count, held_out)
        return hear(network, encoder, stage.head, rng, count, held_out, flags.speech)

    began, sums = time.time(), np.zeros(3)
    while step < flags.steps:
        loss, *shares = passed(random.Random(f"{flags.seed} {step}"), flags.examples, held_out=False)
        stage.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = flags.lr * group["scale"] * min((step + 1) / 100, 1.0, 3 * (1 - step / flags.steps))
            optimizer.step()
        step += 1
        sums[: 1 + len(shares)] += [loss.item(), *(share.item() for share in shares)]
        if step % 100 == 0 or step == flags.steps:
            with torch.no_grad():
                _, *held = passed(random.Random("held out"), 100, held_out=True)
            entry = {"step": step, "seconds": round(time.time() - began), "train": (sums / 100).round(3).tolist(),
                     "held_out": [round(share.item(), 3) for share in held]}  # fmt: skip
            sums[:] = 0
            save(flags.state, stage, optimizers, step)
            with flags.log.open("a") as log:
                log.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()

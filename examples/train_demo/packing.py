"""Examples to packed rows: the ids that use would read, the targets in the model's turns, the media beside them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from network import Rows
from skill import Example

from g3n_mlx.config.model import ModelConfig
from g3n_mlx.media.audio_features import AudioFeatures
from g3n_mlx.media.image import ImageFeatures
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.media.part import Media
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.prompt.prompt import Prompt, encode
from g3n_mlx.prompt.template import render
from g3n_mlx.prompt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as the network reads it."""

    ids: list[int]
    targets: list[int]  # the id that should follow; -1 where the user speaks
    pictures: list[np.ndarray]  # float32 [h, w, 3]
    clips: list[AudioFeatures]


class Encoder:
    """Turns examples into sequences, with the code that prompts go through in use."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        self.opener = MediaOpener(folder, config)
        self.policy = MediaPolicy()
        self.header = [self.tokenizer.id_of("<start_of_turn>"), *self.tokenizer.encode("model\n")]

    def prompt(self, example: Example) -> Prompt:
        """The whole conversation, as use would read it."""
        pieces: list[Any] = []
        for piece in render(example.messages, add_generation_prompt=False):
            pieces += self.opener.open(piece.source(), self.policy) if isinstance(piece, Media) else [piece]
        return encode(pieces, self.tokenizer, self.opener.soft_tokens)

    def sequence(self, example: Example) -> Encoded:
        """The whole conversation, with what the model should say."""
        prompt = self.prompt(example)
        ids = list(prompt.token_ids)
        features = [span.features for span in prompt.media]
        return Encoded(
            ids,
            self.targets(ids),
            [entry.values() for entry in features if isinstance(entry, ImageFeatures)],
            [entry for entry in features if isinstance(entry, AudioFeatures)],
        )

    def targets(self, ids: Sequence[int]) -> list[int]:
        """What follows each id, inside the model's turns up to their end."""
        targets = [-1] * len(ids)
        width, speaking = len(self.header), False
        for place in range(len(ids) - 1):
            if list(ids[place - width + 1 : place + 1]) == self.header:
                speaking = True
            if speaking:
                targets[place] = ids[place + 1]
                speaking = ids[place + 1] != self.tokenizer.id_of("<end_of_turn>")
        return targets


def pack(sequences: Sequence[Encoded], length: int) -> Rows:
    """Rows of `length` places, filled with whole sequences, each in the first with room; longer ones are left out."""
    rows: list[list[Encoded]] = []
    free: list[int] = []
    for sequence in sequences:
        needed = len(sequence.ids)
        if needed > length:
            continue
        row = next((row for row, room in enumerate(free) if room >= needed), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(length)
        rows[row].append(sequence)
        free[row] -= needed
    ids, targets = (np.full((len(rows), length), fill) for fill in (0, -1))
    numbers = np.full((len(rows), length), -1)
    for row, packed in enumerate(rows):
        start = 0
        for number, sequence in enumerate(packed):
            stop = start + len(sequence.ids)
            ids[row, start:stop], targets[row, start:stop], numbers[row, start:stop] = (
                sequence.ids, sequence.targets, number,
            )  # fmt: skip
            start = stop
    kept = [sequence for packed in rows for sequence in packed]
    pictures = [picture for sequence in kept for picture in sequence.pictures]
    clips = [clip for sequence in kept for clip in sequence.clips]
    return Rows(
        *(torch.from_numpy(array) for array in (ids, numbers, targets)),
        torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) if pictures else None,
        *padded(clips),
    )


def padded(clips: Sequence[AudioFeatures]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Clips [n, T, mel] padded with silence, and their mask [n, T]."""
    if not clips:
        return None, None
    longest = -(-max(len(clip.frames) for clip in clips) // 16) * 16
    frames = np.zeros((len(clips), longest, clips[0].frames.shape[1]), np.float32)
    mask = np.zeros((len(clips), longest), bool)
    for row, clip in enumerate(clips):
        frames[row, : len(clip.frames)], mask[row, : len(clip.frames)] = clip.frames, clip.mask
    return torch.from_numpy(frames), torch.from_numpy(mask)


def mixture(
    weights: Mapping[str, float], generators: Mapping[str, Any], count: int, rng: random.Random
) -> list[Example]:
    """Fresh examples, skills drawn by their weights."""
    names = rng.choices(list(weights), list(weights.values()), k=count)
    return [generators[name](rng, False) for name in names]

"""The seam: what the core asks of a backend, as calls of the whole model.

Ints, numpy arrays, opaque caches, samplers, soft tokens and steps cross it, nothing else. `prefill` and `decode`
return a Step at once; `int(step)` waits for its token. So a backend may start on the next token before the last one is
known.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from g3n_mlx.sampling import SamplingParams


class Step(Protocol):
    """One drawn token, perhaps still being computed on the device."""

    def __int__(self) -> int:
        """The token id; waits for it."""
        ...

    def logprob(self) -> float:
        """Natural log of the token's probability before penalties and filters."""
        ...

    def top_logprobs(self, count: int) -> list[tuple[int, float]]:
        """The `count` most likely (token id, log probability), best first, ties by id."""
        ...


class SoftTokens(Protocol):
    """Rows [n, D] on the device that stand for a picture or a sound in the text model."""

    def __len__(self) -> int:
        """How many rows."""
        ...

    def __getitem__(self, rows: slice, /) -> "SoftTokens":
        """Some of the rows."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes they take."""
        ...


Soft = Sequence[tuple[int, SoftTokens]]  # where among a call's ids soft tokens begin, and they themselves


class Snapshot(Protocol):
    """What a cache needs to come back to an offset."""

    @property
    def nbytes(self) -> int:
        """Bytes of the copied rows."""
        ...


class Cache(Protocol):
    """Keys and values of one sequence, for every layer that owns some."""

    @property
    def offset(self) -> int:
        """Tokens the cache has seen: the position of the next one."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        ...

    def nbytes_at(self, tokens: int) -> int:
        """Bytes allocated once it holds so many tokens; one must have been seen, for its size."""
        ...

    def snapshot(self) -> Snapshot:
        """A copy of what later tokens overwrite (the sliding windows), to come back to this offset."""
        ...

    def restore(self, snapshot: Snapshot, back: int = 0) -> None:
        """Back to the offset of a snapshot taken of this cache, less `back`, which is 0 or 1.

        The tokens before it must be the same ones.
        """
        ...

    def fork(self, snapshot: Snapshot, back: int = 0) -> "Cache":
        """A cache of its own where `restore` would take this one, which stays as it is."""
        ...


class Sampler(Protocol):
    """Draws the tokens of one answer; keeps its penalties' counts and its stream of uniform numbers."""


class Model(Protocol):
    """A loaded model of one backend. One sequence a call."""

    def make_cache(self) -> Cache:
        """An empty cache."""
        ...

    def make_sampler(self, params: SamplingParams, prompt_ids: Sequence[int]) -> Sampler:
        """A sampler for one answer; the prompt's ids count for the repetition penalty."""
        ...

    def prefill(
        self,
        token_ids: np.ndarray,
        cache: Cache,
        sampler: Sampler | None,
        soft: Soft = (),
        mask: np.ndarray | None = None,
    ) -> Step | None:
        """Appends [T] ids to the cache; with a sampler, draws the token that follows the last of them.

        Soft tokens replace the embeddings of the ids they cover. mask: bool [V], the tokens that may be drawn.
        Without a sampler the layers that share keys and values are skipped: they leave nothing in the cache.
        """
        ...

    def decode(self, step: Step, cache: Cache, sampler: Sampler, mask: np.ndarray | None = None) -> Step:
        """Appends the step's token to the cache and draws the next one, of those that the mask lets through."""
        ...

    def logits(self, token_ids: np.ndarray, cache: Cache, soft: Soft = ()) -> np.ndarray:
        """Appends [T] ids to the cache; returns every row's logits, float32 [T, V]."""
        ...

    def embed_image(self, pixels: np.ndarray) -> SoftTokens:
        """The soft tokens of an image [h, w, 3] float32; the vision tower is read at the first one."""
        ...

    def embed_audio(self, frames: np.ndarray, mask: np.ndarray) -> SoftTokens:
        """The soft tokens of a clip: log-mel frames [T, mel] float32, of which the mask [T] says which are real.

        Always the config's count; what the clip leaves over is the embedding of the vocabulary's last id.
        """
        ...

    def rows(self, soft_tokens: SoftTokens) -> np.ndarray:
        """Soft tokens as float32 [n, D]."""
        ...

    def drop_towers(self) -> None:
        """Frees the vision and the audio tower; the next image or clip reads them again."""
        ...

    def close(self) -> None:
        """Frees all weights; no call may follow."""
        ...

    def peak_memory_bytes(self) -> int:
        """Most memory held on the model's device so far; 0 where the process's own memory is all there is."""
        ...

"""The seam: what the core asks of a backend, as calls of the whole model.

One call takes rows of several sequences, flat behind each other (rows.py): the weights are read once for all of them.
Ints and numpy arrays cross the seam, and arrays of the backend that the core only hands on: logits, steps, soft tokens,
rows of a KV cache. Calls return at once; `int(step)` waits for the token. So a backend may start on the next call
before the last token is known. All calls come from one thread (engine/runner.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from g3n_mlx.checkpoint.folder import Changes, Checkpoint
from g3n_mlx.matformer.plan import SlicePlan
from g3n_mlx.rows import Batch, Cache, Sampler, SoftTokens
from g3n_mlx.sampling import SamplingParams

# Tokens that a cache can forget at any time: longer than a draft of tokens is worth.
MAX_TRIM_TOKENS = 64
# Images or clips that a GPU encodes in a call: enough to fill a large one with one image's smallest maps (24 x 24), and
# not so many that others wait long. Not measured.
MEDIA_TOGETHER = 4


class KVArrays(Protocol):
    """What a KV cache asks of an array framework (engine/cache.py); arrays are [1, K, S, H]."""

    def grown(self, old: Any | None, like: Any, used: int, rows: int, /) -> Any:
        """An array of `rows` rows shaped as `like`, beginning with the `used` rows of the old one."""
        ...

    def joined(self, first: Any, second: Any, /) -> Any:
        """Rows behind rows."""
        ...

    def copied(self, rows: Any, start: int, end: int, /) -> Any:
        """Rows [start, end) in memory of their own, once they are evaluated."""
        ...

    def evaluate(self, arrays: Sequence[Any], /) -> None:
        """Computes what an array framework may have put off, of all the arrays at once."""
        ...


class Model(Protocol):
    """A loaded model of one backend."""

    @property
    def kv_arrays(self) -> KVArrays:
        """What the KV caches of the sequences are made of."""
        ...

    def slice(self, checkpoint: Checkpoint, plan: SlicePlan) -> "Model":
        """The slice that a plan for this model takes from it, over the same weights, which live as long as either does.

        checkpoint: the model's own, viewed through the plan; the slice reads from it what can't be shared.
        """
        ...

    def adapted(self, checkpoint: Checkpoint, changes: Changes) -> "Model":
        """The same model with an adapter, over the same weights, which live as long as either does.

        checkpoint: the model's own with the changes; dense weights of the text model have theirs beside them.
        """
        ...

    def second_moments(
        self, batch: Batch, paths: Sequence[str], block_width: int, found: Callable[[str, list[np.ndarray]], None]
    ) -> None:
        """Runs the layers over a batch whose rows are all kept, without logits.

        paths: linear layers. found: takes the path of each of them and, for blocks of its weight's columns K, the sums
        of x x^T over the rows that it multiplied, float32 [k, k], as soon as it multiplied them.
        """
        ...

    def make_sampler(self, params: SamplingParams, prompt_ids: Sequence[int]) -> Sampler:
        """A sampler for one answer; the prompt's ids count for the repetition penalty."""
        ...

    def has_finite_head(self) -> bool:
        """Whether the weights behind the last layer are finite; later on the soft cap hides an infinity there."""
        ...

    def __call__(self, batch: Batch, /) -> Any:
        """Appends a Batch to the caches of its sequences; logits [R, V] of the rows that are kept, None where R is 0.

        Soft tokens replace the embeddings of the ids they cover. Each sequence gets the logits that it would get alone.
        """
        ...

    def begin_next(self, steps: Sequence[Any], caches: Sequence[Cache]) -> None:
        """Allows the backend to start on the decode step that appends the tokens of these steps to the caches."""
        ...

    def numpy(self, array: Any) -> np.ndarray:
        """Logits or soft tokens on the host, float32."""
        ...

    @property
    def media_together(self) -> int:
        """How many images or clips are worth encoding in a call."""
        ...

    def embed_images(self, pixels: np.ndarray) -> Sequence[SoftTokens]:
        """The soft tokens of each of some images [B, h, w, 3] float32; the vision tower is read at the first ones."""
        ...

    def embed_audio(self, frames: np.ndarray, mask: np.ndarray) -> Sequence[SoftTokens]:
        """The soft tokens of each of some clips: log-mel frames [B, T, mel] float32, of which the mask [B, T] says
        which are real.

        Always the config's count; what the clip leaves over is the embedding of the audio range's last id.
        """
        ...

    def drop_towers(self) -> None:
        """Frees the vision and the audio tower; the next image or clip reads them again."""
        ...

    def close(self) -> None:
        """Frees all weights but those that another slice shares; no call may follow."""
        ...

    def peak_memory_bytes(self) -> int:
        """Most memory held on the model's device so far; 0 where the process's own memory is all there is."""
        ...

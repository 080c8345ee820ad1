"""Images and clips as soft tokens, each encoded once."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from g3n_mlx.engine.runner import Runner
from g3n_mlx.media.image import ImageFeatures
from g3n_mlx.prompt.prompt import Features
from g3n_mlx.rows import SoftTokens

# Soft tokens kept for the next turns: an image's are 1 MiB at E4B's width, so 256 images or clips.
KEPT_SOFT_TOKENS_BYTES = 256 << 20


class EmbeddedMedia:
    """Features to soft tokens, each image or clip once: those used last are kept, found by their content."""

    def __init__(self, runner: Runner, kept: OrderedDict[bytes, SoftTokens] | None = None) -> None:
        """kept: what another model with the same towers has encoded, and will."""
        self._runner = runner
        self._kept: OrderedDict[bytes, SoftTokens] = OrderedDict() if kept is None else kept

    def shared_with(self, runner: Runner) -> "EmbeddedMedia":
        """The same for a slice of the model."""
        return EmbeddedMedia(runner, self._kept)

    def __call__(self, features: Features, later: Sequence[Features] = ()) -> SoftTokens:
        """The soft tokens of an image or a clip.

        later: what is likely to be asked for next, of which as many are encoded in the same call as the model likes.
        """
        if features.digest in self._kept:
            self._kept.move_to_end(features.digest)
            return self._kept[features.digest]
        together = {features.digest: features}
        for other in later:
            if len(together) == self._runner.model.media_together:
                break
            if other.digest not in self._kept and _shape(other) == _shape(features):
                together[other.digest] = other
        encoded = dict(zip(together, self._encoded(list(together.values())), strict=True))
        for digest in reversed(encoded):  # the one that was asked for is the last to be forgotten
            self._kept[digest] = encoded[digest]
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT_SOFT_TOKENS_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return encoded[features.digest]

    def _encoded(self, together: Sequence[Features]) -> Sequence[SoftTokens]:
        model = self._runner.model
        if images := [one for one in together if isinstance(one, ImageFeatures)]:
            return model.embed_images(np.stack([image.values() for image in images]))
        clips = [one for one in together if not isinstance(one, ImageFeatures)]
        return model.embed_audio(np.stack([clip.frames for clip in clips]), np.stack([clip.mask for clip in clips]))

    def clear(self) -> None:
        """Forgets all of them, for whoever shares them too."""
        self._kept.clear()

    def leave(self) -> None:
        """Lets go of them: they are forgotten where nobody shares them."""
        self._kept = OrderedDict()


def _shape(features: Features) -> tuple[str, tuple[int, ...]]:
    """What media that share a call have in common."""
    values = features.pixels if isinstance(features, ImageFeatures) else features.frames
    return features.kind, values.shape

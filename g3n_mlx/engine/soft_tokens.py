"""Images and clips as soft tokens, each encoded once."""

from collections import OrderedDict

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

    def __call__(self, features: Features) -> SoftTokens:
        """The soft tokens of an image or a clip."""
        if features.digest in self._kept:
            self._kept.move_to_end(features.digest)
            return self._kept[features.digest]
        if isinstance(features, ImageFeatures):
            soft = self._runner.model.embed_image(features.values())
        else:
            soft = self._runner.model.embed_audio(features.frames, features.mask)
        self._kept[features.digest] = soft
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT_SOFT_TOKENS_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return soft

    def clear(self) -> None:
        """Forgets all of them, for whoever shares them too."""
        self._kept.clear()

    def leave(self) -> None:
        """Lets go of them: they are forgotten where nobody shares them."""
        self._kept = OrderedDict()

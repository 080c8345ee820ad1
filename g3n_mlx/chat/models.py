"""The model of a chat, and another one in its place."""

import argparse
from typing import TYPE_CHECKING

from g3n_mlx.chat.waiting import Waiting
from g3n_mlx.commands import load_from, model_of

if TYPE_CHECKING:
    from g3n_mlx.chat.slices import Sizes
    from g3n_mlx.model import Gemma3n


class Models:
    """Loads models as the flags of a chat say."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments

    def load(self) -> "Gemma3n":
        """The model of the flags; raises as `load` does."""
        with Waiting("loading the model"):
            self._arguments.model = model_of(self._arguments)
            return load_from(self._arguments, slices_later=True)

    def other(self, name: str, sizes: "Sizes") -> "Sizes":
        """The sizes of another model, in the place of those there are, whose memory is freed before it is loaded.

        Slice, bits and adapters that flags have named are not asked of it. Raises as `load` does, for a name that is
        none before anything is freed; what could not be loaded after that leaves the old model loaded anew.
        """
        from g3n_mlx.chat.slices import Sizes
        from g3n_mlx.sizing import outline_of

        with Waiting(f"looking at {name}"):
            outline_of(name, None)
        before = self._arguments
        sizes.close()
        self._arguments = argparse.Namespace(
            **{**vars(before), "model": name, "matformer": None, "q_bits": None, "adapter": []}
        )
        try:
            return Sizes(self.load(), before.matformer_config)
        except BaseException:
            self._arguments = before
            sizes.reopen(self.load())
            raise

"""Gemma 3n in MLX and PyTorch: one core, two mirrored backends.

The public names are imported when they are first used, so that `import g3n_mlx` costs nothing
and needs no array framework.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from g3n_mlx.engine.sampling import SamplingParams
    from g3n_mlx.load import load
    from g3n_mlx.media.audio import Audio
    from g3n_mlx.media.image import Image
    from g3n_mlx.media.video import Video
    from g3n_mlx.model import Gemma3n

    __version__: str

__all__ = ["Audio", "Gemma3n", "Image", "SamplingParams", "Video", "__version__", "load"]

_HOMES = {
    "Audio": "g3n_mlx.media.audio",
    "Gemma3n": "g3n_mlx.model",
    "Image": "g3n_mlx.media.image",
    "SamplingParams": "g3n_mlx.engine.sampling",
    "Video": "g3n_mlx.media.video",
    "load": "g3n_mlx.load",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("g3n-mlx")
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'g3n_mlx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """This package's own class: `g3n_mlx.load` stays the function, whoever imports the file of that name first."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule as an attribute of its package once it is imported.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

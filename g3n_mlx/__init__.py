"""Gemma 3n in MLX and PyTorch: one core, two mirrored backends.

The public names are imported when they are first used, so that `import g3n_mlx` costs nothing
and needs no array framework.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from g3n_mlx.engine.results import Chunk, Result, Usage
    from g3n_mlx.failures import Error
    from g3n_mlx.loading import load
    from g3n_mlx.media.audio import Audio
    from g3n_mlx.media.image import Image
    from g3n_mlx.media.video import Video
    from g3n_mlx.model import Gemma3n
    from g3n_mlx.prompt.prompt import PromptTooLong
    from g3n_mlx.sampling import SamplingParams

    __version__: str

__all__ = [
    "Audio",
    "Chunk",
    "Error",
    "Gemma3n",
    "Image",
    "PromptTooLong",
    "Result",
    "SamplingParams",
    "Usage",
    "Video",
    "__version__",
    "load",
]

_HOMES = {
    "Audio": "g3n_mlx.media.audio",
    "Chunk": "g3n_mlx.engine.results",
    "Error": "g3n_mlx.failures",
    "Gemma3n": "g3n_mlx.model",
    "Image": "g3n_mlx.media.image",
    "PromptTooLong": "g3n_mlx.prompt.prompt",
    "Result": "g3n_mlx.engine.results",
    "SamplingParams": "g3n_mlx.sampling",
    "Usage": "g3n_mlx.engine.results",
    "Video": "g3n_mlx.media.video",
    "load": "g3n_mlx.loading",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from g3n_mlx.installation import version

        return version()
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'g3n_mlx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""A plugin of simonw's `llm`: `llm -m g3n-demo "What is 12 + 34?" -a picture.png`, streamed, also with a schema.

`llm` imports this module at every start, so the model's packages are imported when a prompt comes.
Source: llm.datasette.io, plugins/advanced-model-plugins.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm
from llm.parts import AttachmentPart, TextPart

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

IMAGES = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "heic", "heif", "avif")
AUDIO = ("wav", "x-wav", "wave", "vnd.wave", "flac", "x-flac", "ogg", "opus", "mpeg", "mp3", "mp4", "m4a", "aac")
VIDEO = ("mp4", "webm", "quicktime", "x-matroska", "mpeg")
KINDS = {
    **{f"image/{name}": "image" for name in IMAGES},
    **{f"audio/{name}": "audio" for name in AUDIO},
    "application/ogg": "audio",
    **{f"video/{name}": "video" for name in VIDEO},
}


@llm.hookimpl
def register_models(register: Any) -> None:
    """`g3n-demo`, the embedded model, and `g3n`: the one that the option `model` names, or the newest Gemma 3n here."""
    register(G3n("g3n-demo", "demo"))
    register(G3n("g3n", None))


class G3n(llm.Model):
    """A Gemma 3n in this process, loaded at the first prompt."""

    can_stream = True
    supports_schema = True
    attachment_types = frozenset(KINDS)

    class Options(llm.Options):  # pyright: ignore[reportIncompatibleVariableOverride]
        """How an answer is drawn, and which model is loaded."""

        temperature: float | None = None
        top_p: float | None = None
        top_k: int | None = None
        seed: int | None = None
        max_tokens: int | None = None
        model: str | None = None  # folder or hub id
        matformer: str | None = None  # slice
        q_bits: int | None = None

    def __init__(self, model_id: str, source: str | None) -> None:
        self.model_id, self._source = model_id, source

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """The answer as it comes; usage is set at its end. What a schema does not list is not made up."""
        from g3n_mlx.engine.schemas import closed

        options = prompt.options.model_dump(exclude_none=True)
        loading = {name: options.pop(name, None) for name in ("model", "matformer", "q_bits")}
        model = _loaded(loading["model"] or self._source, loading["matformer"], loading["q_bits"])
        schema = closed(prompt.schema) if prompt.schema else None
        for chunk in model.stream(_messages(prompt), schema=schema, **options):
            yield chunk.text
            if chunk.usage is not None:
                response.set_usage(input=chunk.usage.prompt_tokens, output=chunk.usage.completion_tokens)


@cache
def _loaded(source: str | None, matformer: str | None, q_bits: int | None) -> "Gemma3n":
    from g3n_mlx import load
    from g3n_mlx.checkpoint.hub import default_model

    return load(default_model()[0] if source is None else source, matformer=matformer, q_bits=q_bits)


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """The conversation so far, as `Gemma3n.stream` takes it."""
    return [
        {"role": message.role, "content": [part for given in message.parts for part in _parts(given)]}
        for message in prompt.messages
    ]


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, TextPart):
        yield {"type": "text", "text": part.text}
    elif isinstance(part, AttachmentPart):
        attachment = part.attachment
        assert attachment is not None
        kind = KINDS[attachment.resolve_type() or ""]
        source = Path(attachment.path) if attachment.path else attachment.url or attachment.content
        yield {"type": kind, kind: source}

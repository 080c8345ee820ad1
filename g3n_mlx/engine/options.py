"""The options of one answer beside its prompt: how it is sampled, what it must look like, the media before the text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from g3n_mlx.engine.answer import Progress
from g3n_mlx.engine.drafts import Mode
from g3n_mlx.engine.grammar import Grammars
from g3n_mlx.engine.schemas import closed
from g3n_mlx.engine.sequence import Constraint
from g3n_mlx.failures import BadValue
from g3n_mlx.media.audio import Audio
from g3n_mlx.media.image import Image
from g3n_mlx.media.video import Video
from g3n_mlx.sampling import SamplingOptions

if TYPE_CHECKING:
    from PIL import Image as pil


class PydanticModel(Protocol):
    """What is asked of a pydantic model class, so that pydantic itself need not be installed."""

    def model_json_schema(self) -> dict[str, Any]:
        """The JSON schema of the class."""
        ...

    def model_validate_json(self, json_data: str, /) -> Any:
        """The object that a JSON text describes; raises ValueError when it describes none."""
        ...


Schema: TypeAlias = PydanticModel | Mapping[str, Any]
ImageSource: TypeAlias = "Image | pil.Image | str | Path | bytes | np.ndarray"
AudioSource: TypeAlias = Audio | str | Path | bytes
VideoSource: TypeAlias = Video | str | Path | bytes


class AnswerOptions(SamplingOptions, total=False):
    """Keywords of `Gemma3n.generate` and `stream`; None is the same as not given.

    Of `schema`, `regex`, `lark` and `constraint` at most one; media only beside a prompt that is a string.
    """

    schema: Schema | None  # a pydantic model class, or a JSON schema
    regex: str | None  # that the whole answer matches, in the syntax of Rust's regex crate
    lark: str | None  # a grammar in llguidance's dialect of Lark
    constraint: Constraint | None  # any other rule; good for one answer
    images: "ImageSource | Sequence[ImageSource] | None"  # a list or tuple is several, in order
    audio: AudioSource | Sequence[AudioSource] | None
    videos: VideoSource | Sequence[VideoSource] | None
    draft: Mode | str | None  # how tokens are drafted, which changes no text: a mode or a slice (engine/drafts.py)
    progress: Progress | None  # called after every part of the prompt that is read, in the model's thread


_FORMATS = ("schema", "regex", "lark", "constraint")
_MEDIA = {"images": "image", "audio": "audio", "videos": "video"}


def is_pydantic(schema: object) -> bool:
    """Whether it is a class with pydantic's methods."""
    return isinstance(schema, type) and hasattr(schema, "model_json_schema") and hasattr(schema, "model_validate_json")


def constraint_of(options: AnswerOptions, grammars: Callable[[], Grammars]) -> Constraint | None:
    """What the answer must look like; grammars: called only when a schema or a grammar is given.

    Raises ValueError when several are given, GrammarError when one can't be used, ImportError without llguidance.
    """
    given = [name for name in _FORMATS if options.get(name) is not None]
    if len(given) > 1:
        raise BadValue(f"{' and '.join(given)} were given, but an answer can follow only one of them")
    if not given or "constraint" in given:
        return _checked(options.get("constraint"))
    value: Any = options.get(given[0])
    if given == ["schema"]:
        return grammars().json_schema(closed(value.model_json_schema() if is_pydantic(value) else value))
    if not isinstance(value, str):
        raise BadValue(f"{given[0]} is {value!r:.80}, expected a string")
    return grammars().regex(value) if given == ["regex"] else grammars().lark(value)


def _checked(constraint: Any) -> Constraint | None:
    methods = (getattr(constraint, name, None) for name in ("mask", "push"))
    if constraint is not None and (isinstance(constraint, type) or not all(map(callable, methods))):
        raise BadValue(
            f"constraint is {constraint!r:.80}, expected an object with the methods mask() and push(token_id); a JSON "
            "schema, a regex or a grammar goes as schema, regex or lark"
        )
    return constraint


def parsed(text: str, schema: Any) -> Any:
    """The object that an answer describes, with a pydantic model class as its schema.

    None with any other schema, and where the text does not validate: it was truncated, or it breaks a rule of the
    class that JSON schema can't express.
    """
    if not is_pydantic(schema):
        return None
    try:
        return schema.model_validate_json(text)
    except ValueError:
        return None


def with_media(prompt: Any, options: AnswerOptions) -> Any:
    """The prompt, or with media one user message of them and the text; raises ValueError if it is not a string."""
    given = [name for name in _MEDIA if options.get(name) is not None]
    if not given:
        return prompt
    if not isinstance(prompt, str):
        raise BadValue(
            f"{' and '.join(given)} can only be given with a prompt that is a string: "
            "put them into the messages, as parts of their content"
        )
    parts: list[dict[str, Any]] = []
    for name in given:
        several = isinstance(options.get(name), (list, tuple))
        for index, source in enumerate(_listed(options.get(name))):
            argument = f"{name}[{index}]" if several else name  # what errors name
            parts.append({"type": _MEDIA[name], _MEDIA[name]: source, "argument": argument})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def _listed(sources: Any) -> Sequence[Any]:
    return sources if isinstance(sources, (list, tuple)) else [sources]

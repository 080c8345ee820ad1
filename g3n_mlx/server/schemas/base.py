"""What every request has: unknown fields are named in the log, or refused where they would change the answer."""

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from g3n_mlx.failures import BadValue

SENT_ELSEWHERE = "send it as a part of the message's content: image_url, input_audio, audio_url or video_url"
OUR_TEMPLATE = "prompts follow the checkpoint's own template"

log = logging.getLogger(__name__)


def _encodable(text: str) -> str:
    """Raises ValueError for a lone surrogate: JSON and some charsets of a form express it, UTF-8 does not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadValue(f"the text has the lone surrogate {text[error.start]!a}") from None
    return text


PlainText = Annotated[str, AfterValidator(_encodable)]


class Wire(BaseModel):
    """A request's object. Fields that are not listed are ignored, unless they would change the answer."""

    model_config = ConfigDict(extra="allow")
    # What other servers know and this one does not: what to do instead.
    REFUSED: ClassVar[Mapping[str, str]] = {}
    # Their values that ask for nothing, besides null, false, 0 and whatever is empty.
    NEUTRAL: ClassVar[Mapping[str, Any]] = {}

    def unknown(self, path: str = "") -> Iterator[str]:
        """The paths of the ignored fields, here and further in; raises PydanticCustomError at a refused one."""
        for name, value in (self.model_extra or {}).items():
            place = f"{path}{ascii(name)[1:-1]:.60}"
            if name in self.REFUSED and value and value != self.NEUTRAL.get(name):
                context = {"path": place, "advice": self.REFUSED[name]}
                raise PydanticCustomError("unsupported_field", "{path} is not supported: {advice}", context)
            yield place
        for name, field in type(self).model_fields.items():
            value, place = getattr(self, name), f"{path}{field.alias or name}"
            if isinstance(value, Wire):
                yield from value.unknown(f"{place}.")
            elif isinstance(value, list) and value and not isinstance(value[0], int):
                for index, inner in enumerate(value):
                    if isinstance(inner, Wire):
                        yield from inner.unknown(f"{place}[{index}].")


class RequestBody(Wire):
    """A request's body; one line of the log names the fields that this server ignores."""

    model: Annotated[str, BeforeValidator(lambda name: "default" if name is None else name)] = "default"

    @model_validator(mode="after")
    def _report_unknown(self) -> Self:
        if unknown := list(self.unknown()):
            log.info("ignored fields: %s", ", ".join(map(repr, unknown[:20])))
        return self


def now() -> int:
    """Seconds since 1970, as OpenAI's `created` has them."""
    return int(time.time())

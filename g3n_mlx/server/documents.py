"""Files in messages: the text of a document becomes a text part, under its name."""

from collections.abc import Sequence

from g3n_mlx.media.document import document_text
from g3n_mlx.media.fetch import fetch
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.prompt.fences import fenced
from g3n_mlx.server.engine import Place
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.schemas.messages import FileData, Message, Part


async def with_documents(messages: Sequence[Message], place: Place) -> list[Message]:
    """The messages with the text of their files; raises ApiError 400 for a file that has none."""
    return [await _with_documents(message, place) for message in messages]


async def _with_documents(message: Message, place: Place) -> Message:
    if not isinstance(message.content, list):
        return message
    content = [
        await _opened(part, place) if isinstance(part, Part) and part.type == "file" else part
        for part in message.content
    ]
    return message.model_copy(update={"content": content})


async def _opened(part: Part, place: Place) -> Part:
    file = part.file
    if file is None or not file.file_data:
        raise ApiError(400, "a part of the type file has no file_data", param="messages")
    policy = place.policy
    text = await place.opened(lambda: _text(file, policy), "messages", place.engine.media_threads)
    return Part(type="text", text=text)


def _text(file: FileData, policy: MediaPolicy) -> str:
    assert file.file_data is not None
    uri = file.file_data if file.file_data.startswith("data:") else f"data:;base64,{file.file_data}"
    return fenced(file.filename or "file", document_text(fetch(uri, policy)))

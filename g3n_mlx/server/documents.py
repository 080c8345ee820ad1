"""Files in messages: the text of a document becomes a text part, under its name."""

from collections.abc import Sequence

from g3n_mlx.failures import BadValue
from g3n_mlx.media.document import MAX_CHARACTERS, document_text
from g3n_mlx.media.fetch import fetch
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.prompt.fences import fenced
from g3n_mlx.server.engine import Place
from g3n_mlx.server.errors import ApiError
from g3n_mlx.server.messages import Turns, check_media, template_messages
from g3n_mlx.server.schemas.messages import FileData, Message, Part


async def opened_turns(messages: Sequence[Message], tools_text: str | None, place: Place) -> Turns:
    """The messages that `Gemma3n.prepare` takes, with the text of their files; tools_text as in `template_messages`.

    Raises ApiError 400 for a file without text, and for too many media or too much text in files.
    """
    check_media(messages)
    reading = _Reading(place)
    return template_messages([await reading.opened(message) for message in messages], tools_text)


class _Reading:
    """Opens the files of one request, one after the other, while their text is not too long."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._characters = 0

    async def opened(self, message: Message) -> Message:
        """The message with texts in place of files, an empty line between them and the text around them."""
        if not isinstance(message.content, list):
            return message
        content: list[Part] = []
        after_file = False
        for entry in message.content:
            part = Part(type="text", text=entry) if isinstance(entry, str) else entry
            is_file = part.type == "file"
            piece = await self._text_part(part.file) if is_file else part
            if content and content[-1].type == piece.type == "text" and (is_file or after_file):
                # A template takes parts without a space between them.
                piece = Part(type="text", text=f"{content.pop().text}\n\n{piece.text}")
            content.append(piece)
            after_file = is_file
        return message.model_copy(update={"content": content})

    async def _text_part(self, file: FileData | None) -> Part:
        if file is None or not file.file_data:
            raise ApiError(400, "a part of the type file has no file_data", param="messages")
        place, policy = self._place, self._place.policy
        text = await place.opened(lambda: _text(file, policy), "messages", place.engine.media_threads)
        self._characters += len(text)
        if self._characters > MAX_CHARACTERS:
            raise ApiError(400, f"the files have more than {MAX_CHARACTERS} characters: send fewer", param="messages")
        return Part(type="text", text=text)


def _text(file: FileData, policy: MediaPolicy) -> str:
    assert file.file_data is not None
    uri = file.file_data if file.file_data.startswith("data:") else f"data:;base64,{file.file_data}"
    name = file.filename or "file"
    data = fetch(uri, policy)
    try:
        return fenced(name, document_text(data))
    except BadValue as error:
        raise BadValue(f"{name}: {error}") from None

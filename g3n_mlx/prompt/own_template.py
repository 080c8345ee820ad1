"""The chat template that a checkpoint brings: whether it makes Gemma 3n's prompts, and prompts made by it.

Our own rendering (template.py) is the published template's, and is used for every checkpoint. One that was trained with
another template is noticed by a few probe conversations, and its own is used on request. It is a program out of a file,
run in sandbox.py.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.config.fields import read_json
from g3n_mlx.failures import BadValue
from g3n_mlx.media.part import Media
from g3n_mlx.prompt.template import MEDIA_KINDS, Border, Control, Piece, check_messages, parts_of, render

# What stands for a medium in a rendered prompt: the published template's word, or that of a block's beginning.
_PLACES = {
    "<image_soft_token>": "image",
    "<start_of_image>": "image",
    "<audio_soft_token>": "audio",
    "<start_of_audio>": "audio",
}
_PUBLISHED_PLACES = {"image": "<image_soft_token>", "audio": "<audio_soft_token>", "video": "<image_soft_token>"}
# No text holds these, which Unicode keeps free for a program's own use: one of them marks what a message said.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_DEFAULT_WORDS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_MAX_TEXT = 1 << 20

_QUESTION = {"role": "user", "content": "  What is it?\n"}
_PROBES: dict[str, list[dict[str, Any]]] = {
    "a question": [_QUESTION],
    "a conversation": [_QUESTION, {"role": "assistant", "content": " A bird. "}, {"role": "user", "content": "Why?"}],
    "a system message": [{"role": "system", "content": "Be brief."}, _QUESTION],
}


class OwnTemplate:
    """A chat template out of a checkpoint's files."""

    def __init__(self, source: str, words: Mapping[str, str], where: str) -> None:
        """words: the tokens that templates know by name, as `bos_token`; where: the file, for errors.

        Raises ValueError when it is no template.
        """
        self.where = where
        self._words = words
        from g3n_mlx.prompt.sandbox import environment  # jinja2 takes 30 ms to import, and most loads do without

        try:
            self._template = environment().from_string(source)
        except Exception as error:  # noqa: BLE001 (the compiler folds constants, so any error of Python's may come)
            raise BadValue(f"{where} is no usable chat template: {error}") from None

    @staticmethod
    def from_folder(folder: Path) -> "OwnTemplate | None":
        """The template of a model folder, from whichever file has it; None where none has. Raises ValueError."""
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        words = {name: _word(settings.get(name)) or word for name, word in _DEFAULT_WORDS.items()}
        path, older = folder / "chat_template.jinja", folder / "chat_template.json"
        if path.is_file():
            try:
                return OwnTemplate(path.read_text("utf-8"), words, str(path))
            except UnicodeDecodeError as error:
                raise BadValue(f"{path} is no usable chat template: {error}") from None
        if older.is_file():
            path, source = older, read_json(older).get("chat_template")
        else:
            path, source = folder / "tokenizer_config.json", settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise BadValue(f"{path} is no usable chat template: it is a {type(source).__name__}, expected a text")
        return OwnTemplate(source, words, str(path))

    def text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that asks for an answer; raises ValueError when the template fails or refuses the messages."""
        pieces: list[str] = []
        try:
            length = 0
            for piece in self._template.generate(messages=messages, add_generation_prompt=True, **self._words):
                pieces.append(piece)
                length += len(piece)
                if length > _MAX_TEXT + sum(len(str(message)) for message in messages):
                    raise BadValue("it renders without end")
        except Exception as error:  # noqa: BLE001 (a program out of a file: it may fail in any way)
            raise BadValue(f"{self.where}: the chat template can't render these messages: {error}") from None
        return "".join(pieces)

    def difference(self, kinds: Iterable[str]) -> str | None:
        """What it renders in another way than Gemma 3n's template, in words; None where no probe tells them apart.

        kinds: the media that the checkpoint takes, "image" and "audio".
        """
        probes = dict(_PROBES)
        for kind in kinds:
            question = {"type": "text", "text": _QUESTION["content"]}
            probes[f"an {kind} part"] = [{"role": "user", "content": [{"type": kind}, question]}]
        for name, messages in probes.items():
            try:
                found = self.text(messages)
            except ValueError:
                return name
            if found != _published_text(messages):
                return name
        return None

    def render(self, messages: Sequence[Mapping[str, Any]], control_words: Iterable[str]) -> list[Piece]:
        """The pieces of a conversation, as `template.render` gives them; control tokens come from the template alone.

        control_words: the names of the tokenizer's control tokens. What a message says is text: a mark parts the
        control words in it while the template works, and is taken out again.
        Raises ValueError when the template fails or leaves media out.
        """
        check_messages(messages)
        mark = _mark_for(messages)
        words = re.compile("|".join(map(re.escape, sorted(control_words, key=len, reverse=True))) or "(?!)")

        def marked(text: str) -> str:
            return words.sub(lambda match: match[0][0] + mark + match[0][1:], text)

        media: list[Media] = []
        shown: list[dict[str, Any]] = []
        for index, message in enumerate(messages):
            role = "assistant" if message["role"] == "model" else message["role"]
            content = message["content"]
            if isinstance(content, str):
                shown.append({"role": role, "content": marked(content)})
                continue
            parts: list[dict[str, Any]] = []
            for place, part in enumerate(parts_of(content, f"messages[{index}]")):
                where = f"messages[{index}].content[{place}]"
                if isinstance(part, str):
                    parts.append({"type": "text", "text": marked(part)})
                elif part["type"] in MEDIA_KINDS:
                    kind = MEDIA_KINDS[part["type"]]
                    media.append(Media(kind, part, where))
                    parts.append({"type": "image" if kind == "video" else kind})
                elif part["type"] == "text" and isinstance(part.get("text"), str):
                    parts.append({"type": "text", "text": marked(part["text"])})
                else:
                    raise BadValue(f"{where} is {part!r:.80}, expected a text or a media part")
            shown.append({"role": role, "content": parts})
        return [*self._pieces(self.text(shown), words, media, mark), Border()]

    def _pieces(self, text: str, words: re.Pattern[str], media: list[Media], mark: str) -> list[Piece]:
        waiting = list(media)
        pieces: list[Piece] = []
        position = 0
        for match in words.finditer(text):
            pieces.append(text[position : match.start()].replace(mark, ""))
            position = match.end()
            kind = _PLACES.get(match[0])
            if kind is None:
                pieces.append(Control(match[0]))
            elif waiting and ("audio" if waiting[0].kind == "audio" else "image") == kind:
                pieces.append(waiting.pop(0))
            else:
                raise BadValue(f"{self.where}: the chat template has {match[0]} where no {kind} part is")
        if waiting:
            raise BadValue(f"{self.where}: the chat template has no place for {waiting[0].where}, a medium")
        return [*(piece for piece in pieces if piece != ""), text[position:].replace(mark, "")]


def chat_template_note(folder: Path, kinds: Iterable[str]) -> str | None:
    """What a user should know of a checkpoint's chat template when Gemma 3n's is used; None when they agree."""
    if _is_ours(folder / "chat_template.jinja"):
        return None
    try:
        own = OwnTemplate.from_folder(folder)
        if own is None:
            return f"{folder} has no chat template: Gemma 3n's is used, which a model without -it has not learnt"
        different = own.difference(kinds)
    except ValueError as error:
        return f"{error}; Gemma 3n's is used"
    if different is None:
        return None
    return (
        f"{own.where} is not Gemma 3n's chat template (it differs for {different}): Gemma 3n's is used; "
        "--chat-template own takes the checkpoint's"
    )


def _is_ours(path: Path) -> bool:
    """Whether a template is the demo's to the letter, which is Gemma 3n's."""
    try:
        return path.read_bytes() == (demo_folder() / path.name).read_bytes()
    except OSError:
        return False


def _published_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What Gemma 3n's template makes of messages, as one text."""
    text = ""
    for piece in render(messages):
        match piece:
            case str():
                text += piece
            case Control():
                text += piece.word
            case Media():
                text += _PUBLISHED_PLACES[piece.kind]
            case Border():
                pass
    return text


def _mark_for(messages: Sequence[Mapping[str, Any]]) -> str:
    text = "".join(_texts(messages))
    mark = next((mark for mark in _MARKS if mark not in text), None)
    if mark is None:
        raise BadValue("the messages hold all of Unicode's noncharacters from U+FDD0 on: leave one of them out")
    return mark


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child)


def _word(setting: Any) -> str | None:
    """A token's name in tokenizer_config.json: a text, or an object around one."""
    if isinstance(setting, dict):
        setting = setting.get("content")
    return setting if isinstance(setting, str) else None

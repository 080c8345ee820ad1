"""The commands of a chat: what stands after a / at the beginning of a line."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g3n_mlx.chat import attachments, kept
from g3n_mlx.chat.editor import edited
from g3n_mlx.chat.saved import saved_messages, write_messages
from g3n_mlx.chat.settings import SETTINGS
from g3n_mlx.chat.showing import facts
from g3n_mlx.chat.waiting import Waiting
from g3n_mlx.failures import BadValue, check_folder_of, size_in_words

if TYPE_CHECKING:
    from g3n_mlx.chat.session import Session


@dataclass(frozen=True, slots=True)
class Command:
    """What can be asked of a session."""

    takes: str  # what may follow it, as /help shows it
    text: str
    do: "Callable[[Session, str], None]"


def obey(session: "Session", name: str, argument: str) -> None:
    """Does what a command says; raises ValueError for one that there is not, or that takes no argument."""
    if name not in COMMANDS:
        raise BadValue(f"there is no command /{name}; /help lists them")
    command = COMMANDS[name]
    if argument and not command.takes:
        raise BadValue(f"/{name} takes no argument, and got {argument!r:.40}")
    command.do(session, argument)


def _help(session: "Session", _: str) -> None:
    for name, command in COMMANDS.items():
        session.note(f"  {f'/{name} {command.takes}':<24} {command.text}")
    session.note("  An image, audio or video file may also be dropped at the beginning or end of a message.")
    session.note('  A new line in a message: Alt-Enter, or Enter after a backslash; """ begins and ends several lines.')
    session.note("  Tab completes commands and files. Ctrl-C stops an answer, Ctrl-Z suspends the chat.")


def _file(kind: str, session: "Session", argument: str) -> None:
    if not argument:
        raise BadValue(f"/{kind} needs a file name or URL")
    name, question = attachments.name_and_rest(argument)
    session.attach(attachments.part(kind, name), quiet=bool(question))
    if question:
        session.ask(question)


def _paste(session: "Session", _: str) -> None:
    session.attach(attachments.clipboard_image())


def _mic(session: "Session", _: str) -> None:
    def until_enter() -> None:
        session.note("recording; Enter ends it, Ctrl-C gives it up")
        sys.stdin.readline()

    session.attach(attachments.recording(until_enter))


def _system(session: "Session", text: str) -> None:
    if text:
        session.system = None if text == "-" else text
    session.note(f"system prompt: {session.system or 'none'}")


def _clear(session: "Session", _: str) -> None:
    pending = ", ".join(map(attachments.name_of, session.attached))
    session.messages, session.unanswered, session.attached = [], None, []
    session.opened = attachments.OpenedMedia()
    back = ""
    if session.record is not None:
        back = "" if session.record.id is None else f"; /resume {session.record.id} goes back to the one before"
        session.record.begin()
    session.note(
        f"the conversation is empty{f'; not asked about and forgotten too: {pending}' if pending else ''}{back}"
    )


def _undo(session: "Session", _: str) -> None:
    if session.attached and session.unanswered is None:
        session.note(f"forgotten: {', '.join(map(attachments.name_of, session.attached))}")
        session.attached = []
        return
    if session.unanswered is None:
        _last_question(session)
        session.messages = session.messages[:-2]
    else:
        session.detach(session.unanswered)
    session.unanswered = None
    kept.keep(session)
    left = len(session.messages) // 2
    session.note(f"forgotten; {left} question{' is' if left == 1 else 's are'} left")


def _retry(session: "Session", _: str) -> None:
    if session.unanswered is not None:
        session.ask_content(session.unanswered)
        return
    question = _last_question(session)
    session.messages = session.messages[:-2]
    session.ask_content(question)


def _last_question(session: "Session") -> Any:
    if not session.messages:
        raise BadValue("there is no question yet")
    return session.messages[-2]["content"]


def _slice(session: "Session", name: str) -> None:
    if not name:
        for line in session.sizes.lines():
            session.note(line)
        return
    with Waiting(f"taking {name}"):
        session.sizes.choose(name)
    again = "; it reads the conversation again at the next question" if session.messages else ""
    session.note(f"{session.sizes.name} answers from now on{again}")


def _model(session: "Session", name: str) -> None:
    if name:
        session.change_model(name)
    model = session.model
    session.note(f"{model.name} on {model.backend} ({model.device}) answers{' from now on' if name else ''}")


def _show(session: "Session", _: str) -> None:
    for line in facts(session):
        session.note(line)


def _edit(session: "Session", which: str) -> None:
    if which not in ("", "last"):
        raise BadValue(f"/edit takes the word last, and got {which!r:.40}")
    if not which:
        text = edited("")
    else:
        answered = session.unanswered is None
        before, media = attachments.text_and_media(session.unanswered or _last_question(session))
        text = edited(before)
        if text == before.strip() and answered:
            raise BadValue("the question is as it was: nothing was asked; /retry asks it again")
        if text and answered:
            session.messages = session.messages[:-2]
        if text:
            session.attached = [*media, *(part for part in session.attached if part not in media)]
    if not text:
        raise BadValue("the message is empty: nothing was asked")
    session.note(text)  # the editor has taken it from the screen
    session.ask(text)


def _save(session: "Session", name: str) -> None:
    path = _path(name, "save")
    if path.exists() and saved_messages(path) is None:
        raise BadValue(f"{path} exists and is no saved conversation; choose another name")
    check_folder_of(path)
    write_messages(path, session.model.name, [*session.system_message(), *session.messages])
    session.note(f"saved {len(session.messages)} messages to {path}")


def _load(session: "Session", name: str) -> None:
    path = _path(name, "load")
    messages = saved_messages(path)
    if not messages:
        raise BadValue(f"{path} is no saved conversation; expected JSON with a list of messages")
    session.model.prepare(session.opened.in_messages(messages))  # raises if it can't be rendered
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = messages[1:] if system is not None else messages
    if len(turns) % 2:
        raise BadValue(f"{path} ends with a question; expected an answer last")
    session.system, session.messages, session.unanswered = system, turns, None
    if session.record is not None:
        session.record.begin()
    session.note(f"loaded {len(turns)} messages from {path}")


def stats(session: "Session", _: str) -> None:
    usage = session.usage
    if usage is None:
        session.note("no figures: there was no whole answer yet, or the last one was stopped")
        return
    session.note(
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} of them cached), "
        f"{usage.completion_tokens} in the answer; first token after {usage.time_to_first_token_s:.2f} s, "
        f"prefill {usage.avg_prompt_tok_per_sec:.1f} tok/s, decode {usage.avg_compl_tok_per_sec:.1f} tok/s, "
        f"{usage.accepted_tokens} of {usage.drafted_tokens} drafted tokens accepted, "
        f"peak memory {size_in_words(usage.peak_memory_bytes)}"
    )


def _set(session: "Session", argument: str) -> None:
    from g3n_mlx.sampling import SamplingParams

    name, _, value = argument.partition(" ")
    name = name.replace("-", "_")
    if name == "draft" and value:
        session.draft = session.sizes.checked_draft("auto" if value == "default" else value)
        session.note(f"draft {session.draft}")
        return
    if name and name not in SETTINGS and name != "draft":
        raise BadValue(f"there is no setting {name!r}; there are {', '.join(SETTINGS)} and draft")
    if name and not value:
        raise BadValue(f"/set {name} needs a value, a number or 'default'")
    if value == "default":
        session.settings.pop(name, None)
    elif name:
        try:
            number = SETTINGS[name](value)
        except ValueError:
            kind = "a whole number" if SETTINGS[name] is int else "a number"
            raise BadValue(f"/set {name} needs {kind} or 'default', not {value!r}") from None
        changed: dict[str, Any] = {**session.settings, name: number}
        SamplingParams(**changed)
        session.settings = changed
    session.note(
        ", ".join(f"{key} {setting}" for key, setting in session.settings.items()) or "all settings: the model's own"
    )


def _path(name: str, command: str) -> Path:
    if not name:
        raise BadValue(f"/{command} needs a file name")
    return Path(name).expanduser()


COMMANDS = {
    "help": Command("", "list the commands", _help),
    "image": Command("FILE [QUESTION]", "ask about an image, now or with the next line", partial(_file, "image")),
    "audio": Command("FILE [QUESTION]", "ask about an audio file", partial(_file, "audio")),
    "video": Command("FILE [QUESTION]", "ask about a video", partial(_file, "video")),
    "file": Command("FILE [QUESTION]", "ask about the text of a text or PDF file", partial(_file, attachments.FILE)),
    "paste": Command("", "ask about the image in the clipboard", _paste),
    "mic": Command("", "ask about what you say now", _mic),
    "system": Command("[TEXT|-]", "show the system prompt, set it, or take it away with -", _system),
    "clear": Command("", "begin a new conversation, keep the system prompt", _clear),
    "resume": Command("[ID]", "go on with an earlier conversation; alone, list them", kept.resume),
    "undo": Command("", "forget the last question and its answer", _undo),
    "retry": Command("", "ask the last question again", _retry),
    "slice": Command("[NAME]", "answer with a slice of the model from now on; alone, list them", _slice),
    "model": Command("[NAME]", "go on with another model; alone, name the one that answers", _model),
    "edit": Command("[last]", "write a message in your editor; last: change the last question", _edit),
    "show": Command("", "show model, slice, bits, the context that is left and all settings", _show),
    "save": Command("FILE", "write the conversation as JSON", _save),
    "load": Command("FILE", "go on with a saved conversation", _load),
    "stats": Command("", "show the figures of the last answer", stats),
    "set": Command("[NAME VALUE]", "show or change a setting, as in /set temperature 0.7", _set),
    "exit": Command("", "end (Ctrl-D too)", _help),  # the loop sees it first
}

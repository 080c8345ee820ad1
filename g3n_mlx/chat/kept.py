"""The history of a chat: its conversation is kept while it goes on, and kept ones are taken up again."""

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from g3n_mlx.chat import attachments
from g3n_mlx.chat.waiting import Waiting
from g3n_mlx.failures import is_expected, one_line
from g3n_mlx.history.record import Record
from g3n_mlx.history.shown import short, table, words
from g3n_mlx.history.store import Conversation, History

if TYPE_CHECKING:
    from g3n_mlx.chat.session import Session

LISTED = 10


def is_off() -> bool:
    """Whether the user's environment says that nothing is kept."""
    return os.environ.get("G3N_HISTORY", "").lower() in ("0", "false", "no", "off")


def new_record() -> Record:
    """What a chat is kept by; raises ValueError where there is a history that can't be gone on with."""
    record = Record(History())
    with suppress(OSError):  # said when there is something to keep
        record.history.check()
    return record


def keep(session: "Session") -> None:
    """Writes what the history does not have yet. Where that fails it is said once, and the chat goes on."""
    if session.record is None:
        return
    try:
        told = session.record.update(session.system, session.messages, session.model.name)
        session.unkept = False
    except (OSError, ValueError) as error:
        told = None if session.unkept else f"what is said is not kept for now: {one_line(error)}"
        session.unkept = True
    if told:
        session.note(f"[{told}]")


def take_up(session: "Session", conversation: Conversation, *, quiet: bool = False) -> None:
    """Goes on with a kept conversation. Of media that can't be opened it says so, and goes on without them.

    quiet: without a word of the conversation.
    """
    session.system, session.messages, session.unanswered = conversation.system, conversation.messages, None
    session.opened = attachments.OpenedMedia()
    if session.record is not None:
        session.record.take_up(conversation)
    for part in attachments.media_of(session.messages):
        message = {"role": "user", "content": [part]}
        try:
            with attachments.errors_by_name([message]), Waiting(f"opening {attachments.name_of(part)}"):
                session.model.prepare(session.opened.in_messages([message]))
        except Exception as error:
            if not is_expected(error):
                raise
            session.opened.leave_out(part)
            nameless = attachments.name_of(part) == f"the {part['type']}"
            reason = (
                f"{attachments.name_of(part)} came from no file, so it is not kept" if nameless else one_line(error)
            )
            session.note(f"note: {reason}; the conversation goes on without it")
    if not quiet:
        entry, last = conversation.entry, conversation.turns[-1]
        count = f"{entry.questions} question{'' if entry.questions == 1 else 's'}"
        session.note(f"going on with conversation {entry.id}, {count}; the last one:")
        session.note(f"  > {short(words(last.question), 200)}")
        session.note(f"  {short(words(last.answer), 200)}")


def resume(session: "Session", name: str) -> None:
    """`/resume`: takes up a conversation by id or words of its name; without one lists the last ones."""
    history = History() if session.record is None else session.record.history
    if name:
        take_up(session, history.find(name))
        return
    entries = history.entries()
    for line in table(entries[:LISTED]):
        session.note(line)
    session.note(
        f"/resume ID goes on with one; `g3n history` lists {'all ' * (len(entries) > LISTED)}{len(entries)}"
        if entries
        else f"no conversations are kept in {history.path}"
    )

"""A chat's side of the history: what of its conversation is kept, and what of it is not kept yet."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from g3n_mlx.history.store import Conversation, Elsewhere, History, Removed, Turn


class Record:
    """The conversation of a chat in the history, which follows what the chat has: goes on, is taken back, changes."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.begin()

    def begin(self) -> None:
        """What is said from now on is a new conversation."""
        self.id: int | None = None  # of the conversation, once it is kept
        self._turns: list[Turn] = []  # those that are kept
        self._removed = False

    def take_up(self, conversation: Conversation) -> None:
        """What is said from now on belongs to a kept conversation."""
        self.begin()
        self.id, self._turns = conversation.id, list(conversation.turns)

    def update(self, system: str | None, messages: Sequence[dict[str, Any]], model: str) -> str | None:
        """Keeps a conversation as it now is; returns what a user should know.

        messages: user and assistant in turn. model: the name of what gave the answers that are new. Raises ValueError
        and OSError as History does; what could not be written is written by the next call.
        """
        pairs = [(asked["content"], said["content"]) for asked, said in zip(messages[::2], messages[1::2], strict=True)]
        same = 0
        while same < min(len(pairs), len(self._turns)) and pairs[same] == self._said(same):
            same += 1
        if self._removed or (same == len(pairs) == len(self._turns)):
            return None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        turns = [*self._turns[:same], *(Turn(question, answer, model, now) for question, answer in pairs[same:])]
        try:
            key, ids = self.history.write(self.id, system, [turn.id for turn in self._turns], same, turns[same:])
        except Removed:
            # Somebody wanted it gone: it does not come back with the next answer.
            self._removed = True
            return "this conversation was removed from the history, and is no longer kept"
        except Elsewhere:
            if not turns:
                self.begin()
                return None
            self.id, ids = self.history.write(None, system, [], 0, turns)
            self._turns = [replace(turn, id=key) for turn, key in zip(turns, ids, strict=True)]
            return f"the conversation was changed by another chat; what is said here is kept as {self.id}"
        self.id = key if turns else None
        self._turns = turns[:same] + [replace(turn, id=key) for turn, key in zip(turns[same:], ids, strict=True)]
        return None

    def _said(self, index: int) -> tuple[Any, Any]:
        return self._turns[index].question, self._turns[index].answer

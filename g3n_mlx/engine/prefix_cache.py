"""Caches of earlier requests that later ones begin with: after the system text, a media block, a turn.

Requests are compared by their prompts' identity, token ids with media as their content's digest. A prompt that goes
on where an idle conversation ends takes it over; one that parts from it earlier, or from a running one, gets a fork at
the longest snapshot that they share.
"""

from collections.abc import Callable, Iterable, Sequence

from g3n_mlx.engine.conversation import Conversation


class PrefixCache:
    """Idle conversations, least recently used first. Not for several threads at once; `take` and `put` copy arrays."""

    def __init__(self, empty: Callable[[], Conversation]) -> None:
        """empty: makes a conversation with nothing in it."""
        self._empty = empty
        self._idle: list[Conversation] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all idle conversations."""
        return sum(conversation.nbytes for conversation in self._idle)

    def take(self, identity: Sequence[int], running: Iterable[Conversation]) -> Conversation:
        """A conversation of the caller's own that holds as much of a prompt as any idle or running one does."""
        best = max([*self._idle, *running], key=lambda known: known.reusable(identity), default=None)
        if best is None or not best.reusable(identity):
            return self._empty()
        idle = any(best is known for known in self._idle)
        if idle:
            self._idle = [known for known in self._idle if known is not best]
            if best.reusable(identity) == len(best.token_ids):
                return best
            self._idle.append(best)
        return best.fork(identity) or self._empty()

    def put(self, conversation: Conversation) -> None:
        """Keeps a conversation that nobody uses any more; those that it goes on from add nothing and are dropped."""
        if not conversation.token_ids:
            return
        conversation.mark()
        self._idle = [
            known for known in self._idle if conversation.token_ids[: len(known.token_ids)] != known.token_ids
        ]
        self._idle.append(conversation)

    def shrink(self, max_bytes: int) -> None:
        """Drops the least recently used ones until the others fit."""
        while self._idle and self.nbytes > max_bytes:
            del self._idle[0]

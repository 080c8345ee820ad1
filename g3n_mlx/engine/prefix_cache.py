"""Caches of earlier requests that later ones begin with: after the system text, a media block, a turn.

Requests are compared by their prompts' identity, token ids with media as their content's digest. A prompt that goes
on where an idle conversation ends takes it over; one that parts from it earlier, or from a running one, gets a fork at
the longest snapshot that they share. Slices of a model have keys and values of their own, so every conversation is kept
for the slice that made it, and found by requests to that one alone.
"""

from collections.abc import Callable, Iterable, Sequence

from g3n_mlx.engine.conversation import Conversation


class PrefixCache:
    """Idle conversations, least recently used first. Not for several threads at once; `take` and `put` copy arrays."""

    def __init__(self, empty: Callable[[str | None], Conversation]) -> None:
        """empty: makes a conversation with nothing in it for a slice, by name; None is the whole model."""
        self._empty = empty
        self._idle: list[tuple[str | None, Conversation]] = []  # with their slices

    @property
    def nbytes(self) -> int:
        """Bytes of all idle conversations."""
        return sum(conversation.nbytes for _, conversation in self._idle)

    def take(self, identity: Sequence[int], running: Iterable[Conversation], of: str | None = None) -> Conversation:
        """A conversation of the caller's own that holds as much of a prompt as any idle or running one does.

        of: the slice that the prompt is for, and that all the running ones are of.
        """
        idle = [known for slice_name, known in self._idle if slice_name == of]
        best = max([*idle, *running], key=lambda known: known.reusable(identity), default=None)
        if best is None or not best.reusable(identity):
            return self._empty(of)
        if any(best is known for known in idle):
            self._idle = [entry for entry in self._idle if entry[1] is not best]
            if best.reusable(identity) == len(best.token_ids):
                return best
            self._idle.append((of, best))
        return best.fork(identity) or self._empty(of)

    def put(self, conversation: Conversation, of: str | None = None) -> None:
        """Keeps a conversation that nobody uses any more; those that it goes on from add nothing and are dropped."""
        if not conversation.token_ids:
            return
        conversation.mark()
        self._idle = [
            (slice_name, known)
            for slice_name, known in self._idle
            if slice_name != of or conversation.token_ids[: len(known.token_ids)] != known.token_ids
        ]
        self._idle.append((of, conversation))

    def shrink(self, max_bytes: int) -> None:
        """Drops the least recently used ones until the others fit."""
        while self._idle and self.nbytes > max_bytes:
            del self._idle[0]

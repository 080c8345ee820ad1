"""The user's data as pieces that a model reads in one pass: windows of a text, and examples with their answers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from g3n_mlx.eval.quality import Example, read_examples, read_text
from g3n_mlx.failures import BadValue
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.prompt.prompt import Prompt, of_token_ids

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

# Rows of logits kept of the whole model while its slices are compared with it: 256 MiB at the released vocabulary.
PIECE_TOKENS = 256
# One piece in so many is kept for the figures of what was found, and not searched on.
HELD_OUT_EVERY = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A prompt, and from which of its tokens on the next one's distribution counts."""

    prompt: Prompt
    start: int

    @property
    def tokens(self) -> int:
        return len(self.prompt.token_ids) - self.start

    @property
    def key(self) -> str:
        """Says which piece it is in a journal."""
        return hashlib.sha256(repr((self.prompt.identity, self.start)).encode()).hexdigest()[:16]


def read_pieces(
    model: "Gemma3n", text: Path | None, examples: Path | None, limit: int | None, max_tokens: int
) -> list[Piece]:
    """The pieces of a text, a JSON lines file of examples (`g3n eval` has the format), or both, one after the other.

    limit: examples of every skill; max_tokens: of the text, in windows spread over all of it.
    Raises OSError or ValueError for files that can't be read, and for messages or media that can't be used.
    """
    pieces = [] if text is None else _windows(model, model.tokenizer.encode(read_text(text)), max_tokens)
    for example in [] if examples is None else read_examples(examples, limit):
        pieces.append(_answered(model, example))
    return list({piece.key: piece for piece in pieces}.values())


def spread(prompts: Sequence[tuple[Prompt, int]], max_tokens: int) -> list[Piece]:
    """Prompts, with the token from which on each counts, as pieces; some of them where they are longer together."""
    pieces = [Piece(prompt, max(start, len(prompt.token_ids) - PIECE_TOKENS)) for prompt, start in prompts]
    pieces = list({piece.key: piece for piece in pieces}.values())
    wanted = max(2, len(pieces) * max_tokens // sum(len(piece.prompt.token_ids) for piece in pieces))
    if wanted >= len(pieces):
        return pieces
    return [pieces[at * len(pieces) // wanted] for at in range(wanted)]


def split(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Pieces to search on, and those held out; a single piece has to serve for both."""
    held_out = set(range(HELD_OUT_EVERY - 1, len(pieces), HELD_OUT_EVERY)) or set(range(len(pieces))[1:][-1:])
    rest = [piece for at, piece in enumerate(pieces) if at not in held_out]
    return rest, [pieces[at] for at in sorted(held_out)] or rest


def _windows(model: "Gemma3n", ids: Sequence[int], max_tokens: int) -> list[Piece]:
    """Every window begins with `<bos>`, and all its tokens count."""
    size = min(PIECE_TOKENS, model.config.text.max_position_embeddings) - 1
    starts = list(range(0, len(ids), size))
    wanted = max(1, max_tokens // size)
    if len(starts) > wanted:
        starts = [starts[at * len(starts) // wanted] for at in range(wanted)]
    vocab_size = model.config.text.vocab_size
    return [
        Piece(of_token_ids([model.tokenizer.bos_id, *ids[start : start + size]], vocab_size), 0) for start in starts
    ]


def _answered(model: "Gemma3n", example: Example) -> Piece:
    """The question and its answer; the answer's tokens count, and the end behind them."""
    try:
        prompt = model.prepare(example.messages, MediaPolicy(paths=example.folder))
    except ValueError as error:
        raise BadValue(f"{example.where}: {error}") from None
    room = model.config.text.max_position_embeddings - len(prompt.token_ids)
    answer = model.tokenizer.encode(example.answer)[: min(PIECE_TOKENS - 1, max(0, room))]
    return Piece(replace(prompt, token_ids=(*prompt.token_ids, *answer)), len(prompt.token_ids) - 1)

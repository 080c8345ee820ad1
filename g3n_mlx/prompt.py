"""Messages to a Prompt: the ids that the model reads, and where its cache is worth a snapshot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from g3n_mlx.chat_template import Border, Control, Media, Piece, render
from g3n_mlx.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given: ids, and the borders inside them.

    A border is the count of ids before a place where later prompts are likely to part from this
    one: after the system text and after every `<start_of_turn>model` header, the prompt's own end included.
    Borders ascend, and depend on the prompt alone.
    """

    token_ids: tuple[int, ...]
    borders: tuple[int, ...]


def prepare(messages: str | Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Prompt:
    """The prompt that asks for an answer to `messages`; a string is one user message.

    Raises ValueError naming the message or part that can't be used.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return encode(render(messages), tokenizer)


def encode(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Prompt:
    """The ids of rendered pieces.

    Text that touches is joined before it is tokenized, as the reference does it: newlines that meet become one token.
    """
    ids: list[int] = []
    borders: list[int] = []
    run, marks = "", list[int]()  # the text since the last control token, and the borders in it, in characters

    def close_run() -> None:
        nonlocal run
        run_ids = tokenizer.encode(run) if run else []
        borders.extend(len(ids) + _border_in_run(run, mark, run_ids, tokenizer) for mark in marks)
        ids.extend(run_ids)
        run = ""
        marks.clear()

    for piece in pieces:
        match piece:
            case str():
                run += piece
            case Border():
                marks.append(len(run))
            case Control():
                close_run()
                ids.append(tokenizer.id_of(piece.word))
            case Media():
                raise ValueError(f"{piece.where}: images, audio and video are not supported yet by this version")
    close_run()
    return Prompt(tuple(ids), tuple(sorted(set(borders))))


def _border_in_run(run: str, mark: int, run_ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """How many of the run's ids the text before the mark has in common with the whole run.

    A token may span the mark; then the border is where the last token that both share ends.
    """
    if mark == len(run):
        return len(run_ids)
    shared = 0
    for ours, theirs in zip(tokenizer.encode(run[:mark]), run_ids, strict=False):
        if ours != theirs:
            break
        shared += 1
    return shared

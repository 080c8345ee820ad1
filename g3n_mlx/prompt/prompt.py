"""A prompt: the ids that the model reads, the media among them, and where a cache is worth a snapshot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from g3n_mlx.failures import BadValue
from g3n_mlx.media.audio_features import AudioFeatures
from g3n_mlx.media.image import ImageFeatures
from g3n_mlx.prompt.template import Border, Control
from g3n_mlx.prompt.tokenizer import Tokenizer

# The tokens of a media block: its start, the placeholder of a soft token, its end.
BLOCKS = {
    "image": ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    "audio": ("<start_of_audio>", "<audio_soft_token>", "<end_of_audio>"),
}
Features = ImageFeatures | AudioFeatures


class PromptTooLong(BadValue):
    """The prompt does not fit the context; the message says by how much."""


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Placeholders in a prompt, and what the soft tokens that replace them are made of."""

    start: int
    length: int
    features: Features


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given: ids, the borders inside them, and the media that some of them stand for.

    A border is the count of ids before a place where later prompts are likely to part from this one: after the
    system text, after every media block and after every `<start_of_turn>model` header, the prompt's own end included.
    Borders ascend, and depend on the prompt alone.
    """

    token_ids: tuple[int, ...]
    borders: tuple[int, ...]
    media: tuple[MediaSpan, ...] = ()

    @property
    def identity(self) -> tuple[int, ...]:
        """What equals another prompt's exactly where the model reads the same: placeholders as their content's digest.

        Digests are negative numbers, so they equal no id.
        """
        identity = list(self.token_ids)
        for span in self.media:
            content = -1 - int.from_bytes(span.features.digest[:8], "big")
            identity[span.start : span.start + span.length] = [content] * span.length
        return tuple(identity)


def of_token_ids(token_ids: Any, vocab_size: int) -> Prompt:
    """A prompt of token ids taken as they are; raises ValueError when they are none."""
    listed = isinstance(token_ids, Iterable) and not isinstance(token_ids, (str, bytes))
    ids = list(token_ids) if listed else []
    if not ids or not all(isinstance(entry, Integral) and not isinstance(entry, bool) for entry in ids):
        raise BadValue(f"the prompt is {token_ids!r:.80}, expected a string, a list of messages or token ids")
    ids = tuple(int(entry) for entry in ids)
    wrong = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if wrong:
        raise BadValue(f"a prompt of token ids has the ids {wrong[:5]}, expected ids from 0 to {vocab_size - 1}")
    return Prompt(ids, (len(ids),))


def encode(
    pieces: Iterable[Control | Border | Features | str], tokenizer: Tokenizer, soft_tokens: Mapping[str, int]
) -> Prompt:
    """The ids of rendered pieces; soft_tokens: how many an "image" and an "audio" block has.

    Text that touches is joined before it is tokenized, as the reference does it: newlines that meet become one token.
    """
    ids: list[int] = []
    borders: list[int] = []
    media: list[MediaSpan] = []
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
            case ImageFeatures() | AudioFeatures():
                run += "\n\n"
                close_run()
                start, placeholder, end = (tokenizer.id_of(word) for word in BLOCKS[piece.kind])
                length = soft_tokens[piece.kind]
                media.append(MediaSpan(len(ids) + 1, length, piece))
                ids += [start, *[placeholder] * length, end]
                borders.append(len(ids))
                run = "\n\n"
    close_run()
    return Prompt(tuple(ids), tuple(sorted(set(borders))), tuple(media))


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

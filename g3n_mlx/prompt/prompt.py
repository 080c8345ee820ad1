"""Messages to a Prompt: the ids that the model reads, the media among them, and where a cache is worth a snapshot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from g3n_mlx.media.audio import AudioFeatures
from g3n_mlx.media.fetch import FetchPolicy
from g3n_mlx.media.image import ImageFeatures
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.media.part import Media
from g3n_mlx.prompt.template import Border, Control, render
from g3n_mlx.prompt.tokenizer import Tokenizer

# The tokens of a media block: its start, the placeholder of a soft token, its end.
BLOCKS = {
    "image": ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    "audio": ("<start_of_audio>", "<audio_soft_token>", "<end_of_audio>"),
}
Features = ImageFeatures | AudioFeatures


class PromptTooLong(ValueError):
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


def prepare(
    messages: str | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    opener: MediaOpener,
    policy: FetchPolicy,
    context_tokens: int | None = None,
) -> Prompt:
    """The prompt that asks for an answer to `messages`; a string is one user message.

    Media are fetched as the policy allows, and opened. Raises ValueError naming the message or part that can't be used,
    and PromptTooLong when the text alone is beyond a context, before anything is opened.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    rendered = render(messages)
    if context_tokens is not None:
        check_text([piece for piece in rendered if isinstance(piece, str)], tokenizer, context_tokens)
    pieces: list[Control | Border | Features | str] = []
    for piece in rendered:
        if isinstance(piece, Media):
            pieces += opener.open(piece, policy)
        else:
            pieces.append(piece)
    return encode(pieces, tokenizer, opener.soft_tokens)


def of_token_ids(token_ids: Any, vocab_size: int) -> Prompt:
    """A prompt of token ids taken as they are; raises ValueError when they are none."""
    listed = isinstance(token_ids, Iterable) and not isinstance(token_ids, (str, bytes))
    ids = list(token_ids) if listed else []
    if not ids or not all(isinstance(entry, Integral) and not isinstance(entry, bool) for entry in ids):
        raise ValueError(f"the prompt is {token_ids!r:.80}, expected a string, a list of messages or token ids")
    ids = tuple(int(entry) for entry in ids)
    wrong = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if wrong:
        raise ValueError(f"a prompt of token ids has the ids {wrong[:5]}, expected ids from 0 to {vocab_size - 1}")
    return Prompt(ids, (len(ids),))


def check_text(texts: Iterable[str], tokenizer: Tokenizer, context_tokens: int) -> None:
    """Raises PromptTooLong when no context of so many tokens holds the texts, however they are tokenized.

    Tokenizing takes a second for some megabytes, so what is far too long should not come to it.
    """
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    most = context_tokens * tokenizer.max_token_bytes
    if num_bytes > most:
        raise PromptTooLong(
            f"the prompt's text has {num_bytes:,} bytes, and the context of {context_tokens} tokens holds {most:,} "
            "of the longest ones at most: shorten it"
        )


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

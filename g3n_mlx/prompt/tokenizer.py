"""Text to ids and back, by the checkpoint's own tokenizer.json.

Control tokens are never read out of a text: `encode` takes their names for the letters they are
made of, and whoever means one asks for its id by name. `StreamDecoder` turns ids into text one at a
time; all that it gave, joined, is what `Tokenizer.decode` gives for the same ids.
Source of the decoding rules: huggingface/tokenizers, decoders Replace, ByteFallback and Fuse.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from g3n_mlx.checkpoint.registry import cache_folder
from g3n_mlx.failures import BadValue, MissingFile
from g3n_mlx.prompt.vocabulary import Vocabulary, keep

# What the chat template and the media blocks put into a prompt: text that spells one of these stays text,
# also in files that do not flag them as special.
CONTROL_WORDS = (
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<start_of_audio>",
    "<end_of_audio>",
    "<audio_soft_token>",
)
# Bytes of a tokenizer.json that is read as fast as its tables would be; a released one has 33 million.
_SMALL_FILE = 1 << 20
# Letters of a text from which on the tokenizers package is loaded: merging them in Python takes a tenth of a second.
_LONG_TEXT = 20_000
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """A checkpoint's vocabulary: text to ids, ids to text, control tokens by name."""

    def __init__(self, path: Path, vocabulary: Vocabulary | None = None):
        """path: of the tokenizer.json; vocabulary: its tables, if there are any, which do for all but long texts."""
        self._path = path
        if vocabulary is None:
            self._inner = self._package
            added = self._package.get_added_tokens_decoder()
            self._skipped = {token_id for token_id, token in added.items() if token.special}
        else:
            self._inner = vocabulary
            self._skipped = vocabulary.special_ids
        self.bos_id = self.id_of("<bos>")
        for word in ("<start_of_turn>", "<end_of_turn>"):
            self.id_of(word)  # another model's tokenizer fails here, not at the first prompt

    @staticmethod
    def from_folder(folder: Path) -> "Tokenizer":
        """Reads `folder`/tokenizer.json; raises FileNotFoundError or ValueError when there is no usable one."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise MissingFile(f"{path} does not exist; a checkpoint needs its tokenizer.json beside config.json")
        if path.stat().st_size < _SMALL_FILE:
            return Tokenizer(path)
        tables = cache_folder() / "tokenizers"
        vocabulary = Vocabulary.kept(path, tables)
        tokenizer = Tokenizer(path, vocabulary)
        if vocabulary is None:
            keep(tokenizer._package, path, tables)
        return tokenizer

    @cached_property
    def _package(self) -> tokenizers.Tokenizer:
        """The file as the tokenizers package reads it, which takes a second for a released one."""
        try:
            inner = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the tokenizers package raises nothing more special
            raise BadValue(f"{self._path} is not a usable tokenizer: {error}") from error
        unflagged = [
            tokenizers.AddedToken(token.content, normalized=False, special=True)
            for token in inner.get_added_tokens_decoder().values()
            if token.content in CONTROL_WORDS and not token.special
        ]
        inner.add_special_tokens(unflagged)
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        return inner

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a token."""
        return self._inner.get_vocab_size()

    def check_ids(self, count: int) -> None:
        """Raises ValueError when text can become an id of `count` or more, for which the model has no embedding.

        Control tokens beyond are left alone: a text-only checkpoint may have the tokenizer of one with media.
        """
        for token_id in range(count, self.vocab_size):
            if self.bytes_of(token_id) is None:
                continue
            word = self._inner.id_to_token(token_id)
            raise BadValue(
                f"{self._path}: the token {word!r} has the id {token_id}, but the model's vocab_size is {count}: use "
                "the tokenizer that belongs to these weights, or weights whose embeddings were enlarged for it"
            )

    def id_of(self, word: str) -> int:
        """The id of a token, by its name; raises ValueError when the vocabulary has no such token."""
        token_id = self._inner.token_to_id(word)
        if token_id is None:
            raise BadValue(f"{self._path} has no token {word!r}; is it the tokenizer of a Gemma 3n?")
        return token_id

    def bytes_of(self, token_id: int) -> bytes | None:
        """What a token adds to a text, in UTF-8; None for a control token and for an id without a token."""
        token = None if token_id in self._skipped else self._inner.id_to_token(token_id)
        if token is None:
            return None
        if _BYTE.fullmatch(token):
            return bytes.fromhex(token[3:5])
        return self._inner.decode([token_id], skip_special_tokens=False).encode()

    @cached_property
    def control_words(self) -> tuple[str, ...]:
        """The names of the control tokens."""
        return tuple(token for i in sorted(self._skipped) if (token := self._inner.id_to_token(i)) is not None)

    @cached_property
    def max_token_bytes(self) -> int:
        """What a token stands for in a text has no more bytes than this, in UTF-8."""
        if isinstance(self._inner, Vocabulary):
            return self._inner.max_token_bytes
        return max(len(token.encode()) for token in self._inner.get_vocab())

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text, without `<bos>`; control words inside it are text.

        Raises ValueError when the text has a lone surrogate, which UTF-8 can't express.
        """
        try:
            if isinstance(self._inner, Vocabulary) and len(text) <= _LONG_TEXT:
                return self._inner.encode(text)
            return self._package.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            place = re.search("[\ud800-\udfff]", text)
            if place is None:
                raise
            raise BadValue(
                f"the text has the lone surrogate {place.group()!a}: it comes from bytes that are not UTF-8, "
                "or from half a character"
            ) from None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of some ids; control tokens are left out unless `skip_special` is False, unknown ids always."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self) -> "StreamDecoder":
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self._inner, self._skipped)


class StreamDecoder:
    """Decodes ids one at a time: the joined text equals `Tokenizer.decode` of all of them.

    A run of byte tokens is held back until it ends, because its last byte decides how all of it is
    shown: an invalid run becomes one replacement character a byte. So no half character is ever given.
    """

    def __init__(self, inner: tokenizers.Tokenizer | Vocabulary, skipped: set[int]):
        """skipped: ids of the control tokens, which have no text."""
        self._inner, self._skipped = inner, skipped
        self._bytes: list[int] = []

    def push(self, token_id: int) -> str:
        """Takes the next id; returns the text that is now certain, often one token's, possibly ''."""
        if token_id in self._skipped:
            return ""
        token = self._inner.id_to_token(token_id)
        if token is None:
            return ""
        if _BYTE.fullmatch(token):
            self._bytes.append(token_id)
            return ""
        return self.finish() + self._inner.decode([token_id], skip_special_tokens=False)

    def finish(self) -> str:
        """The text still held back; the decoder is then as new."""
        text = self._inner.decode(self._bytes, skip_special_tokens=False)
        self._bytes = []
        return text

"""A byte-pair vocabulary as flat tables, which the user's cache folder keeps between two starts.

Reading a released tokenizer.json, 33 MB of JSON with 515,000 merges, takes the tokenizers package a second in which
nothing else runs; its tables are read in some milliseconds. They give the package's ids and text. Merging in Python
takes a few microseconds a letter, so long texts are better left to the package.
Source of the rules: huggingface/tokenizers, models/bpe/word.rs (merging), tokenizer/added_vocabulary.rs (added tokens).
"""

import hashlib
import json
import logging
import mmap
import os
import re
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

logger = logging.getLogger(__name__)

# Of the file's layout and of what is read out of a tokenizer.json: one more whenever either changes.
_VERSION = 1
_DIGEST_BYTES = 32
# name of a table -> type of its entries, in the order of the file
_TABLES = {
    # left id << 32 | right id of every merge, ascending; its rank, of which the lowest goes first; the id that it makes
    "pairs": np.dtype(np.uint64),
    "ranks": np.dtype(np.int32),
    "merged": np.dtype(np.int32),
    "ends": np.dtype(np.int32),  # [ids + 1] where the letters of token i begin; those of i - 1 end there
    "added": np.dtype(np.int32),  # ids of the tokens that are looked for in a text before anything is merged
    "special": np.dtype(np.int32),  # those among them that are control tokens
    "bytes": np.dtype(np.int32),  # [256] ids of <0x00> to <0xFF>
    "characters": np.dtype(np.int32),  # code points that have a token of their own, ascending; its id
    "character_ids": np.dtype(np.int32),
    "max_token_bytes": np.dtype(np.int32),  # [1]
    # Last, for it would leave others at odd addresses.
    "letters": np.dtype(np.uint8),  # every token in UTF-8, by id; an id without a token has no letters
}
# What a tokenizer.json has to say for these tables to follow it: as Gemma 3n's does, with or without the splitting,
# which finds no space after the replacement.
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_SPLITTERS = (
    None,
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
)
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
_MODEL: dict[str, Any] = {
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": True,
    "ignore_merges": False,
}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """What `tokenizers.Tokenizer` does for a text and for ids, from tables; control tokens in a text are text."""

    def __init__(self, tables: dict[str, np.ndarray]) -> None:
        """tables: as in `_TABLES`."""
        self._tables = tables
        self._letters = tables["letters"].data
        self._ends = tables["ends"].data
        self._special = set(tables["special"].tolist())
        self._bytes = tables["bytes"].tolist()
        self._characters = tables["characters"].data
        self._character_ids = tables["character_ids"].data
        self._pairs = tables["pairs"].data
        self._ranks = tables["ranks"].data
        self._merged = tables["merged"].data
        self._added = {token: i for i in tables["added"].tolist() if (token := self.id_to_token(i)) is not None}
        self._lengths: dict[str, list[int]] = {}  # first letter of an added token -> how long such tokens are
        for first, length in sorted({(word[0], len(word)) for word in self._added}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        self._starts = re.compile(f"[{re.escape(''.join(self._lengths))}]" if self._lengths else r"(?!)")

    @property
    def max_token_bytes(self) -> int:
        """What a token stands for in a text has no more bytes than this, in UTF-8."""
        return int(self._tables["max_token_bytes"][0])

    @property
    def special_ids(self) -> set[int]:
        """The ids of the control tokens."""
        return self._special

    def get_vocab_size(self) -> int:
        """Number of ids that have a token."""
        return int(np.count_nonzero(np.diff(self._tables["ends"])))

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id; None when it has none."""
        if not 0 <= token_id < len(self._ends) - 1:
            return None
        return str(self._letters[self._ends[token_id] : self._ends[token_id + 1]], "utf-8") or None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token; None when there is no such token."""
        token_id = self._added.get(token)
        return self._ids.get(token) if token_id is None else token_id

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Of every token; not needed for a prompt."""
        return {token: i for i in range(len(self._ends) - 1) if (token := self.id_to_token(i)) is not None}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a template; raises UnicodeEncodeError for a lone surrogate."""
        ids: list[int] = []
        for piece in self._pieces(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._merge(self._symbols(piece.replace(" ", "▁")))
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; unknown ids are left out."""
        parts: list[str] = []
        run = bytearray()  # of byte tokens, which become letters together or else one replacement character each
        for token_id in ids:
            token = self.id_to_token(token_id)
            if token is None or (skip_special_tokens and token_id in self._special):
                continue
            if byte := _BYTE.fullmatch(token):
                run.append(int(byte[1], 16))
                continue
            parts += [_shown(run), token.replace("▁", " ")]
            run.clear()
        return "".join([*parts, _shown(run)])

    def _pieces(self, text: str) -> Iterator[int | str]:
        """The added tokens in a text, the leftmost and there the longest, and the texts between them."""
        start = position = 0
        while found := self._starts.search(text, position):
            at = found.start()
            words = (text[at : at + length] for length in self._lengths[text[at]])
            word = next((word for word in words if word in self._added), None)
            position = at + (1 if word is None else len(word))
            if word is None or self._added[word] in self._special:
                continue
            if start < at:
                yield text[start:at]
            yield self._added[word]
            start = position
        if start < len(text):
            yield text[start:]

    def _symbols(self, text: str) -> list[int]:
        """The ids of a text's characters: a character's own, or those of its bytes."""
        ids: list[int] = []
        for letter in text:
            code = ord(letter)
            place = bisect_left(self._characters, code)
            if place < len(self._characters) and self._characters[place] == code:
                ids.append(self._character_ids[place])
            else:
                ids += [self._bytes[byte] for byte in letter.encode()]
        return ids

    def _merge(self, ids: list[int]) -> list[int]:
        """Neighbours merged, the pair of the lowest rank first and the leftmost among equals, until none is left."""
        pairs, ranks, merged, end = self._pairs, self._ranks, self._merged, len(ids)
        num_pairs = len(pairs)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))
        queue: list[tuple[int, int, int, int]] = []  # rank, position of the left one, pair, what it makes
        for position, (left, right) in enumerate(pairwise(ids)):
            pair = left << 32 | right
            place = bisect_left(pairs, pair)
            if place < num_pairs and pairs[place] == pair:
                queue.append((ranks[place], position, pair, merged[place]))
        heapify(queue)
        while queue:
            _, left, pair, made = heappop(queue)
            right = after[left]
            if ids[left] < 0 or right == end:
                continue  # it has gone into another one
            now = ids[left] << 32 | ids[right]
            if now != pair:
                # What stands there has changed; as in the package it is merged now if that makes the same token.
                place = bisect_left(pairs, now)
                if place == num_pairs or pairs[place] != now or merged[place] != made:
                    continue
            ids[left], ids[right] = made, -1
            beyond = after[left] = after[right]
            if beyond < end:
                before[beyond] = left
            for first, second in ((before[left], left), (left, beyond)):
                if first >= 0 and second < end:
                    pair = ids[first] << 32 | ids[second]
                    place = bisect_left(pairs, pair)
                    if place < num_pairs and pairs[place] == pair:
                        heappush(queue, (ranks[place], first, pair, merged[place]))
        return [token_id for token_id in ids if token_id >= 0]

    @staticmethod
    def kept(source: Path, folder: Path) -> "Vocabulary | None":
        """The tables of a tokenizer.json that `keep` left in a folder; None where they are absent, damaged or old."""
        try:
            with _file(source, folder).open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):  # absent, or empty
            return None
        contents = data[_DIGEST_BYTES:]
        if bytes(data[:_DIGEST_BYTES]) != _digest(source, contents):
            return None
        sizes = np.frombuffer(contents, np.int64, len(_TABLES))
        tables: dict[str, np.ndarray] = {}
        start = sizes.nbytes
        for (name, dtype), size in zip(_TABLES.items(), sizes.tolist(), strict=True):
            tables[name] = np.frombuffer(contents, dtype, size, start)
            start += tables[name].nbytes
        return Vocabulary(tables)


def keep(inner: tokenizers.Tokenizer, source: Path, folder: Path) -> None:
    """Leaves the tables of a tokenizer, read from the tokenizer.json `source`, in a folder for `Vocabulary.kept`.

    Does nothing for a tokenizer that does not follow the rules of this file, nor where nothing can be written.
    """
    if not _is_known(inner):
        return
    target = _file(source, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            try:
                tables = _tables(inner, json.loads(source.read_bytes())["model"])
                sizes = np.array([len(table) for table in tables], np.int64)
                contents = b"".join(part.tobytes() for part in (sizes, *tables))
                file.write(_digest(source, contents) + contents)
                file.close()
                os.replace(file.name, target)
            except BaseException:
                file.close()
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        logger.debug("%s is not kept: %s", target, error)


def _is_known(inner: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer does with a text what this file does."""
    model, added = inner.model, inner.get_added_tokens_decoder().values()
    return (
        isinstance(model, tokenizers.models.BPE)
        and all(getattr(model, name) == value for name, value in _MODEL.items())
        and _description(inner.normalizer) == _NORMALIZER
        and _description(inner.pre_tokenizer) in _SPLITTERS
        and _description(inner.decoder) == _DECODER
        and all(inner.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
        and not any(token.single_word or token.lstrip or token.rstrip or token.normalized for token in added)
    )


def _description(part: Any) -> Any:
    """A part of a tokenizer as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())


def _tables(inner: tokenizers.Tokenizer, model: dict[str, Any]) -> list[np.ndarray]:
    """The entries of `_TABLES`; model: as in tokenizer.json, for the package does not hand out its merges."""
    words: dict[str, int] = model["vocab"]
    added = inner.get_added_tokens_decoder()
    tokens = {i: word for word, i in words.items()} | {i: token.content for i, token in added.items()}
    letters = [tokens.get(i, "").encode() for i in range(max(tokens) + 1)]
    characters = sorted((ord(word), i) for word, i in words.items() if len(word) == 1)
    both = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    # The package keeps the last of equal pairs.
    merges = {words[left] << 32 | words[right]: (rank, words[left + right]) for rank, (left, right) in enumerate(both)}
    pairs = sorted(merges)
    columns: dict[str, Any] = {
        "pairs": pairs,
        "ranks": [merges[pair][0] for pair in pairs],
        "merged": [merges[pair][1] for pair in pairs],
        "ends": np.cumsum([0, *map(len, letters)]),
        "added": list(added),
        "special": [i for i, token in added.items() if token.special],
        "bytes": [words[f"<0x{byte:02X}>"] for byte in range(256)],
        "characters": [code for code, _ in characters],
        "character_ids": [i for _, i in characters],
        "max_token_bytes": [max(map(len, letters))],
        "letters": np.frombuffer(b"".join(letters), np.uint8),
    }
    return [np.asarray(columns[name], dtype) for name, dtype in _TABLES.items()]


def _shown(run: bytearray) -> str:
    """A run of byte tokens as text: what is not UTF-8 becomes one replacement character a byte."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def _file(source: Path, folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:16]
    return folder / f"{name}.tables"


def _digest(source: Path, contents: bytes | memoryview) -> bytes:
    """Differs when the contents are damaged, of another layout, or made of another state of the source."""
    status = source.stat()
    digest = hashlib.sha256(repr((_VERSION, sys.byteorder, status.st_size, status.st_mtime_ns)).encode())
    digest.update(contents)
    return digest.digest()

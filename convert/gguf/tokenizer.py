"""A tokenizer.json, made of a GGUF file's metadata.

Files of llama.cpp's converter hold the pieces of a SentencePiece model with their scores, out of which the merges
follow: of every piece all pairs of pieces that make it, the best scores first.
Source: transformers, convert_slow_tokenizer.py, `generate_merges` and `GemmaConverter`.
"""

import re
from pathlib import Path
from typing import Any

from g3n_mlx.failures import BadValue

# llama.h, enum llama_token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
# What the converter writes for ids without a piece, and what it takes for control tokens.
_FILLING = re.compile(r"\[PAD\d+\]")
_SPARE = re.compile(r"<unused\d+>")
_SPACE = "▁"
_KINDS = ("llama", "gpt2")


def tokenizer_json(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of the file; raises ValueError when the metadata hold no tokenizer of Gemma's kind."""
    from g3n_mlx.prompt.tokenizer import CONTROL_WORDS  # takes as long to import as all of the converter

    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    named = f"{path} holds no tokenizer of Gemma's kind"
    if kind not in _KINDS or not isinstance(tokens, list) or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise BadValue(f"{named} (tokenizer.ggml.model is {kind!r:.40}): name a folder that has it, --tokenizer FOLDER")
    vocabulary: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    scores: dict[str, float] = {}
    given = metadata.get("tokenizer.ggml.scores")
    if not isinstance(given, list) or len(given) != len(tokens):
        given = [0.0] * len(tokens)
    for token_id, (text, token_kind, score) in enumerate(zip(tokens, kinds, given, strict=True)):
        if not isinstance(text, str) or (token_kind == _UNUSED and _FILLING.fullmatch(text)):
            continue
        if token_kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or text in CONTROL_WORDS:
            text = text.replace(" ", _SPACE) if token_kind == _USER_DEFINED else text
            special = text in CONTROL_WORDS or (token_kind != _USER_DEFINED and not _SPARE.fullmatch(text))
            added.append(_added(token_id, text, special))
        if vocabulary.setdefault(text, token_id) != token_id:
            raise BadValue(f"{named}: the token {text!r} has the ids {vocabulary[text]} and {token_id}")
        # A trainer's own pieces, such as runs of spaces, come before all others, whatever score stands for them here.
        scores[text] = 0.0 if token_kind == _USER_DEFINED else score
    if "<bos>" not in vocabulary or "<unk>" not in vocabulary:
        raise BadValue(f"{named}, which has <bos> and <unk>: name a folder that has it, --tokenizer FOLDER")
    written = metadata.get("tokenizer.ggml.merges")
    merges = _written(path, written) if isinstance(written, list) else _merges(vocabulary, scores)
    return _file(vocabulary, merges, added)


def ends_of_answers(metadata: dict[str, Any]) -> list[int]:
    """The ids that end an answer."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    found = [metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
    if isinstance(tokens, list) and "<end_of_turn>" in tokens:
        found.append(tokens.index("<end_of_turn>"))
    return sorted({token_id for token_id in found if isinstance(token_id, int)})


def _merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    found: list[tuple[float, int, int, str, str]] = []
    for text, score in scores.items():
        pairs = [
            (text[:place], text[place:])
            for place in range(1, len(text))
            if text[:place] in vocabulary and text[place:] in vocabulary
        ]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in pairs]
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _written(path: Path, merges: list[Any]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, space, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
        if not (left and space and right):
            raise BadValue(f"{path}: tokenizer.ggml.merges has {merge!r:.40}, expected two pieces")
        pairs.append((left, right))
    return pairs


def _added(token_id: int, text: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": text, **flags}


def _file(vocabulary: dict[str, int], merges: list[tuple[str, str]], added: list[dict[str, Any]]) -> dict[str, Any]:
    """Around the vocabulary everything is Gemma's: spaces become ▁, unknown letters bytes, <bos> comes first."""
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<bos>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocabulary["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }

"""Writes `tokenizer.model` beside a Gemma tokenizer.json, for llama.cpp's converter, which reads no other vocabulary.

Published checkpoints come with one; those of write_random_checkpoint.py do not. Needs sentencepiece and protobuf.

    python tests/full_size/write_tokenizer_model.py FOLDER
"""

import re
import sys
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportMissingImports]

from g3n_mlx.config.fields import read_json

CONTROL = ("<pad>", "<eos>", "<bos>")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def main(folder: Path) -> None:
    tokenizer = read_json(folder / "tokenizer.json")
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    # A piece's score is the negative place of the merge that makes it, as SentencePiece's trainer has it.
    scores = {"".join(pair): -float(place) for place, pair in reversed(list(enumerate(merges)))}
    added = {token["content"] for token in tokenizer["added_tokens"]}
    proto: Any = ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(vocabulary)
    proto.trainer_spec.pad_id, proto.trainer_spec.eos_id, proto.trainer_spec.bos_id = range(3)
    proto.trainer_spec.unk_id = vocabulary["<unk>"]
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    for text in sorted(vocabulary, key=vocabulary.__getitem__):
        piece = proto.pieces.add(piece=text, score=scores.get(text, 0.0))
        piece.type = kind(piece, text, added)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def kind(piece: Any, text: str, added: set[str]) -> int:
    if text == "<unk>":
        return piece.UNKNOWN
    if text in CONTROL:
        return piece.CONTROL
    if BYTE.fullmatch(text):
        return piece.BYTE
    return piece.USER_DEFINED if text in added else piece.NORMAL


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The demo's tokenizer: byte-fallback BPE with the structure and the special tokens of the released one.

Control tokens lie at the released ids where those are small, the media tokens by the released rule: the last two
text ids, then the first two of the image range and of the audio range. Digits never merge, so a number is its digits.
"""

import json
import random
from pathlib import Path
from typing import Any

from architecture import SPECIAL_IDS, VOCAB
from pictures import QUESTIONS, SIGN_QUESTIONS, SIGN_WORDS, scene
from reading import READING
from sounds import written
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPACE = "\u2581"
CONTROL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<start_of_turn>": 105, "<end_of_turn>": 106}
NEWLINES = {"\n" * length: 106 + length for length in range(1, 5)}
FIRST_BYTE = 111
FIRST_PIECE = FIRST_BYTE + 256
ROLES = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
}


def corpus(seed: int) -> list[str]:
    """Texts of every skill."""
    rng = random.Random(seed)
    texts = [
        message["content"]
        for generate in READING.values()
        for _ in range(400)
        for message in generate(rng, False).messages
    ]
    for ask in QUESTIONS.values():
        texts += [text for _ in range(400) for text in ask(rng, scene(rng, False))]
    texts += [text for word in SIGN_WORDS for text in (word, word.upper())] * 3
    texts += [*SIGN_QUESTIONS, *written(), "user\n", "model\n"] * 300
    return texts


def build(seed: int) -> Tokenizer:
    """Learns the pieces from the corpus and lays out the vocabulary."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)
    words = Regex(rf"[0-9]|{SPACE}?[\p{{L}}_]+|{SPACE}?[^{SPACE}\n0-9\p{{L}}_]+|{SPACE}|\n+")
    learner.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    room = SPECIAL_IDS["<start_of_image>"] - FIRST_PIECE
    alphabet = [chr(code) for code in range(33, 127)] + [SPACE]
    learner.train_from_iterator(
        corpus(seed), trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(learner.to_str())["model"]
    pieces = [piece for piece, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if "\n" not in piece]
    merges = [tuple(pair) for pair in model["merges"] if "\n" not in "".join(pair)]

    vocab = {**CONTROL, **NEWLINES, **SPECIAL_IDS}
    vocab |= {f"<0x{value:02X}>": FIRST_BYTE + value for value in range(256)}
    vocab |= {piece: FIRST_PIECE + rank for rank, piece in enumerate(pieces)}
    free = sorted(set(range(VOCAB)) - set(vocab.values()))
    vocab |= {f"<unused{number}>": token_id for number, token_id in enumerate(free)}
    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", CONTROL["<bos>"])]
    )
    tokenizer.add_special_tokens([*CONTROL, *SPECIAL_IDS])
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in NEWLINES])
    return tokenizer


def write_tokenizer(folder: Path, seed: int) -> None:
    """tokenizer.json and the files around it, without the chat template."""
    build(seed).save(str(folder / "tokenizer.json"))
    names = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad", "unk", "mask")}
    write_json(folder / "special_tokens_map.json", {**names, **ROLES})
    write_json(
        folder / "tokenizer_config.json",
        {
            **names,
            **ROLES,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": ROLES,
            "model_max_length": 32768,
            "padding_side": "left",
            "processor_class": "Gemma3nProcessor",
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizerFast",
        },
    )


def write_json(path: Path, value: Any) -> None:
    """JSON as the released files have it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")

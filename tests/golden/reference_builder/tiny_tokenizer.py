"""A small tokenizer with the structure of the released one.

Same model type (BPE with byte fallback), same normaliser, same control tokens at ids 0-4 and
105-106, image and audio tokens placed by the rule in `Profile.special_token_ids`.
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .profile import Profile

SPACE = "\u2581"
CONTROL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
}
NEWLINE_RUNS = {"\n" * length: 106 + length for length in range(1, 5)}
FIRST_BYTE_ID = 111
FIRST_LEARNED_ID = FIRST_BYTE_ID + 256

TOKEN_ROLES = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
}


def write_tokenizer(profile: Profile, folder: pathlib.Path, corpus: str, chat_template: str) -> None:
    tokenizer = _build(profile, corpus)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(profile, chat_template))
    _write_json(folder / "special_tokens_map.json", _special_tokens_map())
    (folder / "chat_template.jinja").write_text(chat_template)


def _build(profile: Profile, corpus: str) -> Tokenizer:
    room = profile.special_token_ids["<start_of_image>"] - FIRST_LEARNED_ID
    pieces, merges = _learn_pieces(corpus, room)
    vocab = _lay_out(profile, pieces)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", CONTROL_TOKENS["<bos>"])]
    )
    tokenizer.add_special_tokens([*CONTROL_TOKENS, *profile.special_token_ids])
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in NEWLINE_RUNS])
    return tokenizer


def _learn_pieces(corpus: str, room: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Trains BPE on words (a word carries its leading space), as many pieces as there is room for."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)
    words = Regex(SPACE + "?[^" + SPACE + "\n]+|" + SPACE + "+|\n+")
    learner.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    printable = [chr(code) for code in range(33, 127)] + [SPACE]
    learner.train_from_iterator(
        [corpus],
        trainers.BpeTrainer(vocab_size=room, initial_alphabet=printable, show_progress=False),
    )
    model = json.loads(learner.to_str())["model"]
    pieces = [piece for piece, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    keep = [piece for piece in pieces if "\n" not in piece]
    merges = [tuple(pair) for pair in model["merges"] if "\n" not in "".join(pair)]
    return keep, merges


def _lay_out(profile: Profile, pieces: list[str]) -> dict[str, int]:
    """Gives every id below the total vocabulary size a token; ids without a meaning are <unusedN>."""
    vocab = {**CONTROL_TOKENS, **NEWLINE_RUNS, **profile.special_token_ids}
    vocab |= {f"<0x{value:02X}>": FIRST_BYTE_ID + value for value in range(256)}
    vocab |= {piece: FIRST_LEARNED_ID + rank for rank, piece in enumerate(pieces)}
    taken = set(vocab.values())
    free = [token_id for token_id in range(profile.total_vocab_size) if token_id not in taken]
    vocab |= {f"<unused{number}>": token_id for number, token_id in enumerate(free)}
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def _tokenizer_config(profile: Profile, chat_template: str) -> dict:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": TOKEN_ROLES,
        **TOKEN_ROLES,
        "model_max_length": 32768,
        "padding_side": "left",
        "processor_class": "Gemma3nProcessor",
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizerFast",
        "chat_template": chat_template,
    }


def _special_tokens_map() -> dict:
    names = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad", "unk", "mask")}
    return {**names, **TOKEN_ROLES}


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")

"""Ids and text: the goldens, the released tokenizer where it is, and laws of the streaming decoder."""

import copy
import json
import lzma

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from g3n_mlx.prompt.tokenizer import CONTROL_WORDS, Tokenizer

# Where the released configuration has the tokens that Gemma 3n adds to Gemma 3's vocabulary.
TEXT_VOCABULARY, TOTAL_VOCABULARY = 262_144, 262_400
MEDIA_TOKENS = {
    "<end_of_image>": 262_144,
    "<image_soft_token>": 262_145,
    "<end_of_audio>": 262_272,
    "<audio_soft_token>": 262_273,
}


@pytest.fixture(scope="module")
def tiny(tiny_folder) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.fixture(scope="module")
def reference(tiny_folder) -> tokenizers.Tokenizer:
    """The same file as the tokenizers package alone reads it: control words in a text are control tokens."""
    return tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def released_cases(repository):
    folder = repository.parent / "shared" / "reference" / "real-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the released tokenizer may not be part of this repository")
    return folder, json.loads((folder / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["package", "kept tables"])
def released(released_cases, tmp_path_factory, request) -> Tokenizer:
    """Gemma 3n's tokenizer, derived from Gemma 3's: 256000 is <start_of_audio>, ids from 262144 on are new."""
    with lzma.open(released_cases[0] / "tokenizer.json.xz") as packed:
        derived = json.load(packed)
    vocabulary = derived["model"]["vocab"]
    vocabulary["<start_of_audio>"] = vocabulary.pop("<end_of_image>")
    kept = [copy.copy(token) for token in derived["added_tokens"] if token["id"] < TEXT_VOCABULARY]
    for token in kept:
        if token["content"] == "<end_of_image>":
            token["content"] = "<start_of_audio>"
    names = {token_id: name for name, token_id in MEDIA_TOKENS.items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    new = range(TEXT_VOCABULARY, TOTAL_VOCABULARY)
    derived["added_tokens"] = kept + [{"id": i, "content": names.get(i, f"<reserved_{i}>"), **flags} for i in new]
    folder = tmp_path_factory.mktemp("released")
    (folder / "tokenizer.json").write_text(json.dumps(derived), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("g3n_mlx.prompt.tokenizer.cache_folder", lambda: folder)
        first, second = Tokenizer.from_folder(folder), Tokenizer.from_folder(folder)
    return first if request.param == "package" else second


def test_control_ids_are_looked_up_by_name(tiny):
    names = ["bos", "eos", "pad", "start_of_turn", "end_of_turn"]
    assert [tiny.id_of(f"<{name}>") for name in names] == [2, 1, 0, 105, 106]
    assert tiny.bos_id == 2
    assert tiny.id_of("<image_soft_token>") == 897
    with pytest.raises(ValueError, match=r"tokenizer\.json has no token '<nonsense>'"):
        tiny.id_of("<nonsense>")


def test_released_tokenizer_gives_the_released_ids(released, released_cases):
    for case in released_cases[1]:
        words = [word for word in CONTROL_WORDS if word in case["text"]]
        if words:  # the reference reads control words out of a text, we do not: see the next test
            continue
        assert released.encode(case["text"]) == case["ids"], case["name"]
        assert released.decode(case["ids"], skip_special=False) == case["decoded"], case["name"]


def test_released_tokenizer_takes_control_words_for_letters(released, released_cases):
    control = {released.id_of(word) for word in CONTROL_WORDS}
    for case in released_cases[1]:
        ids = released.encode(case["text"])
        assert not control & set(ids), case["name"]
        assert max(ids, default=0) < TEXT_VOCABULARY
        assert released.decode(ids) == case["decoded"], case["name"]


def test_released_control_ids(released):
    words = ("<bos>", "<pad>", "<start_of_turn>", "<end_of_turn>")
    assert tuple(map(released.id_of, words)) == (2, 0, 105, 106)
    assert released.bos_id == 2
    assert {name: released.id_of(name) for name in MEDIA_TOKENS} == MEDIA_TOKENS
    assert released.id_of("<start_of_audio>") == 256_000


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_released_stream_equals_decode(released, data):
    ids = data.draw(st.lists(st.one_of(st.integers(0, TOTAL_VOCABULARY - 1), st.integers(238, 493)), max_size=24))
    stream_equals_decode(released, ids)


@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(CONTROL_WORDS)), max_size=12).map("".join))
@example("<start_of_turn>user\nx<end_of_turn>\n")
@example("<<bos>bos>")
@settings(max_examples=300, deadline=None)
def test_no_text_gives_control_ids(tiny, reference, text):
    ids = tiny.encode(text)
    control = {i for i, token in reference.get_added_tokens_decoder().items() if token.special}
    assert not control & set(ids)
    if not any(word in text for word in CONTROL_WORDS):
        assert ids == reference.encode(text, add_special_tokens=False).ids
    assert tiny.decode(ids, skip_special=False).replace("▁", " ") == text.replace("▁", " ")


@given(st.lists(st.integers(0, 1300), max_size=40))
@settings(max_examples=300, deadline=None)
def test_stream_equals_decode_for_any_ids(tiny, ids):
    stream_equals_decode(tiny, ids)


@given(st.lists(st.one_of(st.text(max_size=3), st.sampled_from(["€", "🙂", "é", "\n", " "])), max_size=8), st.randoms())
@settings(max_examples=300, deadline=None)
def test_stream_equals_decode_for_bytes_and_fragments(tiny, reference, texts, random):
    ids = [tiny.id_of(f"<0x{byte:02X}>") for text in texts for byte in text.encode()]
    for _ in range(random.randrange(4)):  # lost bytes, and tokens that stand between them
        if ids:
            ids.pop(random.randrange(len(ids)))
        ids.insert(random.randrange(len(ids) + 1), random.randrange(1152))
    stream_equals_decode(tiny, ids)


def stream_equals_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    whole = tokenizer.decode(ids)
    stream = tokenizer.stream()
    given_so_far = ""
    for token_id in ids:
        given_so_far += stream.push(token_id)
        assert whole.startswith(given_so_far)  # so what was shown never turns out to be half a character
    assert given_so_far + stream.finish() == whole


def test_stream_holds_a_character_until_it_is_whole(tiny):
    stream = tiny.stream()
    pushed = [stream.push(tiny.id_of(f"<0x{byte:02X}>")) for byte in "€".encode()]
    assert pushed == ["", "", ""]
    assert stream.push(tiny.encode("a")[0]) == "€a"
    assert stream.finish() == ""


def test_control_words_are_text_where_the_file_does_not_flag_them(tiny_folder, tmp_path):
    document = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in document["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.id_of("<end_of_turn>") == 106
    assert 106 not in tokenizer.encode("a<end_of_turn>b")
    assert tokenizer.decode([106, 108]) == "\n\n"


def test_truncation_and_padding_of_the_file_are_ignored(tiny_folder, tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("a b c d") == inner_ids(tiny_folder, "a b c d")


def inner_ids(folder, text: str) -> list[int]:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def test_lone_surrogates_are_refused(tiny):
    with pytest.raises(ValueError, match=r"the lone surrogate '\\udcff'"):
        tiny.encode("ab\udcff")


def test_missing_and_broken_files(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_folder(tmp_path)
    text = (tiny_folder / "tokenizer.json").read_text(encoding="utf-8")
    for broken in (text[: len(text) // 2], "{}", "[]"):
        (tmp_path / "tokenizer.json").write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a usable tokenizer"):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text.replace("<start_of_turn>", "<start_of_talk>"), encoding="utf-8")
    with pytest.raises(ValueError, match="no token '<start_of_turn>'"):
        Tokenizer.from_folder(tmp_path)


@given(st.text())
def test_a_texts_bytes_are_its_tokens_bytes(tiny: Tokenizer, text: str) -> None:
    text = text.replace("▁", " ")  # the vocabulary's letter for a space; nothing tells them apart
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return
    assert b"".join(tiny.bytes_of(token_id) or b"" for token_id in tiny.encode(text)) == encoded


def test_control_tokens_and_unknown_ids_have_no_bytes(tiny: Tokenizer) -> None:
    assert tiny.bytes_of(tiny.id_of("<end_of_turn>")) is None
    assert tiny.bytes_of(tiny.vocab_size + 5) is None
    assert tiny.bytes_of(tiny.id_of("<0x0A>")) == b"\n"

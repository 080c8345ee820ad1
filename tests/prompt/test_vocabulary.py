"""A vocabulary out of tables beside the tokenizers package, and the file that keeps it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from g3n_mlx.prompt import tokenizer as tokenizer_file
from g3n_mlx.prompt.tokenizer import CONTROL_WORDS, Tokenizer
from g3n_mlx.prompt.vocabulary import Vocabulary, keep

LETTERS = st.one_of(
    st.text(max_size=12), st.text("ab ▁\n\t<>/the1é漢🙂\0", max_size=30), st.sampled_from(CONTROL_WORDS)
)
TEXTS = st.lists(LETTERS, max_size=12).map("".join)


@pytest.fixture(scope="module")
def package(tiny_folder) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    inner.encode_special_tokens = True
    return inner


@pytest.fixture(scope="module")
def vocabulary(package, tiny_folder, tmp_path_factory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("tables")
    keep(package, tiny_folder / "tokenizer.json", folder)
    found = Vocabulary.kept(tiny_folder / "tokenizer.json", folder)
    assert found is not None
    return found


@pytest.fixture
def source(tiny_folder, tmp_path) -> Path:
    """A tokenizer.json that may be changed."""
    return Path(shutil.copy(tiny_folder / "tokenizer.json", tmp_path))


@pytest.fixture
def loaded(source, monkeypatch):
    """Loads the tokenizer as one that is large enough to be kept, in a cache beside it."""
    monkeypatch.setattr(tokenizer_file, "_SMALL_FILE", 0)
    monkeypatch.setattr(tokenizer_file, "cache_folder", lambda: source.parent / "cache")
    return lambda: Tokenizer.from_folder(source.parent)


def tables_of(source: Path) -> list[Path]:
    return list((source.parent / "cache").glob("tokenizers/*"))


def is_kept(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer._inner, Vocabulary)


@given(TEXTS)
@example("aaaaaaaaaaaa" * 20)
@example("<<bos>bos>\n\n\n\n\n\n x")
@example("the  the\u2581the")
@settings(max_examples=500, deadline=None)
def test_texts_give_the_packages_ids(vocabulary, package, text):
    assert vocabulary.encode(text) == package.encode(text, add_special_tokens=False).ids


@given(st.lists(st.integers(0, 1300) | st.integers(238, 493), max_size=40), st.booleans())
@settings(max_examples=500, deadline=None)
def test_ids_give_the_packages_text(vocabulary, package, ids, skip):
    assert vocabulary.decode(ids, skip) == package.decode(ids, skip_special_tokens=skip)


def test_every_token_has_the_packages_id(vocabulary, package):
    for token, token_id in package.get_vocab().items():
        assert vocabulary.token_to_id(token) == token_id
    assert [vocabulary.id_to_token(i) for i in range(2000)] == [package.id_to_token(i) for i in range(2000)]
    assert vocabulary.get_vocab_size() == package.get_vocab_size()
    assert vocabulary.max_token_bytes == max(len(token.encode()) for token in package.get_vocab())
    assert vocabulary.token_to_id("<nonsense>") is None


@st.composite
def documents(draw) -> dict:
    """A tokenizer.json of few letters and many merges, whose ranks say nothing about the ids that they make."""
    words = [f"<0x{byte:02X}>" for byte in range(256)] + draw(st.permutations([*"abc▁"]))
    merges: list[list[str]] = []
    for _ in range(draw(st.integers(0, 20))):
        left, right = draw(st.sampled_from(words[256:])), draw(st.sampled_from(words[256:]))
        merges.append([left, right])
        if left + right not in words:
            words.append(left + right)
    document = json.loads((Path(__file__).parents[1] / "tiny-gemma3n/tokenizer.json").read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = draw(st.lists(st.text("abc ▁", min_size=1, max_size=3), unique=True, max_size=4))
    document["added_tokens"] = [
        {"id": len(words) + i, "content": word, "special": draw(st.booleans()), **flags} for i, word in enumerate(added)
    ]
    document["post_processor"] = None
    document["model"] |= {
        "vocab": {word: i for i, word in enumerate(words)},
        "merges": draw(st.permutations(merges)),
        "unk_token": None,
    }
    return document


@given(documents(), st.lists(st.text("abcd ▁", max_size=20), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_merges_go_as_in_the_package(tmp_path_factory, document, texts):
    folder = tmp_path_factory.mktemp("any")
    source = folder / "tokenizer.json"
    source.write_text(json.dumps(document), encoding="utf-8")
    package = tokenizers.Tokenizer.from_file(str(source))
    package.encode_special_tokens = True
    keep(package, source, folder)
    vocabulary = Vocabulary.kept(source, folder)
    assert vocabulary is not None
    for text in texts:
        assert vocabulary.encode(text) == package.encode(text, add_special_tokens=False).ids


def test_the_second_load_takes_the_tables(loaded, source):
    first = loaded()
    assert not is_kept(first)
    second = loaded()
    assert is_kept(second)
    text = "The quick brown <end_of_turn> fox\n\n"
    assert second.encode(text) == first.encode(text)
    assert (second.vocab_size, second.max_token_bytes) == (first.vocab_size, first.max_token_bytes)
    with pytest.raises(ValueError, match=r"the lone surrogate '\\udcff'"):
        second.encode("ab\udcff")


def test_a_long_text_goes_to_the_package(loaded):
    loaded()
    tokenizer = loaded()
    text = "the lazy dog " * 2000
    assert "_package" not in vars(tokenizer)
    ids = tokenizer.encode(text)
    assert "_package" in vars(tokenizer)
    assert ids == tokenizer._inner.encode(text)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_damaged_tables_are_made_again(loaded, source, damage):
    loaded()
    (tables,) = tables_of(source)
    whole = tables.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    tables.write_bytes({"cut": whole[:-5], "flipped": changed, "empty": b"", "foreign": b"PK\3\4" * 20}[damage])
    assert not is_kept(loaded())
    assert tables_of(source) == [tables]
    assert tables.read_bytes() == whole
    assert is_kept(loaded())


def test_another_tokenizer_in_the_same_place_is_read_anew(loaded, source):
    loaded()
    document = json.loads(source.read_text(encoding="utf-8"))
    document["model"]["merges"] = []
    source.write_text(json.dumps(document), encoding="utf-8")
    letters = loaded()
    assert not is_kept(letters)
    assert loaded().encode("there") == letters.encode("there")
    assert len(letters.encode("there")) == 5


def test_a_cache_that_can_not_be_written_to_is_no_error(loaded, source, monkeypatch):
    (source.parent / "cache").write_text("a file, where a folder would be made")
    assert loaded().encode("the")
    (source.parent / "cache").unlink()

    def refused(*_):
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "replace", refused)
    assert loaded().encode("the")
    assert tables_of(source) == []


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"decoder": None},
    ],
)
def test_other_kinds_of_tokenizers_are_left_to_the_package(loaded, source, change):
    document = json.loads(source.read_text(encoding="utf-8")) | change
    source.write_text(json.dumps(document), encoding="utf-8")
    loaded()
    assert tables_of(source) == []
    assert not is_kept(loaded())


@pytest.mark.parametrize(("name", "value"), [("ignore_merges", True), ("byte_fallback", False), ("dropout", 0.5)])
def test_other_kinds_of_merging_are_left_to_the_package(loaded, source, name, value):
    document = json.loads(source.read_text(encoding="utf-8"))
    document["model"][name] = value
    source.write_text(json.dumps(document), encoding="utf-8")
    loaded()
    assert tables_of(source) == []


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "normalized"])
def test_other_kinds_of_added_tokens_are_left_to_the_package(loaded, source, flag):
    document = json.loads(source.read_text(encoding="utf-8"))
    document["added_tokens"][-1][flag] = True
    source.write_text(json.dumps(document), encoding="utf-8")
    loaded()
    assert tables_of(source) == []

"""GGUF headers: what was written is read, and a damaged file is one clear error."""

import pytest
from gguf_files import GEMMA3N_BYTES_PER_TOKEN, padded, write_gemma3n, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n_mlx.bench.reads import bytes_per_token
from g3n_mlx.checkpoint.gguf import read_header
from g3n_mlx.failures import BadValue

NAMES = st.text(max_size=12)
NUMBERS = st.integers(0, 2**40) | st.booleans() | st.floats(width=32, allow_nan=False)
SCALARS = NUMBERS | st.text(max_size=20)
ARRAYS = st.lists(st.text(max_size=5), max_size=5) | st.lists(st.booleans(), max_size=5)
METADATA = st.dictionaries(NAMES.filter(lambda name: name != "general.alignment"), SCALARS | ARRAYS, max_size=6)
TENSORS = st.dictionaries(NAMES, st.integers(1, 300), max_size=6)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


@settings(deadline=None)
@given(METADATA, TENSORS, st.sampled_from([2, 3]))
def test_what_was_written_is_read(path, metadata, tensors, version):
    header = read_header(write_gguf(path, metadata, tensors, version))
    assert header.metadata == {key: len(v) if isinstance(v, list) else v for key, v in metadata.items()}
    assert {name: tensor.room for name, tensor in header.tensors.items()} == {
        name: padded(size) for name, size in tensors.items()
    }


@settings(deadline=None)
@given(METADATA, TENSORS.filter(bool), st.data())
def test_a_file_that_is_cut_off_is_said_to_be(path, metadata, tensors, data):
    whole = write_gguf(path, metadata, tensors).read_bytes()
    last = padded(list(tensors.values())[-1])
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - last - 1))])
    with pytest.raises(BadValue, match="not a whole GGUF file"):
        read_header(path)


@settings(deadline=None)
@given(METADATA, TENSORS, st.data())
def test_a_damaged_header_is_read_or_said_to_be_damaged(path, metadata, tensors, data):
    content = bytearray(write_gguf(path, metadata, tensors).read_bytes())
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        header = read_header(path)
    except BadValue:
        return
    assert all(tensor.room >= 0 for tensor in header.tensors.values())


def test_other_files_are_said_to_be_others(path):
    for content in (b"", b"GGUF", b"PK\x03\x04" + bytes(100), b"GGUF" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(BadValue, match="not a whole GGUF file of version 2 or 3"):
            read_header(path)


def test_what_a_decode_step_reads(path):
    """Neither the PLE table nor the keys' and values' weights of layers that share others'."""
    assert bytes_per_token(read_header(write_gemma3n(path))) == GEMMA3N_BYTES_PER_TOKEN

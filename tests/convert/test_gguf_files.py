"""GGUF files become folders: exact values, config, tokenizer, and one error for what can't be read."""

import gguf.quants
import numpy as np
import pytest
from checkpoint_files import read_config
from gguf_models import Kind, gguf_tensors, random_rows, write_model
from tokenizers import Tokenizer

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import dequantize
from g3n_mlx.convert import convert
from g3n_mlx.convert.__main__ import main as convert_command
from g3n_mlx.convert.gguf.blocks import AFFINE, packed_parts, stored_as
from g3n_mlx.convert.gguf.names import text_name
from g3n_mlx.failures import BadValue, MissingFile
from g3n_mlx.loading import load

EXACT = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K)
IDS = [2, 300, 41, 512, 77, 900, 301, 333]
TEXTS = ("The cat  sat.\n\nOn a   mat, naïve ☃ 𝄞", "<start_of_turn>user\nhe the then", "a\n\n\nb\t<unused3> <0x41>")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("g3n_mlx.convert.gguf.cache_folder", lambda: tmp_path / "cache")


def dequantized(kind: Kind, rows: np.ndarray, width: int) -> np.ndarray:
    how = stored_as(int(kind), width)
    assert how is not None
    return dequantize(*packed_parts(int(kind), rows), how.bits, how.group_size)


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_a_type_that_is_affine_in_groups_of_32_keeps_every_value(kind):
    if kind in (Kind.Q4_K, Kind.Q5_K):
        rows = random_rows(5, 768, kind)
    else:
        rows = gguf.quants.quantize(np.random.default_rng(0).normal(0, 3, (5, 768)).astype(np.float32), kind)
    np.testing.assert_array_equal(dequantized(kind, rows, 768), gguf.quants.dequantize(rows, kind))


def test_those_types_are_all_that_there_are():
    assert {int(kind) for kind in EXACT} == set(AFFINE)


@pytest.mark.parametrize("kind", [Kind.Q6_K, Kind.Q3_K], ids=lambda kind: kind.name)
def test_another_type_is_rounded_to_8_bits(kind):
    rows = random_rows(5, 512, kind)
    weights = gguf.quants.dequantize(rows, kind)
    groups = weights.reshape(5, -1, 64)
    steps = np.ptp(groups, axis=-1, keepdims=True) / 255
    error = np.abs(dequantized(kind, rows, 512).reshape(groups.shape) - groups)
    # The edge of larger magnitude becomes a multiple of the scale, which moves the grid by a part of a step.
    assert (error <= steps * 1.01).all()
    assert error.max() > 0


def matrices(meaning: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """What a GGUF file's tensors stand for, by our names."""
    found = {}
    for name, array in meaning.items():
        if array.ndim == 3:
            base = "altup_unembed_projections" if "unembd" in name else "altup_projections"
            found |= {f"language_model.{base}.{stream}.weight": part for stream, part in enumerate(array)}
        else:
            if name == "per_layer_token_embd.weight":
                array = array[: config["vocab_size_per_layer_input"]]
            found[f"language_model.{text_name(name)}"] = array
    return found


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q5_1, Kind.Q8_0], ids=lambda k: k.name)
def test_a_file_becomes_a_folder_with_the_same_numbers(kind, tiny_folder, tmp_path):
    meaning = write_model(tmp_path / "tiny.gguf", tiny_folder, kind)
    folder = convert(tmp_path / "tiny.gguf", tmp_path / "out", progress=False)
    config = read_config(tiny_folder)["text_config"]
    made = read_config(folder)["text_config"]
    left = {key: made[key] for key in made if key in config and made[key] != config[key]}
    assert left == {}
    checkpoint = Checkpoint.open(folder)
    assert (kind in EXACT) == bool(checkpoint.quantizations)
    for name, expected in matrices(meaning, config).items():
        how = checkpoint.quantization(name.removesuffix(".weight"))
        if how is None:
            found = checkpoint.read(name).astype(np.float32)
        else:
            parts = (checkpoint.read(f"{name.removesuffix('weight')}{part}") for part in ("weight", "scales", "biases"))
            found = dequantize(*parts, how.bits, how.group_size)
        np.testing.assert_array_equal(found, expected, err_msg=name)
    checkpoint.close()


def test_the_tokenizer_is_made_of_the_metadata(tiny_folder, tmp_path):
    write_model(tmp_path / "tiny.gguf", tiny_folder)
    folder = convert(tmp_path / "tiny.gguf", tmp_path / "out", progress=False)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
    template = "chat_template.jinja"
    assert (folder / template).read_text("utf-8") == (tiny_folder / template).read_text("utf-8")
    assert read_config(folder)["eos_token_id"] == [1, 106]


def test_a_slice_and_other_bits_of_a_file(tiny_folder, tmp_path, caplog):
    path = tmp_path / "tiny.gguf"
    write_model(path, tiny_folder, Kind.F16)
    convert(path, tmp_path / "small", q_bits=4, q_group_size=32, progress=False)
    assert Checkpoint.open(tmp_path / "small").quantizations
    write_model(path, tiny_folder, Kind.Q8_0)
    with pytest.raises(BadValue, match="is quantized already"):
        convert(path, tmp_path / "smaller", q_bits=4, progress=False)
    assert convert_command(["--gguf", str(path), "-o", str(tmp_path / "again"), "-q", "--dequantize"]) == 0
    assert "the model reads text alone" in caplog.text


@pytest.fixture(scope="module")
def small(tiny_folder, tmp_path_factory):
    """A file of 8 bits and its folder; quantized in groups of 32, so that slices may have widths like 96."""
    folder = tmp_path_factory.mktemp("small")
    write_model(folder / "tiny.gguf", tiny_folder, Kind.Q8_0)
    return folder / "tiny.gguf", convert(folder / "tiny.gguf", folder / "out", progress=False)


def test_both_backends_answer_with_the_same_tokens(small, backends):
    answers = []
    for backend in backends:
        with load(small[1], backend=backend, dtype="float32") as model:
            answers.append(model.generate(IDS, temperature=0, ignore_eos=True, max_tokens=12).token_ids)
    assert len(answers) == 2
    assert answers[0] == answers[1]


def test_a_slice_at_load_is_that_of_a_conversion(small, tmp_path):
    path, whole = small
    table = tmp_path / "slices.csv"
    table.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        'Mixed,8,,,"[256, 192, 128, 256, 96, 128, 64, 192]","[1, 6]"\n'
    )
    how = {"matformer": "mixed", "matformer_config": table}
    sliced = convert(path, tmp_path / "sliced", progress=False, **how)
    assert read_config(sliced)["text_config"]["intermediate_size"] == [256, 192, 128, 256, 96, 128, 64, 192]
    logits = []
    for source, options in ((sliced, {}), (path, how), (whole, how)):
        with load(source, backend="torch", dtype="float32", **options) as model:
            logits.append(model.logits(IDS))
    np.testing.assert_array_equal(logits[1], logits[0])
    np.testing.assert_array_equal(logits[2], logits[0])


def test_another_folders_tokenizer(tiny_folder, tmp_path):
    write_model(tmp_path / "tiny.gguf", tiny_folder, tokenizer__ggml__model="bert")
    with pytest.raises(BadValue, match=r"holds no tokenizer of Gemma's kind .*--tokenizer FOLDER"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    folder = convert(tmp_path / "tiny.gguf", tmp_path / "out", tokenizer=tiny_folder, progress=False)
    assert (folder / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("without", "changes", "message"),
    [
        ("", {"architecture": "llama"}, "the architecture is 'llama', expected 'gemma3n'"),
        ("", {"architecture": "clip"}, "holds towers alone"),
        ("", {"split__count": 3}, "one of 3 parts: join them"),
        ("gemma3n.altup.num_inputs", {}, "lacks gemma3n.altup.num_inputs"),
        ("", {"gemma3n__block_count": 40}, "expected 40 values"),
        ("", {"gemma3n__block_count": "many"}, "is 'many', expected an integer"),
        ("", {"gemma3n__attention__head_count": 3}, "num_attention_heads .3. is not a multiple"),
        ("", {"gemma3n__attention__key_length": 64}, "does not hold the tensors"),
    ],
)
def test_a_file_that_does_not_fit_is_one_error(tiny_folder, tmp_path, without, changes, message):
    write_model(tmp_path / "tiny.gguf", tiny_folder, without=without, **changes)
    with pytest.raises(BadValue, match=message):
        convert(tmp_path / "tiny.gguf", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_cut_off_or_absent(tiny_folder, tmp_path):
    path = tmp_path / "tiny.gguf"
    with pytest.raises(MissingFile, match="give a GGUF file"):
        convert(path, tmp_path / "out", progress=False)
    write_model(path, tiny_folder, Kind.Q8_0)
    raw = path.read_bytes()
    for length in (3, 500, len(raw) // 2, len(raw) - 4000):
        path.write_bytes(raw[:length])
        with pytest.raises(BadValue, match=r"not a whole GGUF file|damaged or cut off"):
            convert(path, tmp_path / "out", progress=False)


def test_every_tensor_of_the_converter_has_a_name(published):
    config, tensors = published
    for name in gguf_tensors(tensors, config["text_config"]["vocab_size"]):
        assert name.startswith(("altup_proj", "altup_unembd")) or text_name(name) is not None
    assert text_name("output.weight") is text_name("blk.0.attn_q.bias") is text_name("token_embd.bias") is None

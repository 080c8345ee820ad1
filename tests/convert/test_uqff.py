"""Models that mistral.rs has quantized: UQFF files as its version 0.9.5 writes them, made by hand."""

from typing import Any

import checkpoint_files as files
import numpy as np
import pytest
from image_files import drawn
from media_files import tones
from uqff_files import AUDIO, DOWN, PROJECTION, WIDE, afq, read, unquantized, write_uqff

from g3n_mlx import load
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.convert import convert
from g3n_mlx.convert.__main__ import main
from g3n_mlx.convert.uqff import convert_uqff
from g3n_mlx.failures import Error


@pytest.mark.parametrize("kind", WIDE)
def test_blocks_of_llama_cpp_keep_their_numbers(published, tmp_path, kind) -> None:
    """All but Q6_K exactly, and in a tower within bfloat16."""
    source, meant = write_uqff(tmp_path / "u", published, {DOWN: WIDE[kind]})
    made = Checkpoint.open(convert_uqff(source, tmp_path / "made", progress=False))
    exact = meant[DOWN]
    tolerance = np.abs(exact).max() / 127 if kind == "Q6K" else 1e-6 * np.abs(exact).max()
    np.testing.assert_allclose(read(made, DOWN), exact, atol=tolerance, rtol=0)
    bits = {"Q4": 4, "Q5": 5, "Q6": 8, "Q8": 8}[kind[:2]]
    assert [(how.bits, how.group_size) for how in made.quantizations.values()] == [(bits, 32)]


def test_a_folder_of_mixed_formats(published, tmp_path) -> None:
    tensors = published[1]
    encoders: dict[str, Any] = {
        "model.language_model.embed_tokens": lambda weight: afq(weight, 6, 64),
        "model.language_model.layers.0.self_attn.q_proj": afq,
        "model.language_model.layers.1.self_attn.q_proj": unquantized,
        DOWN: WIDE["Q8_0"],
        AUDIO: afq,
    }
    source, meant = write_uqff(tmp_path / "u", published, encoders)
    made = Checkpoint.open(convert_uqff(source, tmp_path / "made", progress=False))
    for path, values in meant.items():
        np.testing.assert_allclose(read(made, path), values, rtol=2**-8 if path == AUDIO else 1e-6, atol=1e-6)
    assert made.quantization(AUDIO.removeprefix("model.")) is None
    for name in made.names:
        path = f"model.{name.rpartition('.')[0]}"
        if path not in meant:
            assert files.same(made.read(name), tensors[f"model.{name}"]), name


def test_it_is_loaded_like_any_model(published, tiny_folder, backend, tmp_path, monkeypatch, capsys) -> None:
    """Once through the cache, and by the command: the answers of the quantization itself."""
    monkeypatch.setattr("g3n_mlx.convert.uqff.cache_folder", lambda: tmp_path / "cache")
    expected = convert(tiny_folder, tmp_path / "q", q_bits=4, q_group_size=32, progress=False)
    modules = [f"model.{path}" for path in Checkpoint.open(expected).quantizations if "per_layer.weight" not in path]
    encoders = {path: afq for path in modules if not path.endswith("embed_tokens_per_layer")}
    encoders["model.language_model.embed_tokens_per_layer"] = lambda weight: afq(weight, 8)
    source, _ = write_uqff(tmp_path / "u", published, encoders)
    files.copy_sidecars(tiny_folder, source)
    options, ids = {"backend": backend, "dtype": "float32", "device": "cpu"}, [2, *range(300, 320)]
    with load(expected, **options) as ours, load(source, **options) as theirs:
        assert theirs.name == "u"
        np.testing.assert_allclose(theirs.logits(ids), ours.logits(ids), atol=1e-4)
    assert len(list((tmp_path / "cache" / "conversions").glob("u-uqff-*"))) == 1
    assert main(["--uqff", str(source), "-o", str(tmp_path / "made")]) == 0
    assert "wrote" in capsys.readouterr().err
    source, _ = write_uqff(tmp_path / "mixed", published, {DOWN: WIDE["Q4K"]})
    files.copy_sidecars(tiny_folder, source)
    with load(source, **options) as model, load(tiny_folder, **options) as plain:
        assert np.isfinite(model.logits(ids)).all()
        assert np.abs(model.logits(ids) - plain.logits(ids)).max() > 1e-3


def test_pictures_and_sounds_are_those_of_the_source(published, tiny_folder, backend, tmp_path, monkeypatch) -> None:
    """What mistral.rs leaves of the towers as it is gives the same soft tokens, and they are read beside the text."""
    monkeypatch.setattr("g3n_mlx.convert.uqff.cache_folder", lambda: tmp_path / "cache")
    encoders = {DOWN: unquantized, PROJECTION: unquantized, AUDIO: unquantized}
    source, _ = write_uqff(tmp_path / "u", published, encoders)
    files.copy_sidecars(tiny_folder, source)
    options, picture, sound = {"backend": backend, "dtype": "float32", "device": "cpu"}, drawn(), tones(16000)
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    with load(source, **options) as ours, load(tiny_folder, **options) as theirs:
        np.testing.assert_array_equal(ours.encode_image(picture), theirs.encode_image(picture))
        np.testing.assert_array_equal(ours.encode_audio(sound, 16000), theirs.encode_audio(sound, 16000))
        np.testing.assert_array_equal(ours.logits(ours.prepare(messages)), theirs.logits(theirs.prepare(messages)))
    # Quantized by mistral.rs, the projection behind the tower is at its new numbers, as in a dense checkpoint of them.
    source, meant = write_uqff(tmp_path / "quantized", published, {PROJECTION: afq})
    files.copy_sidecars(tiny_folder, source)
    config, tensors = published
    dense = files.write_folder(tmp_path / "dense", config, dict(tensors) | {f"{PROJECTION}.weight": meant[PROJECTION]})
    files.copy_sidecars(tiny_folder, dense)
    with load(source, **options) as ours, load(dense, **options) as theirs:
        np.testing.assert_allclose(ours.encode_image(picture), theirs.encode_image(picture), atol=1e-4)


def test_one_of_several_models_in_a_folder(published, tiny_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("g3n_mlx.convert.uqff.cache_folder", lambda: tmp_path / "cache")
    source, meant = write_uqff(tmp_path / "u", published, {DOWN: afq})
    files.copy_sidecars(tiny_folder, source)
    (source / "model-0.uqff").rename(source / "gemma-3n-it-afq4.uqff")
    write_uqff(tmp_path / "other", published, {DOWN: WIDE["Q8_0"]})[0].joinpath("model-0.uqff").rename(
        source / "q8_0-0.uqff"
    )
    with pytest.raises(Error, match=r"u holds 2 models of mistral.rs, gemma-3n-it-afq4, q8_0: name one"):
        convert(source, tmp_path / "made", dequantize=True)
    chosen = source / "gemma-3n-it-afq4.uqff"
    assert main(["--uqff", str(chosen), "-o", str(tmp_path / "made")]) == 0
    np.testing.assert_array_equal(read(Checkpoint.open(tmp_path / "made"), DOWN), meant[DOWN])
    convert(str(chosen), tmp_path / "dense", dequantize=True, dtype="float32", progress=False)
    np.testing.assert_array_equal(read(Checkpoint.open(tmp_path / "dense"), DOWN), meant[DOWN])
    assert len(list((tmp_path / "cache" / "conversions").glob("gemma-3n-it-afq4-uqff-*"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("uqff.version.major"),
            "before version 1.0, which mistral.rs itself no longer reads",
        ),
        (lambda t: t.update({"uqff.version.major": np.uint32(2)}), "is UQFF 2.2: up to 1.2 is read"),
        (lambda t: t.update({"uqff.version.minor": np.uint32(3)}), "is UQFF 1.3: up to 1.2 is read"),
        (lambda t: t.update({f"{DOWN}.weight.format": np.uint8(3)}), "is stored as FP8, which is not read"),
        (lambda t: t.update({f"{DOWN}.weight.format": np.uint8(9)}), "is stored as format 9, which is not read"),
        (lambda t: t.update({f"{DOWN}.weight.dtype": np.uint32(10)}), "is stored as ggml type 10, which is not read"),
        (lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][:-1]}), "expected Q8_0 of"),
        (lambda t: t.pop(f"{DOWN}.weight"), "is not there, but what belongs to it"),
    ],
)
def test_what_can_not_be_read_is_one_error(published, tmp_path, change, message) -> None:
    source, _ = write_uqff(tmp_path / "u", published, {DOWN: WIDE["Q8_0"]})
    tensors = files.read_safetensors(source / "model-0.uqff")
    change(tensors)
    files.write_safetensors(source / "model-0.uqff", tensors)
    with pytest.raises(Error, match=message):
        convert_uqff(source, tmp_path / "made", progress=False)
    assert not (tmp_path / "made").exists()


def test_folders_that_are_none(published, tiny_folder, tmp_path, capsys) -> None:
    source, _ = write_uqff(tmp_path / "u", published, {DOWN: afq})
    with pytest.raises(Error, match=r"is a UQFF model of mistral.rs: g3n convert --uqff"):
        Checkpoint.open(source)
    with pytest.raises(Error, match=r"holds no \*.uqff files"):
        convert_uqff(tiny_folder, tmp_path / "made")
    with pytest.raises(Error, match=r"u has no q4k-0.uqff, but model: name one by its file, as in .*u/model-0.uqff"):
        load(source / "q4k-0.uqff")
    (source / "residual.safetensors").unlink()
    with pytest.raises(Error, match=r"lacks residual.safetensors"):
        convert_uqff(source, tmp_path / "made")
    with pytest.raises(SystemExit):
        main(["--uqff", str(source), "-o", str(tmp_path / "made"), "-q"])
    assert "--uqff converts what is there: leave out --quantize" in capsys.readouterr().err

"""A GGUF file of towers beside the language model's: every tensor by its published name, and one error for misfits."""

import json
import shutil

import numpy as np
import pytest
from checkpoint_files import read_config, read_folder
from gguf_models import Kind, write_model, write_towers

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.vision import vision_manifest
from g3n_mlx.convert import convert
from g3n_mlx.convert.__main__ import main as convert_command
from g3n_mlx.convert.gguf.towers import tower_name
from g3n_mlx.failures import BadValue, MissingFile
from g3n_mlx.loading import load
from g3n_mlx.matformer.table import PUBLISHED

RATE = 16_000
OF_TOWER = {
    "vision": ("vision_config", "vision_soft_tokens_per_image", "image_token_id", "boi_token_id", "eoi_token_id"),
    "audio": ("audio_config", "audio_soft_tokens_per_image", "audio_token_id", "boa_token_id", "eoa_token_id"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("g3n_mlx.convert.gguf.cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(autouse=True)
def tiny_towers(tiny_folder, tmp_path_factory, monkeypatch):
    """The tiny checkpoint's towers stand for the published ones, of which a file says no size."""
    config, folder = read_config(tiny_folder), tmp_path_factory.mktemp("published")
    raw = {kind: {key: config[key] for key in keys} for kind, keys in OF_TOWER.items()}
    raw["preprocessor_config"] = read_json(tiny_folder / "preprocessor_config.json")
    (folder / "gemma3n-towers.json").write_text(json.dumps(raw))
    monkeypatch.setattr("g3n_mlx.convert.gguf.towers.PUBLISHED", folder / PUBLISHED.name)
    return folder / "gemma3n-towers.json"


@pytest.fixture(scope="module")
def language_model(tiny_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path, tiny_folder, Kind.BF16)
    return path


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.F16, Kind.Q8_0], ids=lambda kind: kind.name)
def test_every_tensor_has_the_published_name_and_shape(kind, language_model, tiny_folder, tmp_path):
    meaning = write_towers(tmp_path / "mmproj.gguf", tiny_folder, kind)
    folder = convert(language_model, tmp_path / "out", mmproj=tmp_path / "mmproj.gguf", progress=False)
    found, published = read_folder(folder), read_folder(tiny_folder)
    assert {name for name in found if "language_model" not in name} == set(meaning)
    for name, expected in meaning.items():
        assert found[name].shape == published[name].shape
        np.testing.assert_array_equal(found[name].astype(np.float32).reshape(-1), expected, err_msg=name)
    config, theirs = read_config(folder), read_config(tiny_folder)
    assert all(config[key] == theirs[key] for keys in OF_TOWER.values() for key in keys)


def test_soft_tokens_are_those_of_the_source(language_model, tiny_folder, tmp_path, backend):
    write_towers(tmp_path / "mmproj.gguf", tiny_folder)
    folder = convert(language_model, tmp_path / "out", mmproj=tmp_path / "mmproj.gguf", progress=False)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (40, 60, 3), np.uint8)
    waveform = draw.normal(0, 0.1, RATE // 2).astype(np.float32)
    with (
        load(folder, backend=backend, dtype="float32") as ours,
        load(tiny_folder, backend=backend, dtype="float32") as source,
    ):
        for encode in ("encode_image", "encode_audio"):
            media = (pixels,) if encode == "encode_image" else (waveform, RATE)
            expected = getattr(source, encode)(*media)
            # Audio's first projection is float16 in the file, in which the smallest of its weights are rounded.
            np.testing.assert_allclose(getattr(ours, encode)(*media), expected, atol=1e-4 * expected.std())


def test_the_only_file_of_towers_beside_a_model_is_taken(language_model, tiny_folder, tmp_path, caplog):
    path = shutil.copyfile(language_model, tmp_path / "tiny.gguf")
    write_towers(tmp_path / "mmproj-F16.gguf", tiny_folder, Kind.F16)
    write_towers(tmp_path / "mmproj-other.gguf", tiny_folder, clip__vision__projector_type="gemma3")
    with load(path, backend="torch") as model:
        assert model.config.media_kinds == ("image", "audio")
    write_towers(tmp_path / "mmproj-BF16.gguf", tiny_folder)
    assert convert_command(["--gguf", str(path), "-o", str(tmp_path / "text")]) == 0
    assert "several files of towers lie beside it, mmproj-BF16.gguf, mmproj-F16.gguf" in caplog.text
    assert "the model reads text alone" in caplog.text
    named = ["--gguf", str(path), "--mmproj", str(tmp_path / "mmproj-BF16.gguf"), "-o", str(tmp_path / "all"), "-q"]
    assert convert_command(named) == 0
    assert ModelConfig.from_file(tmp_path / "all").media_kinds == ("image", "audio")
    assert Checkpoint.open(tmp_path / "all").quantizations


def test_a_file_with_the_vision_tower_alone(language_model, tiny_folder, tmp_path, caplog):
    write_towers(tmp_path / "mmproj.gguf", tiny_folder, without=("model.audio_tower", "model.embed_audio"))
    folder = convert(language_model, tmp_path / "out", mmproj=tmp_path / "mmproj.gguf", progress=False)
    assert ModelConfig.from_file(folder).media_kinds == ("image",)
    assert "has no audio tower: the model reads text and images" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma3n"}, "the architecture is 'gemma3n', expected 'clip': --mmproj takes"),
        ({"clip__vision__projector_type": "gemma3"}, r"the towers are \['gemma3', 'gemma3na'\], expected those of"),
        ({"without": "model.embed_vision.soft"}, r"lacks 1 of the towers' tensors, such as mm.soft_emb_norm.weight"),
        ({"without": "model."}, "holds no tower"),
        ({"more": {"v.extra.weight": np.zeros(4, np.float32)}}, "has a tensor 'v.extra.weight', which"),
    ],
)
def test_a_file_that_does_not_fit_is_one_error(language_model, tiny_folder, tmp_path, options, message):
    write_towers(tmp_path / "mmproj.gguf", tiny_folder, **options)
    with pytest.raises(BadValue, match=message):
        convert(language_model, tmp_path / "out", mmproj=tmp_path / "mmproj.gguf", progress=False)
    assert not (tmp_path / "out").exists()


def test_towers_of_another_size(language_model, tiny_folder, tmp_path, tiny_towers):
    raw = read_json(tiny_towers)
    raw["audio"]["audio_config"]["hidden_size"] = 32
    tiny_towers.write_text(json.dumps(raw))
    write_towers(tmp_path / "mmproj.gguf", tiny_folder)
    message = r"a\.pre_encode\.out\.weight has the shape \[64, 256\], expected \[32, 256\]"
    with pytest.raises(BadValue, match=message):
        convert(language_model, tmp_path / "out", mmproj=tmp_path / "mmproj.gguf", progress=False)


def test_published_towers_have_one_name_for_each_tensor():
    towers = read_json(PUBLISHED.with_name("gemma3n-towers.json"))
    text = read_json(PUBLISHED.with_name("gemma3n-e4b.json"))
    text["intermediate_size"] = [text["intermediate_size"]] * text["num_hidden_layers"]
    raw = {"model_type": "gemma3n", "text_config": text} | towers["vision"] | towers["audio"]
    config = ModelConfig.from_dict(raw)
    assert config.vision is not None
    assert config.audio is not None
    names = [*vision_manifest(config.vision), *audio_manifest(config.audio)]
    assert len({tower_name(name) for name in names}) == len(names)
    assert tower_name("vision_tower.timm_model.blocks.2.9.attn.key.proj.weight") == "v.blk.2.9.attn.key.proj.weight"


def test_towers_need_a_language_model(tiny_folder, tmp_path, capsys):
    with pytest.raises(BadValue, match="mmproj was given without a GGUF file"):
        convert(tiny_folder, tmp_path / "out", mmproj=tmp_path / "mmproj.gguf")
    with pytest.raises(SystemExit):
        convert_command(["--model", str(tiny_folder), "--mmproj", "mmproj.gguf", "-o", str(tmp_path / "out")])
    assert "--mmproj is for a conversion of a GGUF file" in capsys.readouterr().err
    write_model(tmp_path / "tiny.gguf", tiny_folder)
    with pytest.raises(MissingFile, match=r"no\.gguf does not exist"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out", mmproj=tmp_path / "no.gguf")

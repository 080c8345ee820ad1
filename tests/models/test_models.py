"""`g3n models`: what is on this machine, and what `rm` deletes and what it only forgets."""

import shutil

import pytest

from g3n_mlx import load
from g3n_mlx.checkpoint import hub, registry
from g3n_mlx.convert import cached_conversion, convert
from g3n_mlx.models import models, remove
from g3n_mlx.models.__main__ import main


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def here(cache_folder, hub_cache, tiny_folder, tmp_path):
    """A machine with a snapshot of the hub, a conversion of it in the cache, and a slice elsewhere."""
    snapshot = hub_cache / "models--owner--model" / "snapshots" / "0123"
    shutil.copytree(tiny_folder, snapshot)
    with (snapshot / "tokenizer.json").open("a") as stream:
        stream.write("\n")  # not the demo's
    widths = "[" + ", ".join(["128"] * 10) + "]"
    table = tmp_path / "table.csv"
    table.write_text(
        f'name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\nHalf,10,,,"{widths}",\n'
    )
    cached = cached_conversion(snapshot, q_bits=4, progress=False)
    half = convert(snapshot, tmp_path / "half", matformer="half", matformer_config=table, progress=False)
    return {"hub": snapshot, "cached": cached, "half": half}


def g3n_models(capsys, *arguments):
    code = main(arguments)
    return code, *capsys.readouterr()


def test_they_are_listed_with_size_slice_bits_and_last_use(here, capsys, monkeypatch):
    found = {model.folder: model for model in models()}
    assert set(found) == set(here.values())
    for folder, model in found.items():
        assert model.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
        assert model.used is None
    cached, half, of_hub = (found[here[key]] for key in ("cached", "half", "hub"))
    assert [model.name for model in (cached, half, of_hub)] == [here["cached"].name, "half", "owner/model"]
    assert [model.slice_name for model in (cached, half, of_hub)] == ["whole", "Half", None]
    assert [model.bits for model in (cached, half, of_hub)] == [4, None, None]

    monkeypatch.setattr(registry.time, "time", lambda: 1_800_000_000.0)
    registry.note_use(here["half"])
    code, out, _ = g3n_models(capsys)
    assert code == 0
    header, first, *others = out.splitlines()
    assert header.split() == ["NAME", "SIZE", "SLICE", "BITS", "LAST", "USE", "FOLDER"]
    assert first.split()[0] == "half"
    assert "dense  2027-01-1" in first
    assert first.endswith(str(here["half"]))
    assert len(others) == 2


def test_a_load_is_a_use_and_finds_a_conversion_by_its_name(here, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.chdir("/")
    options = {"backend": "torch", "device": "cpu"}
    with load("half", **options) as model:
        assert (model.name, model.checkpoint.folder) == ("half", here["half"])
    with load(tmp_path / "hub/models--owner--model/snapshots/0123", q_bits=4, **options) as model:
        assert model.checkpoint.folder == here["cached"]
    assert {model.folder: model.used is not None for model in models()} == {
        here["half"]: True,
        here["cached"]: True,
        here["hub"]: False,
    }


def test_names_that_are_several_conversions_or_have_no_revision(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match="only a hub id has revisions"):
        hub.resolve("half", "v1")
    registry.register(shutil.copytree(here["half"], tmp_path / "other" / "half"), "x")
    with pytest.raises(ValueError, match=r"'half' is the name of 2 conversions, give a folder: .*half, .*half"):
        hub.resolve("half")
    code, _, err = g3n_models(capsys, "rm", "half")
    assert code == 1
    assert "'half' is the name of 2 conversions" in err
    assert g3n_models(capsys, "rm", str(here["half"]))[0] == 0
    assert hub.resolve("half") == tmp_path / "other" / "half"
    monkeypatch.chdir(tmp_path)
    assert str(hub.resolve("half")) == "half"  # a folder that is here comes first


def test_the_newest_conversion_is_the_default_wherever_it_is(here, tmp_path):
    assert hub.default_model()[0] == here["half"]
    assert str(here["half"]) in hub.default_model()[1]
    registry.forget(here["half"])
    assert hub.default_model()[0] == here["cached"]


def test_rm_deletes_below_the_cache_alone(here, capsys):
    code, out, _ = g3n_models(capsys, "rm", here["cached"].name, "half")
    assert code == 0
    deleted, forgot = out.splitlines()
    assert deleted.startswith(f"deleted {here['cached']}, ")
    assert forgot == f"forgot {here['half']}, which is not in the cache: its files stay where they are"
    assert not here["cached"].exists()
    assert not list(here["cached"].parent.iterdir())
    assert (here["half"] / "model.safetensors").is_file()
    assert [model.name for model in models()] == ["owner/model"]


def test_rm_of_what_it_can_not_remove(here, capsys, tmp_path):
    for name, told in (
        ("owner/model", "`hf cache rm model/owner/model` deletes it"),
        ("nothing", "no conversion is called 'nothing': `g3n models` lists those that are known"),
        (str(here["cached"].parent), "no conversion is called"),
        (str(registry.cache_folder()), "no conversion is called"),
    ):
        code, out, err = g3n_models(capsys, "rm", name)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert told in err
    with pytest.raises(SystemExit):
        main(["rm"])
    assert "rm needs the name" in capsys.readouterr().err
    assert len(models()) == 3


def test_rm_follows_no_link_out_of_the_cache(here, capsys):
    link = here["cached"].parent / "linked"
    link.symlink_to(here["half"], target_is_directory=True)
    assert g3n_models(capsys, "rm", str(link))[0] == 0
    assert (here["half"] / "model.safetensors").is_file()


def test_a_conversion_whose_folder_is_gone_can_be_forgotten(here, capsys):
    shutil.rmtree(here["half"])
    (gone,) = [line for line in g3n_models(capsys)[1].splitlines() if line.startswith("half")]
    assert gone.split()[:4] == ["half", "gone", "Half", "-"]
    assert g3n_models(capsys, "rm", "half")[1] == f"forgot {here['half']}, which was gone\n"
    assert "half" not in [model.name for model in models()]


def test_a_stopped_deletion_leaves_no_model(here, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, ignore_errors=False: _interrupted(ignore_errors))
    with pytest.raises(KeyboardInterrupt):
        remove(here["cached"].name)
    assert here["cached"] not in [model.folder for model in models()]


def _interrupted(ignored):
    if not ignored:
        raise KeyboardInterrupt


def test_a_machine_without_models(cache_folder, hub_cache, capsys):
    code, out, err = g3n_models(capsys)
    assert (code, out) == (0, "")
    assert "no conversions here" in err

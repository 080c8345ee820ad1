"""doctor: the facts are there, whatever fails."""

import importlib.util
import json
import os
import sys
import tomllib

import pytest

from g3n_mlx.doctor import backends as backend_probes
from g3n_mlx.doctor import machine, models, parity, software
from g3n_mlx.doctor.__main__ import examine, main
from g3n_mlx.installation import install_command


@pytest.fixture
def answering(monkeypatch):
    """One backend that answers, without the seconds that the real ones take."""
    facts = {"name": "torch", "installed": True, "version": "1", "answer": "7", "answer_s": 0.5}
    facts |= {"default_device": "cuda:0", "default_dtype": "bfloat16", "products": "a kernel"}
    facts["devices"] = [{"name": "cuda:0", "description": "A GPU", "memory_bytes": 3_000_000_000}]
    monkeypatch.setattr(backend_probes, "backends", lambda: [facts])


def test_a_backend_answers(backend):
    facts = backend_probes._asked(backend)
    assert facts["answer"].endswith("7"), facts
    assert "error" not in facts, facts
    assert facts["parity"][0]["dtype"] == "float32"
    assert all(figures["equal_answers"] == 3 for figures in facts["parity"])
    assert facts["default_dtype"] in ("bfloat16", "float32")
    assert facts["products"]
    assert "cpu" in [device["name"] for device in facts["devices"]]


def test_json(answering, capsys):
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not [section for section, facts in report.items() if isinstance(facts, dict) and "error" in facts]
    assert report["works"]
    assert 0 < report["memory"]["available_bytes"] <= report["memory"]["total_bytes"]
    assert report["chip"]["cores"] >= 1
    assert report["packages"]["numpy"]
    # 3 GB hold what needs no more.
    for row in report["fits"]:
        assert ("cuda:0" in row["fits"]) == (row["memory_bytes"] <= 3_000_000_000)


def test_table(answering, capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    first_words = [line.split()[0] for line in printed.splitlines() if not line.startswith(" ")]
    assert first_words == ["program", "python", "chip", "memory", "backends", "extras", "models", "fits"]
    assert "torch 1 on cuda:0 (A GPU)" in printed
    assert "4-bit products: a kernel" in printed
    (header,) = [line for line in printed.splitlines() if "cuda:0, 3.00 GB" in line]
    (four_bits,) = [line for line in printed.splitlines() if line.split()[:1] == ["4"]]
    # The best slice that fits stands in the table's column of its place.
    cell = four_bits[header.index("cuda:0") :].split(",")[0]
    fitting = [row for row in models.fitting({"cuda:0": 3_000_000_000}) if row["bits"] == 4 and row["fits"]]
    assert cell == max(fitting, key=lambda row: row["mmlu"])["slice"]


def test_wrong_numbers_are_an_error(backend, monkeypatch):
    """What a wrong kernel would do: an answer comes, and the logits are a little off."""
    computed = parity.computed

    def off(model):
        found = computed(model)
        return found | {"logits": found["logits"] * (1 + 10 * parity.LIMITS[model.dtype])}

    monkeypatch.setattr(parity, "computed", off)
    facts = backend_probes.probe(backend)
    assert "answer" in facts
    assert facts["error"].startswith("wrong numbers: in float32 the logits of the demo model are 0.01 of their")


def test_numbers_decide_the_exit_code(answering, monkeypatch, capsys):
    (facts,) = backend_probes.backends()
    monkeypatch.setattr(backend_probes, "backends", lambda: [facts | {"error": "wrong numbers: some"}])
    assert main([]) == 1
    assert "does not work: wrong numbers: some" in capsys.readouterr().out


def test_report(answering, monkeypatch, tmp_path, capsys):
    path = tmp_path / "report.json"
    monkeypatch.setattr(backend_probes, "_TIMEOUT_S", 300.0)
    assert main(["--report", str(path)]) == 0
    report = json.loads(path.read_text("utf-8"))
    assert report["bench"]["torch"]["engines"], report["bench"]
    assert report["chip"]["name"]
    assert main(["--report", str(tmp_path / "absent" / "report.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_the_golden_is_small(repository):
    assert (repository / "g3n_mlx" / "demo" / parity.FILE).stat().st_size <= 200_000


def test_the_best_slice_is_not_the_largest_that_fits():
    """With room for all of them, E3.59B scores higher than the whole model and than E3.79B, which is larger."""
    rows = models.fitting({"cpu": 10**12})
    assert [row["slice"] for row in rows if row["best_at"]] == ["e3.59b-layer"] * len({row["bits"] for row in rows})


SECTIONS = [
    (software, "packages"),
    (software, "python"),
    (software, "extras"),
    (machine, "chip"),
    (machine, "memory"),
    (models, "caches"),
    (models, "fitting"),
]


@pytest.mark.parametrize(("module", "name"), SECTIONS)
def test_a_failing_section_does_not_end_it(answering, module, name, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(module, name, fail)
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not known: the disk is on fire") == 1
    assert len([line for line in printed.splitlines() if not line.startswith(" ")]) == 8


@pytest.mark.skipif(os.name == "nt", reason="processes end by signals elsewhere")
@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("kill -ILL $$", "its process was ended by SIGILL"),
        ("exit 3", "its process ended with code 3"),
        ("echo 'ImportError: libcuda.so.1' >&2; exit 1", "ImportError: libcuda.so.1"),
        ("exec sleep 60", "it does not answer within 1 s"),
    ],
)
def test_a_framework_that_ends_its_process(script, error, tmp_path, monkeypatch, capsys):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(backend_probes.sys, "executable", str(program))
    monkeypatch.setattr(backend_probes, "_TIMEOUT_S", 1.0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert printed.count(f"does not work: {error}") == 2
    assert "is installed but does not work; try: " in printed


def test_without_a_backend(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert f"the torch backend is not installed: {install_command('torch')}" in printed
    assert "neither MLX nor PyTorch is installed: " in printed.splitlines()[-1]


def test_probes_do_not_import_a_framework_here(answering, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "mlx", None)
    assert examine()["works"]


def test_extras_are_those_of_the_project(repository):
    from packaging.requirements import Requirement

    optional = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    brought = {name: {Requirement(line).name for line in lines} for name, lines in optional.items()}
    assert {name: set(packages) for name, (_, packages) in software.EXTRAS.items()} == {
        name: packages for name, packages in brought.items() if name not in ("all", "mlx", "mlx-cuda", "torch")
    }


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(software.EXTRAS, "heif", ("HEIC images", ("no-such-package",)))
    (heif,) = [extra for extra in software.extras() if extra["name"] == "heif"]
    assert heif["packages"] == {"no-such-package": None}
    assert heif["install"] == install_command("heif")


def test_chips_of_linux():
    intel = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512f amx_tile\n\nprocessor\t: 1\n"
    assert machine.linux_chip(intel) == ("Intel(R) Xeon(R)", ["AVX2", "AVX-512", "AMX"])
    arm = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16\nCPU part\t: 0xd40\n"
    assert machine.linux_chip(arm) == ("", ["NEON", "I8MM", "BF16"])


def test_models_of_the_caches(tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(b"1234")
    monkeypatch.setattr(models, "models_here", lambda: [(tmp_path, "google/x"), (tmp_path, str(tmp_path))])
    found = models.caches()["models"]
    assert [(model["name"], model["bytes"], model["conversion"]) for model in found] == [
        ("google/x", 4, False),
        (str(tmp_path), 4, True),
    ]

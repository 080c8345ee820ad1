"""The wheel holds real files where the checkout has links, and everything that runs from it."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

BUILD = "import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"


def build(folder, kind, output, **environment):
    command = [sys.executable, "-c", BUILD.format(kind=kind), str(output)]
    shutil.rmtree(folder / "build", ignore_errors=True)
    environment = {**os.environ, "CFLAGS": "-O1", **environment}  # what the kernels do is tested elsewhere
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source(repository, tmp_path_factory):
    """A copy of the checkout's files, links kept, without the build folders of the checkout."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(repository / name, copy / name)
    for name in ("g3n_mlx", "convert", "matformer_configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib")
        shutil.copytree(repository / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_checkout_has_relative_links(repository):
    for name in ("convert", "matformer_configs"):
        link = repository / "g3n_mlx" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_wheel_contents(wheel, repository):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        table = archive.read("g3n_mlx/matformer_configs/gemma3n.csv")
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"g3n_mlx"}
    assert table == (repository / "matformer_configs" / "gemma3n.csv").read_bytes()
    assert "g3n_mlx/matformer_configs/gemma3n-e4b.json" in names  # what --list-slices sizes without a model
    expected = {
        str(path.relative_to(repository / "g3n_mlx").as_posix())
        for pattern in ("**/*.py", "demo/*", "py.typed")
        for path in (repository / "g3n_mlx").glob(pattern)
        if "__pycache__" not in path.parts
    } | {f"convert/{path.name}" for path in (repository / "convert").glob("*.py")}
    assert {f"g3n_mlx/{name}" for name in expected} <= names
    licences = {name.split("/licenses/")[1] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "g3n_mlx/server/chat_page/temml/LICENSE"}
    assert not any("tests" in name or "__pycache__" in name for name in names)


def test_the_kernels_are_in_a_wheel_of_the_platform(wheel):
    """One for all Pythons, since the library is none of Python's."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("there is no C compiler")
    assert wheel.name.startswith("g3n_mlx-")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.startswith("g3n_mlx/kernels/libg3n.")]


def test_without_a_compiler_the_wheel_is_for_any_platform(source, tmp_path):
    found = build(source, "wheel", tmp_path, CC=str(tmp_path / "no-compiler"))
    assert found.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(found) as archive:
        names = archive.namelist()
        (tags,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: true" in tags
    assert "g3n_mlx/kernels/library.py" in names
    assert not [name for name in names if "libg3n" in name]


def test_wheel_through_sdist_is_the_same(source, wheel, tmp_path):
    sdist = build(source, "sdist", tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    through = build(unpacked, "wheel", tmp_path)
    with zipfile.ZipFile(wheel) as direct, zipfile.ZipFile(through) as indirect:
        assert set(direct.namelist()) == set(indirect.namelist())


def test_commands_run_from_the_unpacked_wheel(wheel, tmp_path):
    """As on Windows, where a checkout without links does not run but the wheel does."""
    shutil.unpack_archive(wheel, tmp_path, "zip")
    for module in ("chat", "convert", "bench", "eval"):
        done = subprocess.run(
            [sys.executable, "-m", f"g3n_mlx.{module}", "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout
    code = "from g3n_mlx.matformer.table import read_slices; print(len(read_slices()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "16", done.stderr


@pytest.mark.slow  # pyright downloads itself the first time
def test_editors_see_the_editable_install(source, tmp_path):
    """Pyright resolves the package, and its types, for a script that is nowhere near the checkout."""
    pytest.importorskip("pyright")
    venv.create(tmp_path / "env", symlinks=os.name != "nt")
    (site,) = (tmp_path / "env").rglob("site-packages")
    wheel = build(source, "editable", tmp_path)
    shutil.unpack_archive(wheel, site, "zip")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text("from g3n_mlx import load\nfrom g3n_mlx.convert import convert\nreveal_type(load)\n", "utf-8")
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", str(python), str(script)],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "0 errors" in done.stdout, done.stdout + done.stderr
    assert "-> Gemma3n" in done.stdout
    found = subprocess.run(
        [str(python), "-c", "import importlib.util as u; print(u.find_spec('g3n_mlx').origin)"],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(source / "g3n_mlx" / "__init__.py"), found.stderr


def test_the_right_framework_for_the_machine(repository):
    from packaging.requirements import Requirement

    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    required = [Requirement(line) for line in project["dependencies"]]

    def frameworks(platform, machine):
        environment = {"sys_platform": platform, "platform_machine": machine}
        return {
            one.name
            for one in required
            if one.name in ("mlx", "torch") and (one.marker is None or one.marker.evaluate(environment))
        }

    assert frameworks("darwin", "arm64") == {"mlx"}
    assert frameworks("linux", "x86_64") == frameworks("linux", "aarch64") == {"torch"}
    assert frameworks("win32", "AMD64") == {"torch"}


def test_the_citation_names_this_version(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    citation = (repository / "CITATION.cff").read_text("utf-8").splitlines()
    assert f"version: {project['version']}" in citation
    assert f"license: {project['license']}" in citation


def test_constraints_pin_every_direct_dependency(repository):
    from packaging.requirements import Requirement

    pyproject = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))
    pins = {}
    for line in (repository / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[pin.name.lower().replace("_", "-")] = pin
    wanted = [line for group in pyproject["dependency-groups"].values() for line in group]
    wanted += pyproject["project"]["dependencies"]
    for line in wanted:
        requirement = Requirement(line)
        pin = pins[requirement.name.lower().replace("_", "-")]
        (version,) = [specifier.version for specifier in pin.specifier]
        assert str(pin.specifier).startswith("=="), pin
        assert version in requirement.specifier, f"{pin} is outside {requirement}"

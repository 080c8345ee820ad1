"""Free memory inside containers, whose limits stand in the files of control groups."""

from types import SimpleNamespace

import psutil
import pytest

from g3n_mlx import memory

GB = 10**9


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """groups(lines, {folder: {file: text}}): the control groups of this process, on a machine of 64 GB with 50 free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GB, available=50 * GB))
    moved = {key: (tmp_path / root.relative_to("/"), *files) for key, (root, *files) in memory._CGROUPS.items()}
    monkeypatch.setattr(memory, "_CGROUPS", moved)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "cgroup")

    def write(lines, folders):
        (tmp_path / "cgroup").write_text(lines)
        for folder, files in folders.items():
            (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / "sys/fs/cgroup" / folder / name).write_text(f"{text}\n")

    return write


def group(limit, used, cached=0):
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cached}\nslab 1"}


def old_group(limit, used, cached=0):
    stat = f"inactive_file 0\ntotal_inactive_file {cached}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


@pytest.mark.parametrize(
    ("lines", "folders", "total", "available"),
    [
        # A container sees itself as the root; the pages of files that it has read can be dropped.
        ("0::/\n", {".": group(8 * GB, 3 * GB)}, 8, 5),
        ("0::/\n", {".": group(8 * GB, 7 * GB, 6 * GB)}, 8, 7),
        ("0::/\n", {".": group(8 * GB, 9 * GB)}, 8, 0),
        ("0::/\n", {".": group(80 * GB, 3 * GB)}, 64, 50),
        ("0::/\n", {".": group("max", 3 * GB)}, 64, 50),
        # A service, or a job of a cluster: the groups around it have limits too.
        ("0::/jobs/7\n", {"jobs": group(30 * GB, 25 * GB), "jobs/7": group(20 * GB, GB), ".": {}}, 20, 5),
        # Version 1, with a path of the host that the container does not see, and both versions side by side.
        ("9:cpu,cpuacct:/x\n4:memory:/docker/1f\n", {"memory": old_group(8 * GB, 7 * GB, 2 * GB)}, 8, 3),
        ("4:memory:/a\n0::/\n", {"memory/a": old_group(2**63 - 4096, GB), "memory": {}}, 64, 50),
        # What can't be read is no limit.
        ("0::/gone\n", {}, 64, 50),
        ("0::/\n", {".": {"memory.max": "many"}}, 64, 50),
        ("", {}, 64, 50),
    ],
)
def test_the_limits_of_containers(groups, lines, folders, total, available):
    groups(lines, folders)
    assert (memory.total_bytes(), memory.available_bytes()) == (total * GB, available * GB)


def test_without_control_groups_the_machine_decides(groups):
    assert (memory.total_bytes(), memory.available_bytes()) == (64 * GB, 50 * GB)

"""How much memory there is and is free, how much this process has held, and giving back what it holds no more.

On Linux a container or a service may have a limit of its own, which neither the kernel's totals nor psutil know: it
stands in the files of its control group, https://docs.kernel.org/admin-guide/cgroup-v2.html.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LINUX_STATUS = Path("/proc/self/status")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# By the controllers that a line of _OWN_CGROUPS names, none in version 2: where the groups lie, the files that hold a
# group's limit and usage, and what memory.stat calls the cached pages of files that the kernel drops first.
_CGROUPS = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    "memory": (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def peak_process_bytes() -> int:
    """Peak resident memory in bytes, mapped file pages included; 0 where the system does not tell (Windows)."""
    if _LINUX_STATUS.exists():
        # VmHWM, since ru_maxrss keeps the parent's peak across fork and exec.
        fields = dict(line.split(":", 1) for line in _LINUX_STATUS.read_text().splitlines() if ":" in line)
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    return _in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak_children_bytes() -> int:
    """The same of the largest child process that has ended and been waited for."""
    if sys.platform == "win32":
        return 0
    import resource

    return _in_bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _in_bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def return_freed_memory() -> None:
    """Gives the system what the process has freed: glibc keeps blocks below 32 MiB, most of a tower's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def total_bytes() -> int:
    """Bytes of memory that this process can have at all: the machine's, or the limit of its container."""
    import psutil  # 20 ms

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _container_limits())])


def available_bytes() -> int:
    """Bytes that the system can still give without swapping, and that this process's container may still take."""
    import psutil

    free = [int(psutil.virtual_memory().available), *(limit - used for limit, used in _container_limits())]
    return max(0, min(free))


def _container_limits() -> Iterator[tuple[int, int]]:
    """The limit and the usage in bytes of this process's control group and of those around it that have a limit.

    Usage is without the file cache that the kernel drops first, which holds a model's files after they were read.
    """
    groups = _OWN_CGROUPS.read_text() if _OWN_CGROUPS.exists() else ""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _CGROUPS:
            continue
        root, limit_file, usage_file, droppable = _CGROUPS[controllers]
        # Inside a container the path may be the host's, which is not there: the root is then the container's own group.
        own = root / path.strip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(root):
                break
            with suppress(OSError, ValueError):  # no file, or "max"
                limit, used = int((group / limit_file).read_text()), int((group / usage_file).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield limit, max(0, used - int(stat.get(droppable, 0)))

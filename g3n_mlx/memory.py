"""How much memory this process has held at most, and giving back what it holds no more."""

import ctypes
import sys
from pathlib import Path

_LINUX_STATUS = Path("/proc/self/status")


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


def available_bytes() -> int:
    """Bytes that the system can still give without swapping."""
    import psutil  # 20 ms

    return int(psutil.virtual_memory().available)

"""How much memory this process has held at most."""

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

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""The chip and its vector units, and the memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from g3n_mlx.memory import available_bytes, total_bytes

# Names of the kernel's flags, in the order in which they are shown. ARM's Linux calls NEON asimd.
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}
_WINDOWS_FEATURES = {40: "AVX2", 41: "AVX-512", 19: "NEON"}  # PF_* of IsProcessorFeaturePresent
_CPUINFO = Path("/proc/cpuinfo")


def chip() -> dict[str, Any]:
    """The processor's name, its physical cores and its vector features."""
    name, features = platform.processor() or platform.machine(), []
    if sys.platform == "darwin":
        name = _sysctl("machdep.cpu.brand_string") or name
        features = ["NEON"] if platform.machine() == "arm64" else []
        features += [feature for key, feature in _mac_features() if _sysctl(key) == "1"]
    elif sys.platform == "win32":
        import ctypes

        present: Any = ctypes.windll.kernel32.IsProcessorFeaturePresent
        features = [feature for number, feature in _WINDOWS_FEATURES.items() if present(number)]
    elif _CPUINFO.exists():
        found, features = linux_chip(_CPUINFO.read_text("utf-8", errors="replace"))
        name = found or name
    return {
        "name": name,
        "machine": platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "features": features,
    }


def linux_chip(cpuinfo: str) -> tuple[str, list[str]]:
    """The name and features in the text of /proc/cpuinfo; no name on most ARM systems."""
    fields = dict(line.replace("\t", "").split(":", 1) for line in reversed(cpuinfo.splitlines()) if ":" in line)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", "").strip(), [shown for flag, shown in _FEATURES.items() if flag in flags]


def memory() -> dict[str, int]:
    """Bytes in all, and bytes that could be had now; a container's limit is the machine's memory for us."""
    return {"total_bytes": total_bytes(), "available_bytes": available_bytes()}


def _mac_features() -> list[tuple[str, str]]:
    return [
        ("hw.optional.arm.FEAT_I8MM", "I8MM"),
        ("hw.optional.arm.FEAT_BF16", "BF16"),
        ("hw.optional.arm.FEAT_SME", "SME"),
        ("hw.optional.avx2_0", "AVX2"),
        ("hw.optional.avx512f", "AVX-512"),
    ]


def _sysctl(key: str) -> str:
    done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip()

"""Gemma 3n in MLX; the layout is that of backends/torch.

Importing it sets what MLX reads from the environment once, at its first use, and what the user has not set.
"""

import os
import re
import subprocess
import sys

# Whether something else has imported MLX, and perhaps used it, so that the settings may have come too late.
IMPORTED_LATE = "mlx.core" in sys.modules

SETTINGS = {
    # Metal's Winograd convolution stores its transforms in bfloat16: 4 to 6 % off in two convolutions of the vision
    # tower, where the direct product is 0.2 % off (tests/backends/test_winograd.py).
    "MLX_CONV_WINOGRAD": "0",
    # On an M5, products of float32 have 11 bits otherwise. In bfloat16, the default on a GPU, it changes nothing.
    "MLX_ENABLE_TF32": "0",
}


def ops_per_buffer(chip: str) -> int | None:
    """Kernels that MLX should send to the GPU of a chip at a time; None leaves it to MLX, which takes 40 or 50.

    A decode step has more than a thousand, small ones. E4B decoded 11 % faster with 1000 on an M1 Ultra and as fast as
    before on an M5 Max (lablup/mlxcel, issue 345). The smallest GPUs of the first two generations get fewer: the system
    ends a buffer that occupies the GPU for seconds, as a long prompt's could there.
    """
    found = re.fullmatch(r"Apple M(\d+)( \w+)?", chip.strip())
    if found is None or int(found[1]) > 4:
        return None
    return 200 if int(found[1]) <= 2 and found[2] is None else 1000


def chip_name() -> str:
    """The chip of a Mac, "Apple M1 Max" say; elsewhere nothing."""
    if sys.platform != "darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout


def configure() -> None:
    """Sets the variables; those that are set already stay."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    count = ops_per_buffer(chip_name())
    if count is not None:
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", str(count))


configure()

"""Writes the goldens that `g3n doctor` compares the embedded model with: PyTorch in float32, without the kernels in C.

Run it again whenever the embedded model changes; it takes seconds.

    python write_golden.py
"""

import os
from typing import Any

os.environ["G3N_CPU"] = "off"  # read when the kernels are first asked for

import numpy as np

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.doctor.parity import FILE, computed


def main() -> None:
    """Writes the file beside the model."""
    model = load("demo", backend="torch", device="cpu", dtype="float32")
    golden: dict[str, Any] = computed(model)
    np.savez_compressed(demo_folder() / FILE, **golden)


if __name__ == "__main__":
    main()

"""Quantize a checkpoint, then use it from the folder: python examples/convert_and_load.py [MODEL] [OUTPUT]"""

import sys
import tempfile
from pathlib import Path

from g3n_mlx import load
from g3n_mlx.convert import convert
from g3n_mlx.hub import demo_folder


def main(model_path: str | None = None, output: str | None = None) -> None:
    source = Path(model_path) if model_path else demo_folder()
    target = Path(output) if output else Path(tempfile.mkdtemp()) / "quantized"
    convert(source, target, q_bits=4)
    for folder in (source, target):
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        print(f"{folder}: {size / 1e6:.1f} MB of weights")
    print(load(target).generate("Hello", max_tokens=16, temperature=0.0).text)


if __name__ == "__main__":
    main(*sys.argv[1:])

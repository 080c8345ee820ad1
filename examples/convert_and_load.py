"""Make a smaller checkpoint, then use it from its folder: python examples/convert_and_load.py [MODEL] [OUTPUT]

MODEL, a folder, is quantized to 4 bits. The demo model is so already: of it, a MatFormer slice is taken as it is.
"""

import sys
import tempfile
from pathlib import Path

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.config.fields import read_json
from g3n_mlx.convert import convert


def main(model_path: str | None = None, output: str | None = None) -> None:
    source = Path(model_path) if model_path else demo_folder()
    target = Path(output) if output else Path(tempfile.mkdtemp()) / "smaller"
    if "quantization" in read_json(source / "config.json"):
        convert(source, target, matformer="Half", matformer_config=demo_folder() / "matformer.csv")
    else:
        convert(source, target, q_bits=4)
    for folder in (source, target):
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        print(f"{folder}: {size / 1e6:.1f} MB of weights")
    print(load(target).generate("Hello", max_tokens=16, temperature=0.0).text)


if __name__ == "__main__":
    main(*sys.argv[1:])

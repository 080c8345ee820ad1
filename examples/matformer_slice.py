"""One checkpoint, several model sizes: python examples/matformer_slice.py [MODEL] [TABLE.csv] [SLICE]

With a Gemma 3n E4B the table may be left out: the published slices come with the package. For the demo model, which
has other dimensions, this script writes a table of its own, in the published grammar.
"""

import sys
import tempfile
from pathlib import Path

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.config.model import ModelConfig


def half_width_table(folder: Path) -> Path:
    """A table with one slice: every layer of the model, each with half its FFN."""
    text = ModelConfig.from_file(folder).text
    widths = [width // 2 for width in text.intermediate_size]
    path = Path(tempfile.mkdtemp()) / "slices.csv"
    path.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        f'Half the width,{text.num_hidden_layers},,,"{widths}",\n'
    )
    return path


def main(model_path: str | None = None, table: str | None = None, name: str = "Half the width") -> None:
    folder = Path(model_path) if model_path else demo_folder()
    table_path = Path(table) if table else half_width_table(folder)
    whole, sliced = load(folder), load(folder, matformer=name, matformer_config=table_path)
    for model in (whole, sliced):
        widths = model.config.text.intermediate_size
        print(f"{model.slice_name or 'whole model'}: {len(widths)} layers, FFN {min(widths)} to {max(widths)}")
        print(model.generate("Who are you?", max_tokens=24, temperature=0.0).text)


if __name__ == "__main__":
    main(*sys.argv[1:])

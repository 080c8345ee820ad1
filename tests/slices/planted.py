"""A random checkpoint of which it is known which layers need their whole width."""

import shutil
from pathlib import Path

import numpy as np
from checkpoint_files import read_config, read_folder, write_folder
from random_checkpoint import pattern, write_random

LAYERS, WIDTH = 6, 128
# How large the second half of a layer's FFN is, beside the first: what a narrower slice leaves out.
SECOND_HALF = (0.02, 3.0, 0.3, 0.02, 6.0, 0.02)


def write_planted(folder: Path, tiny_folder: Path) -> Path:
    """With the tiny checkpoint's tokenizer; the last two layers share keys and values, and are one block.

    What is scaled are columns of down_proj: of all of it, the norm behind it would see nothing.
    """
    plain = write_random(
        folder.with_name(folder.name + "-plain"),
        seed=3,
        vocab_size=1152,
        vocab_size_per_layer_input=1024,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        num_hidden_layers=LAYERS,
        num_kv_shared_layers=2,
        intermediate_size=[WIDTH] * LAYERS,
        activation_sparsity_pattern=[0.0] * LAYERS,
        layer_types=pattern(LAYERS, 2),
        sliding_window=16,
    )
    tensors = read_folder(plain)
    for layer, scale in enumerate(SECOND_HALF):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        tensors[name] = np.concatenate([tensors[name][:, : WIDTH // 2], scale * tensors[name][:, WIDTH // 2 :]], axis=1)
    write_folder(folder, read_config(plain), tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tiny_folder / name).is_file():
            shutil.copyfile(tiny_folder / name, folder / name)
    return folder

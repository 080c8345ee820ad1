"""The models in the caches, and the published slices that fit a memory."""

from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from g3n_mlx.checkpoint.hub import models_here
from g3n_mlx.checkpoint.quantization import BITS
from g3n_mlx.checkpoint.registry import cache_folder
from g3n_mlx.config.fields import read_json
from g3n_mlx.convert import DEFAULT_GROUP_SIZE, DEFAULT_PLE_BITS
from g3n_mlx.convert.quantize import FLOATS
from g3n_mlx.matformer.choice import best_within
from g3n_mlx.matformer.sizes import size_slices
from g3n_mlx.matformer.table import PUBLISHED, read_slices


def caches() -> dict[str, Any]:
    """Where checkpoints and conversions are kept, and every complete Gemma 3n among them."""
    models = [
        {"name": name, "folder": str(folder), "bytes": _folder_bytes(folder), "conversion": name == str(folder)}
        for folder, name in models_here()
    ]
    return {"hub": HF_HUB_CACHE, "conversions": str(cache_folder() / "conversions"), "models": models}


def fitting(limits: dict[str, int]) -> list[dict[str, Any]]:
    """For every width of weights, the published slices of E4B, what they take, where they fit and where they are best.

    limits: bytes by place. Slices are in the table's order; bits is None for bfloat16. At one width a place has one
    best slice, by published score, or none.
    """
    raw_text, slices = read_json(PUBLISHED.with_name("gemma3n-e4b.json")), read_slices()
    rows: list[dict[str, Any]] = []
    for bits in (None, *sorted(BITS, reverse=True)):
        sized = size_slices(raw_text, slices, bits, DEFAULT_GROUP_SIZE, DEFAULT_PLE_BITS, FLOATS["bfloat16"], {})
        chosen_at = {place: best_within(sized, limit) for place, limit in limits.items()}
        rows += [
            {
                "bits": bits,
                "slice": entry.slice.short_name,
                "effective_parameters": entry.effective_parameters,
                "memory_bytes": entry.resident_bytes,
                "mmlu": entry.slice.mmlu,
                "best_at": [place for place, chosen in chosen_at.items() if chosen is entry],
                "fits": [place for place, limit in limits.items() if entry.resident_bytes <= limit],
            }
            for entry in sized
        ]
    return rows


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())

"""Compares the trained float checkpoint in transformers with ours: logits of held-out examples of every skill.

    python check.py FOLDER --speech speech --count 5

Prints the largest difference a skill, of prompts with no more than one clip. Needs transformers and timm; a torchvision
that was built for another torch than the installed one has to be hidden or mended first
(tests/golden/reference_builder/torchvision_stubs.py does it).
"""

import argparse
import importlib.util
import itertools
import random
import sys
from pathlib import Path

import numpy as np
import torch
from packing import Encoder
from skills import all_skills

from g3n_mlx import load
from g3n_mlx.media.audio_features import AudioFeatures
from g3n_mlx.media.image import ImageFeatures
from g3n_mlx.prompt.prompt import Prompt

STUBS = Path(__file__).resolve().parents[2] / "tests" / "golden" / "reference_builder" / "torchvision_stubs.py"


def reference(folder: Path) -> torch.nn.Module:
    """transformers' model, float32."""
    spec = importlib.util.spec_from_file_location("torchvision_stubs", STUBS)
    assert spec is not None
    assert spec.loader is not None
    stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    stubs.declare_missing_operators()
    from transformers import Gemma3nForConditionalGeneration

    model, report = Gemma3nForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@torch.no_grad()
def reference_logits(model: torch.nn.Module, prompt: Prompt) -> np.ndarray:
    """[T, V] float32, every clip encoded alone."""
    pictures = [span.features for span in prompt.media if isinstance(span.features, ImageFeatures)]
    clips = [span.features for span in prompt.media if isinstance(span.features, AudioFeatures)]
    assert len(clips) <= 1
    media = {}
    if pictures:
        media["pixel_values"] = torch.from_numpy(np.stack([p.values() for p in pictures])).permute(0, 3, 1, 2)
    if clips:
        media["input_features"] = torch.from_numpy(clips[0].frames)[None]
        media["input_features_mask"] = torch.from_numpy(clips[0].mask)[None]
    ids = torch.tensor([prompt.token_ids])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **media).logits[0].float().numpy()


def has_one_clip(prompt: Prompt) -> bool:
    """Of several, transformers pads all to the longest, and so hears something else."""
    return sum(isinstance(span.features, AudioFeatures) for span in prompt.media) <= 1


def main() -> None:
    """Reads the flags, compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--speech", type=Path, default=Path("speech"))
    parser.add_argument("--count", type=int, default=5, help="examples a skill")
    arguments = parser.parse_args()
    ours = load(arguments.folder, backend="torch", device="cpu", dtype="float32")
    theirs = reference(arguments.folder)
    encoder = Encoder(arguments.folder, ours.config)
    worst = 0.0
    for name, generate in all_skills(arguments.speech).items():
        rng, difference = random.Random("check"), 0.0
        prompts = (encoder.prompt(generate(rng, True)) for _ in itertools.count())
        for prompt in itertools.islice(filter(has_one_clip, prompts), arguments.count):
            difference = max(difference, float(np.abs(ours.logits(prompt) - reference_logits(theirs, prompt)).max()))
        print(f"{name:12} {difference:.1e}")
        worst = max(worst, difference)
    sys.exit(worst > 1e-3)


if __name__ == "__main__":
    main()

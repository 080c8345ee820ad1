"""Checks that the goldens would notice a wrong use of any single parameter."""

import json
import pathlib

import numpy as np
import torch

from .golden_audio import clips, extract, padded_soft_tokens
from .golden_text import prompt_with_media_tokens
from .golden_vision import pixel_values, tower_images
from .profile import Profile
from .reference_model import Reference

RELATIVE_CHANGE = 0.1
NOTICEABLE = 1e-3


def write_sensitivity(reference: Reference, golden: pathlib.Path, profile: Profile) -> None:
    """Changes one tensor at a time by a tenth of its spread and records how far the outputs move."""
    probes = {"text": _text_probe, "vision": _vision_probe, "audio": _audio_probe}
    inputs = _probe_inputs(reference, profile)
    before = {name: probe(reference, inputs) for name, probe in probes.items()}
    generator = torch.Generator().manual_seed(profile.seed)
    changes = {}
    for name, parameter in reference.model.named_parameters():
        original = parameter.data.clone()
        noise = torch.randn(original.shape, generator=generator) * original.abs().mean()
        parameter.data += RELATIVE_CHANGE * noise
        changes[name] = max(
            float((probes[kind](reference, inputs) - before[kind]).abs().max()) for kind in _affected(name)
        )
        parameter.data = original
    report = {"unnoticed": _unnoticed(reference, changes), "largest_change": _rounded(changes)}
    (golden / "parameter_sensitivity.json").write_text(json.dumps(report, indent=1) + "\n")


def _probe_inputs(reference: Reference, profile: Profile) -> dict[str, torch.Tensor]:
    long_text = reference.tokenize(profile.stimuli.text_prompt)
    features, mask = extract(reference.processor.feature_extractor, clips(profile))
    return {
        "input_ids": torch.cat([long_text, prompt_with_media_tokens(reference, profile)], dim=1),
        "pixels": pixel_values(tower_images(profile)[:1]),
        "features": torch.from_numpy(features),
        "padding": ~torch.from_numpy(mask),
    }


def _text_probe(reference: Reference, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return reference.logits(inputs["input_ids"])


@torch.no_grad()
def _vision_probe(reference: Reference, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return reference.model.get_image_features(inputs["pixels"]).pooler_output


@torch.no_grad()
def _audio_probe(reference: Reference, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = reference.model.model.get_audio_features(inputs["features"], inputs["padding"])
    return padded_soft_tokens(reference, outputs)


def _affected(name: str) -> tuple[str, ...]:
    if "vision_tower" in name:
        return ("vision",)
    if "audio_tower" in name:
        return ("audio",)
    if "embed_vision" in name:
        return ("vision", "text")
    if "embed_audio" in name:
        return ("audio", "text")
    return ("text",)


def _unnoticed(reference: Reference, changes: dict[str, float]) -> dict[str, str]:
    silent = {name: "no output moves" for name, change in changes.items() if change < NOTICEABLE}
    stored = set(_stored_names(reference.folder))
    unused = stored - set(changes)
    return {
        **silent,
        **{name: "stored but never read: the layer reuses another layer's keys" for name in sorted(unused)},
    }


def _stored_names(folder: pathlib.Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        return list(file.keys())


def _rounded(changes: dict[str, float]) -> dict[str, float]:
    return {
        name: float(np.format_float_positional(change, precision=3, fractional=False))
        for name, change in changes.items()
    }

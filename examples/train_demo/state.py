"""A training's state on disk: parameters, optimizers' moments in bfloat16, the step. Written whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save(
    path: Path, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, write: bool = True
) -> None:
    """Writes the state beside the old one, then takes its place; goes on with what it wrote, as one that resumes.

    Of several processes, one writes.
    """
    state = {
        "step": step,
        "parameters": {name: parameter.detach() for name, parameter in network.named_parameters()},
        "moments": [
            {
                place: {name: value.to(torch.bfloat16) if value.dim() else value for name, value in entry.items()}
                for place, entry in optimizer.state_dict()["state"].items()
            }
            for optimizer in optimizers
        ],
    }
    if write:
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)
    fill(state, network, optimizers)


def load(path: Path, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Fills network and optimizers; returns the next step."""
    return fill(torch.load(path, weights_only=True, map_location="cpu"), network, optimizers)


def fill(state: dict[str, Any], network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Fills network and optimizers; returns the next step."""
    take(state["parameters"], network)
    for optimizer, moments in zip(optimizers, state["moments"], strict=True):
        whole = optimizer.state_dict()
        whole["state"] = moments  # load_state_dict brings them back to float32
        optimizer.load_state_dict(whole)
    return state["step"]


def take(parameters: dict[str, torch.Tensor], network: nn.Module) -> None:
    """Copies the parameters that the network has as well into it."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in parameters:
                parameter.copy_(parameters[name])

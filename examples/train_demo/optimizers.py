"""Muon for matrices, which learn faster by it, and Adam for all else."""

from collections import defaultdict
from math import prod

import torch
from architecture import TEXT
from torch import nn

NOT_MATRICES = ("tables.", "language_model.embed", "head.")  # rows of tables, and what is thrown away
WIDTH = 64  # inputs of a unit up to which Adam's step needs no scaling


def made_optimizers(network: nn.Module) -> list[torch.optim.Optimizer]:
    """Optimizers of all that is trainable; a group's learning rate is the common one times its `scale`."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    matrices = [
        name for name, p in trained.items() if p.dim() == 2 and min(p.shape) >= 16 and not name.startswith(NOT_MATRICES)
    ]
    groups: defaultdict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trained.items():
        if name not in matrices:
            groups[scale(name, parameter)].append(parameter)
    adam = torch.optim.AdamW(
        [{"params": parameters, "scale": factor} for factor, parameters in groups.items()],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    if not matrices:
        return [adam]
    muon = torch.optim.Muon([trained[name] for name in matrices], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    muon.param_groups[0]["scale"] = 3.0
    return [adam, muon]


def scale(name: str, parameter: nn.Parameter) -> float:
    """Adam moves all weights alike, so a unit of many inputs needs smaller steps (muP, arXiv 2203.03466)."""
    if "router_norm" in name:  # its weight holds a factor of 1 / hidden_size
        return 1 / TEXT["hidden_size"]
    if "embed_tokens" in name or name.startswith("tables."):  # a row a token
        return 1.0
    return min(1.0, WIDTH / prod(parameter.shape[1:]))

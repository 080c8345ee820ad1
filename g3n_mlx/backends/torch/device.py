"""Where PyTorch computes and in which dtype."""

import torch

from g3n_mlx.failures import BadValue

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def device_of(name: str | None) -> torch.device:
    """The device of a name, `cpu` or `cuda[:n]`; without one, a CUDA device if there is any.

    Raises ValueError when the machine has no such device or the backend does not run on it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and (index.isdigit() or index == "") and ":" not in index:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found <= int(index or 0):
            raise BadValue(f"device {name!r}: PyTorch sees {found} CUDA devices here; use device 'cpu'")
        return torch.device(name)
    if name == "cpu":
        return torch.device("cpu")
    raise BadValue(f"device {name!r} is not supported by the torch backend: expected 'cpu', 'cuda' or 'cuda:N'")


def dtype_of(name: str | None, device: torch.device, quantized: bool) -> torch.dtype:
    """The activations' dtype of a name; bfloat16, as published, without one."""
    if name is not None and name not in DTYPES:
        raise BadValue(f"dtype {name!r} is not supported: expected one of {sorted(DTYPES)}")
    return DTYPES[name or "bfloat16"]


def name(device: torch.device) -> str:
    """A device as users write it: cpu, cuda, cuda:0."""
    return str(device)


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def claim(device: torch.device) -> None:
    """Nothing to set up: memory is the framework's own affair."""


def leave() -> None:
    """Nothing to free before the process ends."""

"""Where PyTorch computes and in which dtype."""

from typing import TYPE_CHECKING, Any

import torch

from g3n_mlx.failures import BadValue

if TYPE_CHECKING:
    from g3n_mlx.backends.torch.model import Gemma3nModel

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


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that nothing holds; None where it is the system's own."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def claim(device: torch.device, weight_bytes: int = 0) -> None:
    """Nothing to set up: memory is the framework's own affair."""


def leave() -> None:
    """Nothing to free before the process ends."""


def round_activations(model: "Gemma3nModel") -> None:
    """Has a prefill's products with quantized weights take activations in 8 bits; a decode step stays exact.

    Raises ValueError where no weight can be multiplied so.
    """
    from g3n_mlx.backends.torch.layers import QuantizedLinear

    inner = [module for layer in model.language_model.layers for module in layer.modules()]
    layers = [module for module in inner if isinstance(module, QuantizedLinear)]
    able = [layer for layer in layers if layer.kernel is not None and layer.kernel.takes_int8()]
    if not able:
        raise BadValue(
            "activations='int8' needs quantized weights and the kernels in C on an x86 processor with AVX2 or AVX-512; "
            "load it without, or see `g3n doctor`"
        )
    for layer in able:
        layer.int8_activations = True


def describe() -> dict[str, Any]:
    """PyTorch's version and devices, the default one with its dtype, and what multiplies 4-bit weights there."""
    from g3n_mlx.backends.torch.kernels.dense import dense_product_dtype, dense_product_rows
    from g3n_mlx.backends.torch.kernels.packed import packing_block_rows
    from g3n_mlx.backends.torch.kernels.stored import KERNEL_ROWS
    from g3n_mlx.kernels.library import instructions

    place, capability = device_of(None), torch.backends.cpu.get_cpu_capability()
    devices: list[dict[str, Any]] = [{"name": "cpu", "description": capability, "memory_bytes": None}]
    for index in range(torch.cuda.device_count() if place.type == "cuda" else 0):
        found = torch.cuda.get_device_properties(index)
        devices.append({"name": f"cuda:{index}", "description": found.name, "memory_bytes": found.total_memory})
    blocks = f"blocks dequantized to {dense_product_dtype(torch.bfloat16, place.type)}".replace("torch.", "")
    products = blocks
    if place.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(place) >= (8, 0):
        products = "packed int4 kernel (_weight_int4pack_mm)"
    elif place.type == "cpu" and (kernels := instructions()) is not None:
        products = f"own kernels ({kernels}) up to {KERNEL_ROWS} rows, {blocks} from there"
    elif place.type == "cpu" and packing_block_rows():
        rows = dense_product_rows()
        products = f"packed int4 kernel (_weight_int4pack_mm_for_cpu) below {rows} rows, {blocks} from there"
    return {
        "version": torch.__version__,
        "devices": devices,
        "default_device": str(place),
        "default_dtype": str(dtype_of(None, place, quantized=True)).removeprefix("torch."),
        "products": products,
    }

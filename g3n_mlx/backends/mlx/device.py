"""Where MLX computes and in which dtype."""

import logging
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from g3n_mlx.backends import mlx as backend
from g3n_mlx.failures import BadValue, size_in_words
from g3n_mlx.memory import available_bytes

logger = logging.getLogger(__name__)

# Metal, else CUDA, else the CPU, or what the program has made it: asked before a model changes it for its own device.
DEFAULT = mx.default_device()
_TIGHT = 0.9  # of the memory that Metal recommends to use, as in mlx-lm
_LATE = "MLX was imported before g3n_mlx, which sets how it multiplies: import g3n_mlx.backends.mlx first"

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}


def device_of(name: str | None) -> mx.Device:
    """The device of a name, `cpu` or `cuda[:n]`; without one, MLX's default (Metal, else CUDA, else CPU).

    Raises ValueError when the machine has no such device or the backend does not run on it.
    """
    if name is None:
        return DEFAULT
    kind, _, index = name.partition(":")
    if kind == "cuda" and (index.isdigit() or index == "") and ":" not in index:
        found = mx.device_count(mx.gpu) if mx.cuda.is_available() else 0
        if found <= int(index or 0):
            raise BadValue(f"device {name!r}: MLX sees {found} CUDA devices here; use device 'cpu'")
        return mx.Device(mx.gpu, int(index or 0))
    if name == "cpu":
        return mx.Device(mx.cpu, 0)
    raise BadValue(
        f"device {name!r} is not supported by the mlx backend: expected 'cpu' or 'cuda[:N]', or none for Metal"
    )


def dtype_of(name: str | None, device: mx.Device, quantized: bool) -> mx.Dtype:
    """The activations' dtype of a name; without one bfloat16, as published, or float32 where that is broken.

    MLX's CPU device multiplies quantized weights in bfloat16 with an error of 5 % (0.32.4); in float32 it is exact.
    """
    if name is not None and name not in DTYPES:
        raise BadValue(f"dtype {name!r} is not supported: expected one of {sorted(DTYPES)}")
    if name is None and quantized and device.type == mx.cpu:
        return mx.float32
    return DTYPES[name or "bfloat16"]


def name(device: mx.Device) -> str:
    """A device as users write it: cpu; gpu for Metal or CUDA."""
    return "cpu" if device.type == mx.cpu else "gpu"


def dtype_name(dtype: mx.Dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def free_bytes(device: mx.Device) -> int | None:
    """Memory of the device that nothing holds; None where it is the system's own.

    On Metal, which shares the system's, no more than what it recommends to use.
    """
    if device.type == mx.cpu:
        return None
    if mx.metal.is_available():
        return min(
            int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory(), available_bytes()
        )
    free = mx.device_info(device).get("free_memory")
    return None if free is None else int(free)


def claim(device: mx.Device, weight_bytes: int = 0) -> None:
    """Makes the device MLX's default and, on Metal, keeps its memory wired: as mlx-lm does around a generation.

    Wired memory is not paged out between two answers. The cache of freed buffers is held to an eighth of it, so that
    the buffers of a long prefill are not kept until the next one. weight_bytes: that a model will take, for a warning.
    """
    mx.set_default_device(device)
    if backend.IMPORTED_LATE:
        logger.info("%s", _LATE)
    if device.type == mx.gpu and mx.metal.is_available():
        limit = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(limit)
        mx.set_cache_limit(limit // 8)
        logger.debug("wired limit %d bytes", limit)
        if weight_bytes + mx.get_active_memory() > _TIGHT * limit:
            logger.warning(
                "the weights take %s of the %s that the GPU should use at most, so answers may be slow: take a smaller "
                "slice (matformer) or fewer bits (q_bits), or raise `sudo sysctl iogpu.wired_limit_mb`",
                size_in_words(weight_bytes + mx.get_active_memory()),
                size_in_words(limit),
            )


def leave() -> None:
    """Frees what MLX keeps for this thread, before the process ends.

    Left to the end itself, the destructors of compiled functions ask for Python's lock while Python shuts down, and
    the process aborts with exit code 134: 8 times out of 50 on a busy machine (MLX 0.32.4).
    """
    mx.synchronize()
    mx.clear_streams()


def round_activations(model: object) -> None:
    """Raises ValueError: MLX multiplies activations as they are."""
    raise BadValue("activations='int8' is for the torch backend on a CPU; MLX multiplies activations as they are")


def describe() -> dict[str, Any]:
    """MLX's version and devices, the default one with its dtype, and what multiplies 4-bit weights there."""
    place = device_of(None)
    devices: list[dict[str, Any]] = [{"name": "cpu", "description": "MLX's CPU kernels", "memory_bytes": None}]
    kind = "cpu"
    if mx.metal.is_available():
        found, kind = mx.device_info(), "metal"
        memory = int(found["max_recommended_working_set_size"])
        devices.append({"name": "gpu", "description": str(found["device_name"]), "memory_bytes": memory})
    elif mx.cuda.is_available():
        kind = "cuda"
        names = [f"cuda:{index}" for index in range(mx.device_count(mx.gpu))]
        devices += [{"name": name, "description": "CUDA", "memory_bytes": None} for name in names]
    return {
        "version": version("mlx"),
        "devices": devices,
        "default_device": kind,
        "default_dtype": str(dtype_of(None, place, quantized=True)).removeprefix("mlx.core."),
        "products": f"quantized_matmul on {kind}{f' ({_LATE})' if backend.IMPORTED_LATE else ''}",
    }

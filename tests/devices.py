"""Where the tests run MLX: on the CPU, or on the GPU with `pytest --mlx-device gpu`.

PyTorch stays on the CPU, where it is compared with.
"""

# Sums run in another order on a GPU, and its exponentials are rounded otherwise; a wrong kernel is off by far more.
GPU_FACTOR = 10

_mlx_device = "cpu"


def choose(mlx_device: str) -> None:
    """Takes the option's value, before any test module is imported."""
    global _mlx_device
    _mlx_device = mlx_device


def mlx_on_gpu() -> bool:
    return _mlx_device == "gpu"


def device_for(backend: str) -> str | None:
    """What `load` and a backend's device_of are given; None is MLX's GPU."""
    return None if backend == "mlx" and mlx_on_gpu() else "cpu"


def served_backend() -> str:
    """The backend of the servers that tests start: PyTorch's, or MLX's on the GPU."""
    return "mlx" if mlx_on_gpu() else "torch"


def tolerance(on_cpu: float) -> float:
    """The largest difference in float32 that is allowed where a CPU may differ by so much."""
    return on_cpu * GPU_FACTOR if mlx_on_gpu() else on_cpu

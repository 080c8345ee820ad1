"""mlx-lm, which reads the checkpoints that we write."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from g3n_mlx.bench.engines.mlx_graph import count_graph, opaque_kernels
from g3n_mlx.bench.engines.package import check_package
from g3n_mlx.bench.measure import SHORT_PROMPT, Loaded, Request, Run
from g3n_mlx.bench.measure import measure as measure_here
from g3n_mlx.config.model import ModelConfig


def check(request: Request) -> None:
    check_package("mlx_lm", "mlx-lm")


def measure(request: Request) -> Run:
    return measure_here(_load, request)


def count(request: Request) -> tuple[int, int]:
    """The nodes of a decode step's graph as a GPU has it, and its kernels."""
    with opaque_kernels():
        loaded = _load(request)
        assert loaded.decode_graph is not None
        return loaded.decode_graph()


def _load(request: Request) -> Loaded:
    import mlx.core as mx

    if request.device == "cpu":
        mx.set_default_device(mx.cpu)  # before the import: mlx-lm makes its stream then
    from mlx.utils import tree_flatten
    from mlx_lm.generate import generate_step, generation_stream, wired_limit  # pyright: ignore[reportMissingImports]
    from mlx_lm.models.cache import make_prompt_cache  # pyright: ignore[reportMissingImports]
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    model: Any = load_model(Path(request.model))[0]
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # pyright: ignore[reportAssignmentType]

    def generate(prompts: Sequence[list[int]], count: int, on_token: Callable[[], None]) -> None:
        with wired_limit(model, [generation_stream]):  # pyright: ignore[reportArgumentType]
            for _ in generate_step(mx.array(prompts[0]), model, max_tokens=count):
                on_token()

    def decode_graph() -> tuple[int, int]:
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([request.prompt_ids[:SHORT_PROMPT]]), cache=cache))
        return count_graph(model(mx.array([[request.prompt_ids[-1]]]), cache=cache))

    first_shared = ModelConfig.from_file(Path(request.model)).text.first_kv_shared_layer
    read = sum(weight.nbytes for name, weight in weights if _decode_reads(name, first_shared))
    device = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    return Loaded(f"mlx-lm, {device}", generate, read, "mlx", device, batches=False, decode_graph=decode_graph)


def _decode_reads(name: str, first_shared: int) -> bool:
    """Whether a decode step reads all of a tensor: not the PLE table, not the k/v of KV-sharing layers."""
    layer = re.search(r"\.layers\.(\d+)\.self_attn\.[kv]_", name)
    return "embed_tokens_per_layer" not in name and (layer is None or int(layer[1]) < first_shared)

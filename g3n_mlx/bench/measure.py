"""One timed run of one engine: ours, mlx-lm or transformers. The part of the benchmark that does the work.

`bench` starts this file as a process of its own for every run (`python -m g3n_mlx.bench.measure`, the request as JSON
on stdin, the figures as JSON on stdout), so that peak memory belongs to one engine and one run alone.
All engines get the same token ids, decode greedily, ignore ends of sequence, and are timed by the same clock:
the moments at which their tokens become known to the caller.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from g3n_mlx.batch import Rows
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.engine.runner import run
from g3n_mlx.failures import BadValue, is_expected, one_line
from g3n_mlx.memory import peak_process_bytes

ENGINES = ("g3n_mlx", "mlx-lm", "transformers")
WARM_UP_PROMPT, WARM_UP_TOKENS = 16, 4  # enough to compile what decode compiles
BANDWIDTH_BUFFER_BYTES = 2**30  # far beyond any cache
# Graph nodes that describe memory anew and launch no kernel.
MLX_VIEWS = frozenset(
    {"AsStrided", "Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "StopGradient"}
    | {"Transpose", "Unflatten", "View"}
)


@dataclass(frozen=True, slots=True)
class Request:
    """What one process measures."""

    engine: str  # one of ENGINES
    model: str  # folder, of the revision that was asked for
    prompt_ids: tuple[int, ...]
    generation_tokens: int  # at least 2: the first one is the prompt's
    backend: str = "auto"  # ours alone
    matformer: str | None = None  # ours alone, as the two below
    matformer_config: str | None = None  # a CSV file
    q_bits: int | None = None  # of a conversion that is in the cache already
    device: str | None = None
    dtype: str | None = None  # ours alone, of the activations


@dataclass(frozen=True, slots=True)
class Run:
    """The figures of one process; rates are tokens a second."""

    load_s: float
    time_to_first_token_s: float
    prompt_tps: float
    generation_tps: float
    peak_memory_bytes: int | None  # of the process, host memory; None where the system does not tell
    peak_device_bytes: int | None  # of the accelerator; None on a CPU
    weight_bytes_per_token: int  # stored bytes of every weight that one decode step reads
    read_bandwidth: float  # bytes a second that a plain reduction reaches on the same device
    graph_operations: int | None = None  # nodes in one decode step's MLX graph
    graph_kernels: int | None = None  # of them, those that are not mere views
    description: str = ""  # engine, backend, dtype, device


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine with a model in it, as this file sees it."""

    description: str
    generate: Callable[[list[int], int, Callable[[], None]], None]  # prompt ids, count, called once per token
    weight_bytes_per_token: int
    framework: str  # "mlx" or "torch"
    device: str  # "cpu", "gpu", "cuda", "cuda:1"
    decode_graph: Callable[[], Any] | None = None  # an MLX array: one decode step's logits, not evaluated


def measure(request: Request) -> Run:
    """Loads the engine's model, warms up, and times one generation."""
    started = time.perf_counter()
    loaded = {"g3n_mlx": _load_ours, "mlx-lm": _load_mlx_lm, "transformers": _load_transformers}[request.engine](
        request
    )
    load_s = time.perf_counter() - started

    # Reversed, so that no engine finds the prompt's beginning in a cache.
    warm_up = list(reversed(request.prompt_ids[-WARM_UP_PROMPT:]))
    loaded.generate(warm_up, WARM_UP_TOKENS, lambda: None)

    moments: list[float] = []
    started = time.perf_counter()
    loaded.generate(list(request.prompt_ids), request.generation_tokens, lambda: moments.append(time.perf_counter()))
    if len(moments) != request.generation_tokens:
        raise BadValue(f"{request.engine} gave {len(moments)} tokens, expected {request.generation_tokens}")
    first_s = moments[0] - started
    host, device = peak_process_bytes() or None, _peak_device_bytes(loaded)
    operations, kernels = count_graph(loaded.decode_graph()) if loaded.decode_graph else (None, None)
    return Run(
        load_s=load_s,
        time_to_first_token_s=first_s,
        prompt_tps=len(request.prompt_ids) / first_s,
        generation_tps=(len(moments) - 1) / (moments[-1] - moments[0]),
        peak_memory_bytes=host,
        peak_device_bytes=device,
        weight_bytes_per_token=loaded.weight_bytes_per_token,
        read_bandwidth=_read_bandwidth(loaded),  # last: its buffer must not count as the engine's memory
        graph_operations=operations,
        graph_kernels=kernels,
        description=loaded.description,
    )


def _load_ours(request: Request) -> Loaded:
    from g3n_mlx.loading import load

    model = load(
        request.model,
        backend=request.backend,
        matformer=request.matformer,
        matformer_config=request.matformer_config,
        q_bits=request.q_bits,
        device=request.device,
        dtype=request.dtype,
    )

    def generate(prompt: list[int], count: int, on_token: Callable[[], None]) -> None:
        model.reset()
        for chunk in model.stream(prompt, max_tokens=count, temperature=0.0, ignore_eos=True):
            if chunk.token is not None:
                on_token()

    def decode_graph() -> Any:
        network: Any = model.runner.model
        cache = model.conversation().cache
        run(network, [Rows(cache, np.array(request.prompt_ids[:WARM_UP_PROMPT]))])
        return network.decode_graph(request.prompt_ids[-1], cache)

    return Loaded(
        description=f"g3n_mlx, {model.backend}, {model.dtype}, {model.device}",
        generate=generate,
        weight_bytes_per_token=model.checkpoint.nbytes_per_token,
        framework=model.backend,
        device=model.device,
        decode_graph=(lambda: model.runner.call(decode_graph)) if model.backend == "mlx" else None,
    )


def _load_mlx_lm(request: Request) -> Loaded:
    import mlx.core as mx

    if request.device == "cpu":
        mx.set_default_device(mx.cpu)  # before the import: mlx-lm makes its stream then
    from mlx.utils import tree_flatten
    from mlx_lm.generate import generate_step, generation_stream, wired_limit  # pyright: ignore[reportMissingImports]
    from mlx_lm.models.cache import make_prompt_cache  # pyright: ignore[reportMissingImports]
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    model: Any = load_model(Path(request.model))[0]
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # pyright: ignore[reportAssignmentType]

    def generate(prompt: list[int], count: int, on_token: Callable[[], None]) -> None:
        with wired_limit(model, [generation_stream]):  # pyright: ignore[reportArgumentType]
            for _ in generate_step(mx.array(prompt), model, max_tokens=count):
                on_token()

    def decode_graph() -> Any:
        cache = make_prompt_cache(model)
        prompt = mx.array([list(request.prompt_ids[:WARM_UP_PROMPT])])
        mx.eval(model(prompt, cache=cache))
        return model(mx.array([[request.prompt_ids[-1]]]), cache=cache)

    reads = _decode_reads(request)
    read = sum(weight.nbytes for name, weight in weights if reads(name))
    device = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    return Loaded(f"mlx-lm, {device}", generate, read, "mlx", device, decode_graph)


def _load_transformers(request: Request) -> Loaded:
    # For images only, and a torchvision built for another torch would stop the import of transformers.
    sys.modules["torchvision"] = sys.modules["timm"] = None  # type: ignore[assignment]
    import torch
    from transformers import Gemma3nForCausalLM  # pyright: ignore[reportMissingImports]

    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # The text model alone, also from a checkpoint with towers: what is compared is text.
    model: Any = Gemma3nForCausalLM.from_pretrained(request.model, dtype=torch.bfloat16)
    model = model.to(device).eval()

    def generate(prompt: list[int], count: int, on_token: Callable[[], None]) -> None:
        model.generate(
            torch.tensor([prompt], device=device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            streamer=_TokenStreamer(on_token),
        )

    read = sum(parameter.nbytes for name, parameter in model.named_parameters() if "embed_tokens_per_layer" not in name)
    return Loaded(f"transformers, bfloat16, {device}", generate, read, "torch", device)


def _decode_reads(request: Request) -> Callable[[str], bool]:
    """Whether a decode step reads all of a peer's tensor: not the PLE table, not the k/v of KV-sharing layers."""
    first_shared = ModelConfig.from_file(Path(request.model)).text.first_kv_shared_layer

    def reads(name: str) -> bool:
        layer = re.search(r"\.layers\.(\d+)\.self_attn\.[kv]_", name)
        return "embed_tokens_per_layer" not in name and (layer is None or int(layer[1]) < first_shared)

    return reads


class _TokenStreamer:
    """What transformers calls `put` and `end` of: first with the prompt, then with every token."""

    def __init__(self, on_token: Callable[[], None]):
        self._on_token, self._saw_prompt = on_token, False

    def put(self, value: Any) -> None:
        if self._saw_prompt:
            self._on_token()
        self._saw_prompt = True

    def end(self) -> None:
        pass


def _peak_device_bytes(loaded: Loaded) -> int | None:
    if loaded.device == "cpu":
        return None
    if loaded.framework == "mlx":
        import mlx.core as mx

        return mx.get_peak_memory()
    import torch

    return torch.cuda.max_memory_allocated(loaded.device)


def _read_bandwidth(loaded: Loaded) -> float:
    """Bytes a second of the best of several reductions over a large buffer, on all cores or on the accelerator."""
    count = BANDWIDTH_BUFFER_BYTES // 4
    if loaded.device == "cpu":
        cores = os.cpu_count() or 1
        parts = np.array_split(np.ones(count, dtype=np.float32), cores * 8)
        with ThreadPoolExecutor(cores) as threads:
            return _best_rate(lambda: list(threads.map(np.add.reduce, parts)))
    if loaded.framework == "mlx":
        import mlx.core as mx

        on_device = mx.ones(count)
        return _best_rate(lambda: mx.eval(mx.sum(on_device)))
    import torch

    on_cuda = torch.ones(count, device=loaded.device)
    return _best_rate(lambda: on_cuda.sum().item())


def _best_rate(read_all: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        read_all()
        times.append(time.perf_counter() - started)
    return BANDWIDTH_BUFFER_BYTES / min(times)


def count_graph(output: Any) -> tuple[int, int]:
    """All nodes, and those that are not mere views, of the graph that an MLX array waits for."""
    import io

    import mlx.core as mx

    dot = io.StringIO()
    mx.export_to_dot(dot, output)
    names = re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue())
    return len(names), sum(name not in MLX_VIEWS for name in names)


def main() -> int:
    """Reads a request from stdin, prints a Run; a failure is one line on stderr and exit 1."""
    fields: dict[str, Any] = json.load(sys.stdin)
    fields["prompt_ids"] = tuple(fields["prompt_ids"])
    request = Request(**fields)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the peers print
            run = measure(request)
    except Exception as error:
        if not is_expected(error):
            raise
        print(one_line(error), file=sys.stderr)
        return 1
    print(json.dumps(asdict(run)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What one process of the benchmark measures, and how: every engine answers a Request with a Run.

All engines get the same token ids, decode greedily, ignore ends of sequence, and are timed by the same clock: the
moments at which their tokens become known to the caller. Engines that are programs of their own (llama.cpp) time
themselves in the same terms.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from g3n_mlx.failures import BadValue
from g3n_mlx.memory import peak_process_bytes

SHORT_PROMPT, WARM_UP_TOKENS = 16, 4  # enough to compile what decode compiles
BANDWIDTH_BUFFER_BYTES = 2**30  # far beyond any cache


@dataclass(frozen=True, slots=True)
class Request:
    """What one process measures."""

    engine: str  # one of engines.MODULES
    model: str  # folder, of the revision that was asked for; of llama.cpp and mistral.rs a file, perhaps
    prompt_ids: tuple[int, ...]  # as many as the longest prompt has
    prompt_tokens: int  # of the prefill that is timed
    generation_tokens: int  # that are decoded at each depth; at least 2, since the first one is the prompt's
    depths: tuple[int, ...]  # tokens in the cache when decode begins
    sequences: tuple[int, ...] = ()  # how many are decoded together, each after a short prompt
    threads: int | None = None  # None leaves it to the engine
    device: str | None = None
    binary: str | None = None  # of llama.cpp alone
    backend: str = "auto"  # ours alone, as all below
    matformer: str | None = None
    matformer_config: str | None = None  # a CSV file
    q_bits: int | None = None  # of a conversion that is in the cache already
    dtype: str | None = None  # of the activations
    draft: str = "off"  # how tokens are drafted in answers of their own; all other figures are without drafts
    activations: str = "exact"
    adapters: dict[str, float] = field(default_factory=dict[str, float])  # with their weights
    started_at: float = 0.0  # time.monotonic() when the process was started: the system's clock, not the process's


@dataclass(frozen=True, slots=True)
class Run:
    """The figures of one process; rates are tokens a second."""

    load_s: float
    start_to_first_token_s: float  # from the start of the process, of a short prompt
    time_to_first_token_s: float  # of the timed prompt, once loaded
    prompt_tps: float
    generation_tps: list[float]  # at each of the request's depths
    sequences_tps: list[float] | None  # of all sequences, for each of the request's counts; None: not measured
    peak_memory_bytes: int | None  # of the process, host memory; None where the system does not tell
    peak_device_bytes: int | None  # of the accelerator; None on a CPU
    weight_bytes_per_token: int | None  # stored bytes of every weight that one decode step reads; None: not known
    read_bandwidth: float | None  # bytes a second that a plain reduction reaches on the same device; None: not known
    kv_element_bytes: int = 2  # of a stored key's or value's number
    graph_operations: int | None = None  # nodes in one decode step's MLX graph
    graph_kernels: int | None = None  # of them, those that are not mere views
    drafted: list[dict[str, Any]] | None = None  # fields of drafts.Drafted; None: not measured
    row_seconds: list[tuple[int, float]] | None = None  # rows of a call, and how long it took
    description: str = ""  # engine, backend, dtype, device
    other_cpu_s: float | None = None  # of the processors, used by others during the run; None: the system does not tell


# Prompts of one length, how many tokens to decode after each, and what to call when each of them has its next token.
Generate = Callable[[Sequence[list[int]], int, Callable[[], None]], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine with a model in it, in this process."""

    description: str
    generate: Generate
    weight_bytes_per_token: int | None
    framework: str  # "mlx" or "torch"; any other name on a CPU
    device: str  # "cpu", "gpu", "cuda", "cuda:1"
    kv_element_bytes: int = 2
    batches: bool = True  # whether `generate` takes several prompts
    decode_graph: Callable[[], tuple[int, int]] | None = None  # Run's graph_operations and graph_kernels
    # Run's drafted and row_seconds.
    drafts: Callable[[], tuple[list[dict[str, Any]], list[tuple[int, float]]]] | None = None


def measure(load: Callable[[Request], Loaded], request: Request) -> Run:
    """Loads the engine's model, warms up, and times what is asked for, the shortest prompts first."""
    started = time.perf_counter()
    loaded = load(request)
    load_s = time.perf_counter() - started

    # Reversed, so that no engine finds the prompt's beginning in a cache.
    warm_up = list(reversed(request.prompt_ids[-SHORT_PROMPT:]))
    first = _moments(loaded, [warm_up], WARM_UP_TOKENS)[0]
    start_to_first_token_s = time.monotonic() - (time.perf_counter() - first) - request.started_at

    prefill_s, rates = 0.0, dict.fromkeys(request.depths, 0.0)
    for length in sorted({*request.depths, request.prompt_tokens}):
        prompt = list(request.prompt_ids[: max(length, 1)])
        started = time.perf_counter()
        moments = _moments(loaded, [prompt], request.generation_tokens if length in rates else 1)
        if length == request.prompt_tokens:
            prefill_s = moments[0] - started
        if length in rates:
            rates[length] = _rate(moments)
    together = None
    if loaded.batches or not set(request.sequences) - {1}:
        prompts = [[*warm_up[:-1], token] for token in request.prompt_ids[: max(request.sequences, default=0)]]
        together = [n * _rate(_moments(loaded, prompts[:n], request.generation_tokens)) for n in request.sequences]

    drafted, row_seconds = loaded.drafts() if request.draft != "off" and loaded.drafts else (None, None)
    host, device = peak_process_bytes() or None, _peak_device_bytes(loaded)
    operations, kernels = loaded.decode_graph() if loaded.decode_graph else (None, None)
    return Run(
        load_s=load_s,
        start_to_first_token_s=start_to_first_token_s,
        time_to_first_token_s=prefill_s,
        prompt_tps=request.prompt_tokens / prefill_s,
        generation_tps=[rates[depth] for depth in request.depths],
        sequences_tps=together,
        peak_memory_bytes=host,
        peak_device_bytes=device,
        weight_bytes_per_token=loaded.weight_bytes_per_token,
        # Last: its buffer must not count as the engine's memory.
        read_bandwidth=read_bandwidth(loaded.framework, loaded.device),
        kv_element_bytes=loaded.kv_element_bytes,
        graph_operations=operations,
        graph_kernels=kernels,
        drafted=drafted,
        row_seconds=row_seconds,
        description=loaded.description,
    )


def _moments(loaded: Loaded, prompts: Sequence[list[int]], count: int) -> list[float]:
    """When each of `count` tokens was known, of all prompts together, by time.perf_counter()."""
    moments: list[float] = []
    loaded.generate(prompts, count, lambda: moments.append(time.perf_counter()))
    if len(moments) != count:
        raise BadValue(f"{loaded.description} gave {len(moments)} tokens, expected {count}")
    return moments


def _rate(moments: list[float]) -> float:
    """Tokens a second from the first one on."""
    return (len(moments) - 1) / (moments[-1] - moments[0])


def _peak_device_bytes(loaded: Loaded) -> int | None:
    if loaded.device == "cpu":
        return None
    if loaded.framework == "mlx":
        import mlx.core as mx

        return mx.get_peak_memory()
    import torch

    return torch.cuda.max_memory_allocated(loaded.device)


def read_bandwidth(framework: str, device: str) -> float:
    """Bytes a second of the best of several reductions over a large buffer, on all cores or on the accelerator."""
    count = BANDWIDTH_BUFFER_BYTES // 4
    if device == "cpu":
        cores = os.cpu_count() or 1
        parts = np.array_split(np.ones(count, dtype=np.float32), cores * 8)
        with ThreadPoolExecutor(cores) as threads:
            return _best_rate(lambda: list(threads.map(np.add.reduce, parts)))
    if framework == "mlx":
        import mlx.core as mx

        on_device: Any = mx.ones(count)
        return _best_rate(lambda: mx.eval(mx.sum(on_device)))
    import torch

    on_cuda = torch.ones(count, device=device)
    return _best_rate(lambda: on_cuda.sum().item())


def _best_rate(read_all: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(5):
        started = time.perf_counter()
        read_all()
        times.append(time.perf_counter() - started)
    return BANDWIDTH_BUFFER_BYTES / min(times)

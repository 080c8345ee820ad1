"""g3n_mlx itself."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from g3n_mlx.bench.drafts import drafted, row_seconds
from g3n_mlx.bench.engines.mlx_graph import count_graph, opaque_kernels
from g3n_mlx.bench.measure import SHORT_PROMPT, Loaded, Request, Run
from g3n_mlx.bench.measure import measure as measure_here
from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.runner import run
from g3n_mlx.rows import Draw, Rows
from g3n_mlx.sampling import SamplingParams


def check(request: Request) -> None:
    """Nothing that loading would not say as well."""


def measure(request: Request) -> Run:
    return measure_here(_load, request)


def count(request: Request) -> tuple[int, int]:
    """The nodes of a decode step's graph as a GPU has it, and its kernels."""
    with opaque_kernels():
        loaded = _load(request)
        assert loaded.decode_graph is not None
        return loaded.decode_graph()


def _load(request: Request) -> Loaded:
    from g3n_mlx.loading import load

    model = load(
        request.model,
        backend=request.backend,
        matformer=request.matformer,
        matformer_config=request.matformer_config,
        q_bits=request.q_bits,
        device=request.device,
        dtype=request.dtype,
        activations=request.activations,
        adapter=request.adapters,
    )

    def generate(prompts: Sequence[list[int]], count: int, on_token: Callable[[], None]) -> None:
        if len(prompts) > 1:
            model.runner.call(lambda: together(prompts, count, on_token))
            return
        model.reset()
        for chunk in model.stream(prompts[0], max_tokens=count, temperature=0.0, ignore_eos=True):
            if chunk.token is not None:
                on_token()

    def together(prompts: Sequence[list[int]], count: int, on_token: Callable[[], None]) -> None:
        network, params = model.runner.model, SamplingParams(temperature=0.0)
        caches = [Cache(model.config.text, network.kv_arrays) for _ in prompts]
        samplers = [network.make_sampler(params, prompt) for prompt in prompts]
        ids = [np.array(prompt) for prompt in prompts]
        for position in range(count):
            draws = [Draw(sampler, position) for sampler in samplers]
            drawn = run(network, [Rows(c, i, draw=d) for c, i, d in zip(caches, ids, draws, strict=True)])
            ids = [step for (step,) in drawn]
            for step in ids:
                int(step)
            on_token()

    def decode_graph() -> tuple[int, int]:
        network: Any = model.runner.model
        cache = model.conversation().cache
        run(network, [Rows(cache, np.array(request.prompt_ids[:SHORT_PROMPT]))])
        return count_graph(network.decode_graph(request.prompt_ids[-1], cache))

    def drafts() -> tuple[list[dict[str, Any]], list[tuple[int, float]]]:
        prompt = list(request.prompt_ids[: request.prompt_tokens])
        found = drafted(model, request.draft, prompt, request.generation_tokens)
        return [asdict(one) for one in found], row_seconds(model, prompt)

    return Loaded(
        description=f"g3n_mlx, {model.backend}, {model.dtype}, {model.device}",
        generate=generate,
        weight_bytes_per_token=model.checkpoint.nbytes_per_token,
        framework=model.backend,
        device=model.device,
        kv_element_bytes=4 if model.dtype == "float32" else 2,
        drafts=drafts,
        decode_graph=(lambda: model.runner.call(decode_graph)) if model.backend == "mlx" else None,
    )

"""Hugging Face transformers, in bfloat16."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from g3n_mlx.bench.engines.package import check_package
from g3n_mlx.bench.measure import Loaded, Request, Run
from g3n_mlx.bench.measure import measure as measure_here
from g3n_mlx.config.model import read_config
from g3n_mlx.failures import BadValue


def check(request: Request) -> None:
    check_package("transformers", "transformers")
    if "quantization" in read_config(Path(request.model)):
        raise BadValue(
            f"{request.model} is quantized in MLX's way, which transformers does not read: --peer-model FOLDER"
        )


def measure(request: Request) -> Run:
    return measure_here(_load, request)


def _load(request: Request) -> Loaded:
    # For images only, and a torchvision built for another torch would stop the import of transformers.
    sys.modules["torchvision"] = sys.modules["timm"] = None  # type: ignore[assignment]
    import torch
    from transformers import Gemma3nForCausalLM  # pyright: ignore[reportMissingImports]

    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # The text model alone, also from a checkpoint with towers: what is compared is text.
    model: Any = Gemma3nForCausalLM.from_pretrained(request.model, dtype=torch.bfloat16)
    model = model.to(device).eval()

    def generate(prompts: Sequence[list[int]], count: int, on_token: Callable[[], None]) -> None:
        # A criterion to stop is asked after every token, and alone is told of those of several prompts.
        def known(ids: torch.Tensor, _scores: Any) -> torch.Tensor:
            int(ids[0, -1])  # waits for it
            on_token()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        ids = torch.tensor(prompts, device=device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            stopping_criteria=[known],
        )

    read = sum(parameter.nbytes for name, parameter in model.named_parameters() if "embed_tokens_per_layer" not in name)
    return Loaded(f"transformers, bfloat16, {device}", generate, read, "torch", device)

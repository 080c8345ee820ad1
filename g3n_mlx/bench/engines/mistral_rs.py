"""mistral.rs, by its Python package. It quantizes a dense checkpoint while it loads, to as many bits as ours has.

It takes text, not ids, so every id of a prompt becomes a word that is one token. Source of the calls: mistralrs.pyi in
the package, version 0.9.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from g3n_mlx.bench.engines.package import check_package
from g3n_mlx.bench.measure import Loaded, Request, Run
from g3n_mlx.bench.measure import measure as measure_here
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.failures import BadValue

ONE_TOKEN = re.compile("▁[a-z]+")
BARE = "{{ messages[0]['content'] }}"  # a chat template that adds nothing
MAX_EXTRA_TOKENS = 2  # <bos>


def check(request: Request) -> None:
    check_package("mistralrs", "mistralrs")
    config = ModelConfig.from_file(Path(request.model))
    if config.vision is None or config.audio is None:
        raise BadValue(
            f"{request.model} has text alone, and mistral.rs loads no Gemma 3n without its towers: give it the whole "
            "checkpoint by --peer-model FOLDER"
        )


def measure(request: Request) -> Run:
    return measure_here(_load, request)


def _load(request: Request) -> Loaded:
    import mistralrs  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(Path(request.model) / "tokenizer.json")).get_vocab()
    words = sorted(word[1:] for word in vocabulary if ONE_TOKEN.fullmatch(word))
    bits = None if request.q_bits is None else str(request.q_bits)
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder, "bare.jinja")
        template.write_text(BARE)
        runner: Any = mistralrs.Runner(
            mistralrs.Which.MultimodalPlain(request.model, arch=mistralrs.MultimodalArchitecture.Gemma3n),
            in_situ_quant=bits,
            prefix_cache_n=0,
            jinja_explicit=str(template),
        )

    def generate(prompts: Sequence[list[int]], count: int, on_token: Callable[[], None]) -> None:
        (ids,) = prompts
        asked = mistralrs.ChatCompletionRequest(
            messages=[{"role": "user", "content": " ".join(words[token % len(words)] for token in ids)}],
            model="default",
            max_tokens=count,
            temperature=0.0,
            stream=True,
            ignore_eos=True,
        )
        chunks, usage = 0, None
        for chunk in runner.send_chat_completion_request(asked):
            chunks, usage = chunks + 1, chunk.usage or usage
            if chunks <= count:
                on_token()
        if usage is None or not 0 <= usage.prompt_tokens - len(ids) <= MAX_EXTRA_TOKENS:
            found = "no count" if usage is None else usage.prompt_tokens
            raise BadValue(f"mistralrs made {found} tokens of a prompt of {len(ids)} words")
        # The last chunk has those that were no whole letters yet.
        for _ in range(usage.completion_tokens - min(chunks, count)):
            on_token()

    quantized = "as stored" if bits is None else f"{bits} bits"
    return Loaded(f"mistralrs, {quantized}", generate, None, "mistralrs", "cpu", batches=False)

"""How many answers a machine has memory for at once."""

from g3n_mlx.engine.conversation import MAX_SNAPSHOTS
from g3n_mlx.interface import MAX_TRIM_TOKENS
from g3n_mlx.memory import available_bytes
from g3n_mlx.model import ACTIVATION_BYTES, Gemma3n

# Of an answer and its prompt: a page of text and two images. Longer ones wait, as long as others need the memory.
USUAL_TOKENS = 4096
# More in a call bring little on a CPU (docs/performance.md), and each makes the time between tokens longer.
MAX_PARALLEL = 8


def answer_bytes(model: Gemma3n, tokens: int) -> int:
    """The most bytes that the cache of an answer takes with its snapshots, once it holds so many tokens."""
    text = model.config.text
    row_bytes = 2 * text.num_key_value_heads * text.head_dim * ACTIVATION_BYTES[model.dtype]
    owners = text.layer_types[: text.first_kv_shared_layer]
    sliding = sum(kind == "sliding_attention" for kind in owners)
    window = min(tokens, text.sliding_window - 1 + MAX_TRIM_TOKENS)
    return row_bytes * ((len(owners) - sliding) * tokens + sliding * window * (1 + MAX_SNAPSHOTS))


def default_parallel(model: Gemma3n, cache_bytes: int) -> int:
    """Answers in progress at once: those whose caches fit, from 1 to MAX_PARALLEL.

    cache_bytes: what caches may take. On a CPU they take no more than half of what the system has left.
    """
    room = min(cache_bytes, available_bytes() // 2) if model.device == "cpu" else cache_bytes
    return max(1, min(MAX_PARALLEL, room // answer_bytes(model, USUAL_TOKENS)))

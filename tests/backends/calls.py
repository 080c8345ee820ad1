"""The model's calls as tests make them: one sequence, ids in, steps or logits out."""

from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.runner import all_logits, run
from g3n_mlx.rows import Draw, Rows


def make_cache(network):
    """An empty cache."""
    return Cache(network.config.text, network.kv_arrays)


def prefill(network, token_ids, cache, sampler=None, soft=(), mask=None):
    """Appends ids to the cache; with a sampler, the step that follows the last of them."""
    (steps,) = run(network, [Rows(cache, token_ids, soft, None if sampler is None else Draw(sampler, 0, [mask]))])
    return steps[0] if steps else None


def decode(network, step, cache, sampler, position=1, mask=None):
    """Appends the step's token to the cache; the next step."""
    ((drawn,),) = run(network, [Rows(cache, step, draw=Draw(sampler, position, [mask]))])
    return drawn


def logits_of(network, token_ids, cache, soft=()):
    """Appends ids to the cache; the logits of all of them."""
    return all_logits(network, Rows(cache, token_ids, soft))

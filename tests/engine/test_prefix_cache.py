"""Which idle conversation a prompt takes, and which one goes first when memory is short."""

import pytest

pytest.importorskip("fastapi")

from g3n_mlx.engine.prefix_cache import PrefixCache


class Idle:
    """A conversation of ten bytes that can be gone on with where it ends."""

    nbytes = 10

    def __init__(self, *token_ids):
        self.token_ids = list(token_ids)

    def reusable(self, identity):
        return len(self.token_ids) if list(identity[: len(self.token_ids)]) == self.token_ids else 0

    def mark(self):
        pass

    def fork(self, identity):
        return Idle(*self.token_ids) if self.reusable(identity) else None


def test_a_prompt_that_shares_nothing_leaves_the_order_alone():
    cache = PrefixCache(lambda of: Idle())
    old, middle, recent = Idle(1, 2), Idle(3, 4), Idle(5, 6)
    for conversation in (old, middle, recent):
        cache.put(conversation)
    assert cache.take([9, 9, 9], []).token_ids == []
    cache.shrink(10)
    assert cache.take([5, 6, 7], []) is recent


def test_a_slice_finds_its_own_conversations_alone():
    cache = PrefixCache(lambda of: Idle())
    whole, half = Idle(1, 2), Idle(1, 2)
    cache.put(whole)
    cache.put(half, "half")  # the same ids; neither replaces the other
    assert cache.take([1, 2, 3], [], "quarter").token_ids == []
    assert cache.take([1, 2, 3], [], "half") is half
    assert cache.take([1, 2, 3], []) is whole

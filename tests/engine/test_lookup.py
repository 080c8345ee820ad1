"""The index behind drafts by lookup, beside a search through the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from g3n_mlx.engine.lookup import LEAST_MATCH, LONGEST_MATCH, PLACES, Lookup

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def searched(ids):
    """The earlier places of the last pair, latest first, each with the length of its match."""
    found = []
    for end in range(len(ids) - 1, LEAST_MATCH - 1, -1):
        length = 0
        while length < min(end, LONGEST_MATCH) and ids[end - 1 - length] == ids[-1 - length]:
            length += 1
        if length >= LEAST_MATCH:
            found.append((end, length))
    return found[:PLACES]


@given(ids=TEXTS)
def test_the_longest_match_is_found_and_of_several_the_latest(ids):
    found = searched(ids)
    longest = max((length for _, length in found), default=0)
    expected = next(((end, length) for end, length in found if length == longest), (0, 0))
    assert Lookup(ids).match() == expected


@given(ids=TEXTS, more=TEXTS)
def test_an_index_that_grew_is_that_of_the_whole_text(ids, more):
    grown = Lookup(ids)
    for token_id in more:
        grown.push(token_id)
    assert grown.match() == Lookup(ids + more).match()


def test_what_follows_repeats_where_the_text_ends():
    lookup = Lookup([7, 1, 2, 3, 4, 1, 2])
    assert lookup.match() == (3, 2)
    assert lookup.following(3, 3) == [3, 4, 1]
    assert lookup.following(3, 9) == [3, 4, 1, 2, 3, 4, 1, 2, 3]
    assert lookup.following(3, 0) == []

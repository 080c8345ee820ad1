"""Drafts by lookup: what followed the last tokens where they stood before, in the prompt or the answer so far.

Answers that edit, extract, translate names or correct a transcript repeat long pieces of their prompt. Known as prompt
lookup and n-gram speculation (Saxena, 2023; LLMA, arXiv 2304.04487).
"""

from collections.abc import Iterable

# Tokens that must agree before a continuation is taken for likely; two keep the index small and commas out of it.
LEAST_MATCH = 2
# Earlier places that are compared, latest first, and tokens of each: what is looked at stays bounded in any text.
PLACES, LONGEST_MATCH = 16, 32


class Lookup:
    """An index of a text's pairs of tokens, which grows with the text."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self.token_ids: list[int] = []
        self._ends: dict[tuple[int, int], list[int]] = {}  # of every pair: the indices behind it
        for token_id in token_ids:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        """The text goes on with a token."""
        ids = self.token_ids
        ids.append(token_id)
        if len(ids) >= LEAST_MATCH:
            self._ends.setdefault((ids[-2], token_id), []).append(len(ids))

    def match(self) -> tuple[int, int]:
        """Index behind the earlier place that agrees with the text's end in the most tokens, and how many these are.

        Of several the latest; (0, 0) where there is none. At most LONGEST_MATCH tokens count.
        """
        ids, best, longest = self.token_ids, 0, 0
        ends = self._ends.get((ids[-2], ids[-1]), ()) if len(ids) >= LEAST_MATCH else ()
        for end in ends[-2 : -2 - PLACES : -1]:  # the last one is the text's own end
            length = LEAST_MATCH
            while length < min(end, LONGEST_MATCH) and ids[end - length - 1] == ids[-length - 1]:
                length += 1
            if length > longest:
                best, longest = end, length
            if longest == LONGEST_MATCH:
                break
        return best, longest

    def following(self, index: int, count: int) -> list[int]:
        """The tokens from an index on; past the end of the text they repeat from there, as a period would."""
        ids = self.token_ids
        return [ids[index + i % (len(ids) - index)] for i in range(count)]

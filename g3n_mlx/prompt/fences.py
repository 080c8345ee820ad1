"""Other people's text in a prompt, in a fence that it can't end."""

import re


def fence_around(text: str) -> str:
    """Backticks, more than stand together in the text, and three at least."""
    return "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`{3,}", text))])


def fenced(name: str, text: str) -> str:
    """A file's text under its name."""
    fence = fence_around(text)
    return f"{' '.join(name.split())}:\n{fence}\n{text.strip()}\n{fence}"

"""What an example of a skill is: a conversation whose model turns are the truth."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with the model's turn; media parts hold their content, not a path."""

    skill: str
    messages: Sequence[Message]

    @property
    def question(self) -> Sequence[Message]:
        """All but the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last turn: what the model should say."""
        return self.messages[-1]["content"]


# A generator draws everything from the random numbers it is given; `held_out` chooses the voices, fonts, sizes,
# numbers and names that training never shows.
Generator = Callable[[random.Random, bool], Example]


def dialogue(skill: str, *turns: Any) -> Example:
    """User and model turns in order, the user's first."""
    roles = ("user", "assistant")
    return Example(skill, [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)])

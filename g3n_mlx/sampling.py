"""How the next token is chosen: the options, the uniform numbers, and the rules of the draw.

Both backends draw on their device, by the same rules: candidates stand in the order logit descending, id ascending;
top_k, then top_p and min_p cut that list; one uniform number per token picks from it by inverse CDF. So equal logits
and an equal seed give the same token everywhere.
Names and ranges as in OpenAI's API and vLLM.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypedDict

import numpy as np

from g3n_mlx.failures import BadValue

# The id of a step whose logits are not finite: NaN or infinity came out of the weights.
NOT_FINITE = -1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Options of one answer. Raises ValueError on a value out of range, naming it."""

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0  # of the best candidate's probability
    frequency_penalty: float = 0.0  # times the count of the token in the answer
    presence_penalty: float = 0.0  # once the token is in the answer
    repetition_penalty: float = (
        1.0  # divides a positive, multiplies a negative logit of a token seen in prompt or answer
    )
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    max_tokens: int | None = None  # None = up to the context limit
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # besides the end-of-sequence ids
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prefill_step_size: int = 512  # tokens a prefill chunk; never changes results beyond rounding

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            listed = isinstance(getattr(self, name), Iterable | None)
            _require(listed, name, getattr(self, name), "a list")
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        ids = tuple(self.stop_token_ids or ())
        _require(all(_is_int(i) for i in ids), "stop_token_ids", ids, "token ids")
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in ids))
        try:
            bias = {int(i): float(b) for i, b in (self.logit_bias or {}).items()}
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise BadValue(f"logit_bias is {self.logit_bias!r}, expected a dict of numbers by token id") from None
        object.__setattr__(self, "logit_bias", MappingProxyType(bias))
        if self.top_k == -1:  # vLLM's spelling of "all"
            object.__setattr__(self, "top_k", 0)
        for name in ("ignore_eos", "logprobs"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"):
            _require(_is_real(getattr(self, name)), name, getattr(self, name), "a number")
        _require(self.temperature >= 0 and np.isfinite(self.temperature), "temperature", self.temperature, "at least 0")
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an integer of at least 0 (0: all)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _require(np.isfinite(self.frequency_penalty), "frequency_penalty", self.frequency_penalty, "a finite number")
        _require(np.isfinite(self.presence_penalty), "presence_penalty", self.presence_penalty, "a finite number")
        _require(0 < self.repetition_penalty < np.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        # -inf forbids a token; +inf would leave no probabilities.
        _require(all(b < np.inf for b in bias.values()), "logit_bias", bias, "numbers below infinity")
        _require(self.seed is None or (_is_int(self.seed) and self.seed >= 0), "seed", self.seed, "an integer >= 0")
        bounded = self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1)
        _require(bounded, "max_tokens", self.max_tokens, "an integer of at least 1")
        _require(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "non-empty strings")
        _require(_is_int(self.top_logprobs) and self.top_logprobs >= 0, "top_logprobs", self.top_logprobs, "at least 0")
        step = self.prefill_step_size
        _require(_is_int(step) and step >= 1, "prefill_step_size", step, "an integer of at least 1")

    @property
    def greedy(self) -> bool:
        """Whether the best candidate is taken without a draw."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalizes(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError when an id of `logit_bias` or `stop_token_ids` is not a token."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            wrong = [i for i in ids if not 0 <= i < vocab_size]
            _require(not wrong, name, wrong, f"ids below the vocabulary size, {vocab_size}")

    @staticmethod
    def published_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
        """The sampling keywords that a checkpoint's generation_config.json sets."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        found = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
        if generation_config.get("do_sample") is False:
            found["temperature"] = 0.0
        return found


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keywords, for completion and type checks; None is the same as not given."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    prefill_step_size: int | None


def check_option_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError for the first name that is not an option, with the one that was probably meant."""
    known = list(known)
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]}?" if near else "see g3n_mlx.SamplingParams for those there are"
            raise BadValue(f"there is no option {name!r}: {advice}")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise BadValue(f"{name} is {value!r}, expected {expected}")


def _is_real(value: object) -> bool:
    """Whether a value is a number that a float holds; integers of hundreds of digits are not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class Uniforms:
    """The uniform numbers in [0, 1) of one answer: the one of a position depends on it and the seed alone.

    So a draft that is drawn and rejected does not change what follows. Philox (Salmon et al., SC 2011) turns a counter,
    the position, and a key, the seed, into random bits.
    """

    def __init__(self, seed: int | None) -> None:
        """seed: an integer of any size; None takes one from the system."""
        self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)

    def at(self, position: int) -> float:
        """The number of a position of the answer, from 0; exact in float32 and below 1 there."""
        generator = np.random.Generator(np.random.Philox(counter=position, key=self._key))
        return float(generator.random(dtype=np.float32))

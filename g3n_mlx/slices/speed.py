"""Decode speed as a budget of bytes: a token takes a fixed time, and more for every byte of weights that it reads.

The line is laid through two measured models, the whole and the smallest candidate.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from g3n_mlx.failures import BadValue

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

_PROMPT_TOKENS = 16
_TIMED_TOKENS = 48
_TRIALS = 3


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds a token by bytes of weights read for it."""

    fixed_s: float
    s_per_byte: float

    @staticmethod
    def through(small: tuple[int, float], large: tuple[int, float]) -> "Line":
        """Through two models: bytes read a token, and tokens per second of each.

        Raises ValueError where the larger model is not slower.
        """
        (small_bytes, small_speed), (large_bytes, large_speed) = small, large
        slope = (1 / large_speed - 1 / small_speed) / (large_bytes - small_bytes)
        if slope <= 0:
            raise BadValue(
                f"size makes no difference to the speed here: the whole model decodes {large_speed:.1f} tokens/s, the "
                f"smallest candidate {small_speed:.1f}; give --budget instead"
            )
        return Line(1 / large_speed - large_bytes * slope, slope)

    def seconds(self, num_bytes: float) -> float:
        """Of a token that reads so many bytes."""
        return self.fixed_s + self.s_per_byte * num_bytes

    def budget(self, tokens_per_s: float) -> int:
        """The bytes that a token may read at a speed; 0 where the fixed time alone is too long."""
        return max(0, int((1 / tokens_per_s - self.fixed_s) / self.s_per_byte))


def decode_speed(model: "Gemma3n") -> float:
    """Tokens per second behind a short prompt, the best of three runs."""
    prompt = [model.tokenizer.bos_id, *range(200, 199 + _PROMPT_TOKENS)]
    speeds: list[float] = []
    for _ in range(_TRIALS):
        model.reset()
        answer = model.generate(
            prompt, max_tokens=_TIMED_TOKENS, temperature=0.0, repetition_penalty=1.0, ignore_eos=True
        )
        speeds.append(answer.usage.avg_compl_tok_per_sec)
    return max(speeds)

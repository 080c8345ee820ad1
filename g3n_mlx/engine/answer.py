"""One answer as its reader gets it: text, log probabilities and figures over the ids of a sequence."""

from collections.abc import Callable, Sequence

from g3n_mlx.engine.results import Chunk, Usage
from g3n_mlx.engine.runner import Failure
from g3n_mlx.engine.sequence import Timings, TokenSequence
from g3n_mlx.engine.stops import StopStrings
from g3n_mlx.prompt.tokenizer import StreamDecoder
from g3n_mlx.rows import Rows, Step
from g3n_mlx.sampling import SamplingParams

# Takes how many of the prompt's tokens the cache holds, and how many there are.
Progress = Callable[[int, int], None]


class Answer:
    """A sequence with what is made of its steps. A task of the runner."""

    def __init__(
        self,
        sequence: TokenSequence,
        text: StreamDecoder,
        params: SamplingParams,
        peak_memory_bytes: Callable[[], int],
        progress: Progress | None = None,
    ) -> None:
        """progress: called after every part of the prompt."""
        self.sequence = sequence
        self._progress = progress
        self.finished = False
        self._text, self._params, self._peak_memory_bytes = text, params, peak_memory_bytes
        self._stops = StopStrings(params.stop)

    @property
    def decoding(self) -> bool:
        """Whether the next wish is one token, and perhaps a draft; else it is a part of the prompt."""
        return self.sequence.decoding

    def wish(self, together: int = 1) -> Rows:
        """The rows to append next. together: how many answers share the call."""
        return self.sequence.wish(together)

    def told(self, steps: Sequence[Step]) -> list[Chunk]:
        """The chunks that come of a wish: none after a part of the prompt; the last one ends the answer."""
        chunks: list[Chunk] = []

        def each(token: Step | int) -> bool:
            token_id = int(token)
            chunks.append(Chunk(self._stops.push(self._text.push(token_id)), token_id, *self._logprobs(token)))
            return self._stops.found is None

        reading = not self.decoding
        self.sequence.told(steps, each)
        if self._progress is not None and reading:
            prompt_tokens = self.sequence.timings.prompt_tokens
            self._progress(min(self.sequence.conversation.cache.offset, prompt_tokens), prompt_tokens)
        if self.sequence.finished:
            self.finished = True
            chunks.append(self._end())
        return chunks

    def _end(self) -> Chunk:
        found, timings = self._stops.found, self.sequence.timings
        rest = "" if found else self._stops.push(self._text.finish()) + self._stops.finish()
        reason = "length" if timings.at_limit and not found else "stop"
        return Chunk(rest, finish_reason=reason, stop=found, usage=usage(timings, self._peak_memory_bytes()))

    def _logprobs(self, token: Step | int) -> tuple[float | None, tuple[tuple[int, float], ...] | None]:
        top = self._params.top_logprobs
        if not self._params.logprobs and not top:
            return None, None
        assert not isinstance(token, int), "tokens without a draw have no scores"
        return token.logprob(), tuple(token.top_logprobs(top)) if top else None


def chunks_of(outcome: list[Chunk] | Failure) -> list[Chunk]:
    """What the runner says of an answer's wish; raises its failure."""
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome


def usage(timings: Timings, peak_memory_bytes: int) -> Usage:
    """The counts and averages of one answer."""
    computed, decoded = timings.prompt_tokens - timings.cached_tokens, timings.completion_tokens - 1
    return Usage(
        prompt_tokens=timings.prompt_tokens,
        cached_tokens=timings.cached_tokens,
        completion_tokens=timings.completion_tokens,
        time_to_first_token_s=timings.prefill_s,
        avg_prompt_tok_per_sec=computed / timings.prefill_s,
        avg_compl_tok_per_sec=decoded / timings.decode_s if decoded > 0 and timings.decode_s else 0.0,
        peak_memory_bytes=peak_memory_bytes,
        drafted_tokens=timings.drafted_tokens,
        accepted_tokens=timings.accepted_tokens,
        tokens_per_call=1 + timings.accepted_tokens / timings.decode_calls if timings.decode_calls else 0.0,
    )

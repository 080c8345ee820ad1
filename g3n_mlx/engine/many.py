"""Answers to many prompts, several at a time in the same calls of the model."""

from collections.abc import Iterator

from g3n_mlx.engine.answer import Answer
from g3n_mlx.engine.results import Chunk
from g3n_mlx.engine.runner import Failure, Rounds, Runner
from g3n_mlx.failures import is_expected


def answers(
    runner: Runner, begun: Iterator[tuple[int, Answer | Exception]], parallel: int
) -> Iterator[tuple[int, list[Chunk] | Exception]]:
    """The chunks of many answers, as they are complete, `parallel` at a time in the same calls; or what went wrong.

    begun: numbered answers, the next one taken when there is room; one that could not be begun is an error.
    """
    rounds: Rounds[Answer] = Rounds(lambda answer: answer.decoding)
    written: dict[Answer, tuple[int, list[Chunk]]] = {}
    while True:
        while len(rounds.tasks) < parallel and (entry := next(begun, None)) is not None:
            number, answer = entry
            if isinstance(answer, Exception):
                yield number, answer
            else:
                rounds.tasks.append(answer)
                written[answer] = number, []
        if not rounds.tasks:
            return
        for tasks in rounds.calls():
            for answer, outcome in zip(tasks, runner.advance(tasks), strict=True):
                number, chunks = written[answer]
                result: list[Chunk] | Exception = chunks
                if isinstance(outcome, Failure):
                    if not isinstance(outcome.error, Exception) or not is_expected(outcome.error):
                        raise outcome.error  # a bug, no property of the prompt
                    result = outcome.error
                else:
                    chunks += outcome
                if result is not chunks or answer.finished:
                    rounds.tasks.remove(answer)
                    del written[answer]
                    yield number, result

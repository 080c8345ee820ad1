"""How good answers and probabilities are: right answers, word errors, perplexity, KL divergence.

Perplexity is taken in windows, as Hugging Face's "Perplexity of fixed-length models" does it: a window moves by a
stride, and of each one only the tokens count that none before it counted. Every window begins with `<bos>`, without
which Gemma's probabilities are worth nothing. A model and the reference are asked for the same few rows of logits in
turn, so a vocabulary of 262,400 tokens needs no more memory than a small one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from g3n_mlx.config.fields import parse_json
from g3n_mlx.failures import BadValue
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.prompt.prompt import Prompt

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

METRICS = {"exact": "accuracy", "wer": "word error rate"}
SPARE_TOKENS = 8  # beyond twice the right answer's: a wrong one is seen to be wrong
LOGITS_BYTES = 128 << 20  # of one model's float32 logits at a time


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its answer."""

    skill: str
    messages: list[Any]
    answer: str
    metric: str  # one of METRICS
    folder: Path  # that media files lie below
    where: str  # file and line, for errors


def read_text(path: Path) -> str:
    """A file's text, newlines as they are; raises OSError, or ValueError when it is empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadValue(f"{path} is not UTF-8 text: {error}") from None
    if not text:
        raise BadValue(f"{path} is empty")
    return text


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """The examples of a JSON lines file, or the first so many of every skill; media lie below the file's folder.

    Raises OSError, or ValueError naming the line that does not fit.
    """
    by_skill: dict[str, list[Example]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        example = _parsed(line, path.absolute().parent, f"{path}, line {number}")
        same_skill = by_skill.setdefault(example.skill, [])
        if same_skill and same_skill[0].metric != example.metric:
            raise BadValue(
                f"{example.where}: the metric of skill {example.skill!r} is {example.metric!r}, and was "
                f"{same_skill[0].metric!r} before; give the skill two names"
            )
        same_skill.append(example)
    if not by_skill:
        raise BadValue(f"{path} holds no examples")
    return [example for examples in by_skill.values() for example in examples[:limit]]


def _parsed(line: str, folder: Path, where: str) -> Example:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise BadValue(f"{where}: is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise BadValue(f"{where}: is a {type(entry).__name__}, expected an object")
    for key, kind in (("skill", str), ("messages", list), ("answer", str), ("metric", str)):
        if not isinstance(entry.get(key), kind):
            raise BadValue(f"{where}: {key!r} is {entry.get(key)!r:.80}, expected a {kind.__name__}")
    if entry["metric"] not in METRICS:
        raise BadValue(f"{where}: the metric is {entry['metric']!r}, expected one of {', '.join(METRICS)}")
    if not entry["answer"].strip():
        raise BadValue(f"{where}: the answer is empty")
    return Example(entry["skill"], entry["messages"], entry["answer"], entry["metric"], folder, where)


def answer(model: "Gemma3n", example: Example) -> str:
    """What the model says, always the most likely token; no longer than twice the right answer and a few words.

    The right answer is verified first, in one pass, as a draft would be: it is what greedy decoding gives exactly when
    each of its tokens, and then an end, is the most likely after those before. Only another answer is decoded.
    Raises ValueError naming the example when its messages or media can't be used.
    """
    model.reset()  # an answer must not depend on the example before it
    try:
        truth = model.tokenizer.encode(example.answer)
        prompt = model.prepare(example.messages, MediaPolicy(paths=example.folder))
        if says(model, prompt, truth):
            return example.answer
        max_tokens = 2 * len(truth) + SPARE_TOKENS
        return model.generate(prompt, max_tokens=max_tokens, temperature=0.0, repetition_penalty=1.0).text
    except ValueError as error:
        raise BadValue(f"{example.where}: {error}") from None


def says(model: "Gemma3n", prompt: Prompt, draft: Sequence[int]) -> bool:
    """Whether greedy decoding gives these tokens and then ends."""
    length = len(prompt.token_ids)
    whole = replace(prompt, token_ids=(*prompt.token_ids, *draft))
    most_likely = [int(i) for logits in model.logit_chunks(whole, length - 1) for i in logits.argmax(axis=-1)]
    return most_likely[:-1] == list(draft) and most_likely[-1] in model.eos_token_ids


def grade(examples: Sequence[Example], answers: Sequence[str]) -> tuple[dict[str, float], float]:
    """Accuracy or word error rate by skill, and the mean over the skills, where an error rate counts as 1 minus it."""
    wrong, possible = Counter[str](), Counter[str]()
    for example, said in zip(examples, answers, strict=True):
        found, most = errors(example.metric, said, example.answer)
        wrong[example.skill] += found
        possible[example.skill] += most
    error_rates = {skill: wrong[skill] / possible[skill] for skill in possible}
    metrics = {example.skill: example.metric for example in examples}
    rates = {skill: rate if metrics[skill] == "wer" else 1 - rate for skill, rate in error_rates.items()}
    return rates, 1 - sum(error_rates.values()) / len(error_rates)


def errors(metric: str, answer: str, truth: str) -> tuple[int, int]:
    """How many errors of how many possible ones: of one answer, or of the truth's words. Case does not count."""
    if metric == "exact":
        return int(answer.strip().casefold() != truth.strip().casefold()), 1
    words = truth.casefold().split()
    return word_errors(answer.casefold().split(), words), len(words)


def word_errors(answer: Sequence[str], truth: Sequence[str]) -> int:
    """The fewest words to insert, delete or replace that make the answer of the truth."""
    row = list(range(len(answer) + 1))
    for count, word in enumerate(truth, 1):
        above, row = row, [count]
        for place, said in enumerate(answer):
            row.append(min(above[place] + (said != word), above[place + 1] + 1, row[place] + 1))
    return row[-1]


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a model's next-token distributions are from the reference's; None without a reference."""

    kl_mean: float | None = None  # nats
    kl_error: float | None = None  # its standard error, tokens taken as independent
    kl_p99: float | None = None  # 99th percentile over the tokens
    same_top1: float | None = None  # share of tokens where both find the same token most likely

    @staticmethod
    def of(pairs: Sequence[tuple[float, bool]]) -> "Divergence":
        """pairs: of every token the divergence, and whether both find the same token most likely."""
        values = [value for value, _ in pairs]
        error = float(np.std(values) / np.sqrt(len(values)))
        same = sum(same for _, same in pairs) / len(pairs)
        return Divergence(float(np.mean(values)), error, float(np.quantile(values, 0.99)), same)


@dataclass(frozen=True, slots=True)
class TextQuality(Divergence):
    """What a model makes of a text; divergence and agreement are against the reference."""

    perplexity: float = 0.0  # per token
    perplexity_per_byte: float = 0.0


def windows(length: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Spans (start, first, stop) over a text: of the window [start, stop) the tokens from `first` on count.

    Every token counts once; all windows but the last count `stride` tokens, or as many as they hold when first.
    """
    first = 0
    while first < length:
        stop = min(first + (stride if first else size), length)
        yield max(0, stop - size), first, stop
        first = stop


def measure_text(
    model: "Gemma3n",
    reference: "Gemma3n | None",
    ids: Sequence[int],
    num_bytes: int,
    spans: Sequence[tuple[int, int, int]],
    progress: Callable[[int], object],
) -> TextQuality:
    """The quality of a model on a text, alone or against a reference with the same tokenizer.

    ids: of the text of so many bytes, without `<bos>`. spans: its windows. progress: is told how many tokens were done.
    Raises PromptTooLong when the context has no room for a window.
    """
    rows = _rows_at_once(model)
    loss = 0.0
    pairs: list[tuple[float, bool]] = []
    for start, first, stop in spans:
        # The row of a token predicts the next one: the last token is not read, and bos predicts the first.
        prompt = [model.tokenizer.bos_id, *ids[start : stop - 1]]
        ours = _log_probabilities(model, prompt, first - start, rows)
        theirs = repeat(None) if reference is None else _log_probabilities(reference, prompt, first - start, rows)
        for target, row, other in zip(ids[first:stop], ours, theirs, strict=False):
            loss -= float(row[target])
            if other is not None:
                pairs.append(_divergence(row, other))
        progress(stop - first)
    perplexity, per_byte = float(np.exp(loss / len(ids))), float(np.exp(loss / num_bytes))
    if reference is None:
        return TextQuality(perplexity=perplexity, perplexity_per_byte=per_byte)
    return TextQuality(**asdict(Divergence.of(pairs)), perplexity=perplexity, perplexity_per_byte=per_byte)


def measure_examples(
    model: "Gemma3n", reference: "Gemma3n", examples: Sequence[Example], progress: Callable[[int], object]
) -> Divergence:
    """How far a model is from a reference with the same tokenizer, over the tokens of the expected answers and the end.

    Raises ValueError naming the example when its messages or media can't be used.
    """
    rows = _rows_at_once(model)
    pairs: list[tuple[float, bool]] = []
    for example in examples:
        truth = model.tokenizer.encode(example.answer)
        both: list[Iterator[np.ndarray]] = []
        for one in (model, reference):
            try:
                prompt = one.prepare(example.messages, MediaPolicy(paths=example.folder))
            except ValueError as error:
                raise BadValue(f"{example.where}: {error}") from None
            whole = replace(prompt, token_ids=(*prompt.token_ids, *truth))
            both.append(_log_probabilities(one, whole, len(prompt.token_ids) - 1, rows))
        pairs += [_divergence(ours, theirs) for ours, theirs in zip(*both, strict=True)]
        progress(1)
    return Divergence.of(pairs)


def _rows_at_once(model: "Gemma3n") -> int:
    return max(1, LOGITS_BYTES // (4 * model.config.text.vocab_size))


def _divergence(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, bool]:
    """Of log probabilities: the divergence of ours from theirs, and whether their most likely tokens are the same."""
    return float(np.exp(theirs) @ (theirs - ours)), bool(ours.argmax() == theirs.argmax())


def _log_probabilities(model: "Gemma3n", prompt: list[int] | Prompt, start: int, rows: int) -> Iterator[np.ndarray]:
    """Log probabilities, float64 [V], of what follows each of the prompt's tokens from `start` on."""
    for logits in model.logit_chunks(prompt, start, rows):
        for row in logits:
            shifted = row.astype(np.float64) - row.max()
            yield shifted - np.log(np.exp(shifted).sum())

"""`python -m g3n_mlx.chat`: chat with Gemma 3n in a terminal, or ask it once with `-p`.

Heavy imports wait until they are needed: `--help` answers at once.
"""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from g3n_mlx.chat import attachments
from g3n_mlx.chat.session import SETTINGS, Session
from g3n_mlx.chat.terminal import message_lines, typed_messages
from g3n_mlx.commands import INTERRUPTED, run_command, say


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags, loads the model, chats; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model's words must not fail on a terminal's letters; in a pipe they are UTF-8 everywhere.
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    return run_command("g3n-chat", lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="g3n-chat", description="Chat with Gemma 3n, or ask it once with -p.")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or hub id; default: the newest Gemma 3n here, else the demo model")
    model.add_argument("--revision", help="branch, tag or commit of a hub id")
    model.add_argument("--matformer", metavar="SLICE", help="MatFormer slice to take at load, by name or short form")
    model.add_argument("--matformer-config", type=Path, metavar="FILE", help="CSV table of slices of your own")
    model.add_argument("--q-bits", type=int, metavar="N", help="quantize at first load, into the cache: 2 to 6, or 8")
    model.add_argument("--backend", choices=["auto", "mlx", "torch"], default="auto")
    model.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the backend's best")
    model.add_argument("--dtype", choices=["bfloat16", "float32"], help="of activations; default: the device's best")
    answer = parser.add_argument_group("answer")
    answer.add_argument("-p", "--prompt", help="ask once, print the answer and exit; - reads the prompt from stdin")
    for kind in attachments.SUFFIXES:
        answer.add_argument(
            f"--{kind}",
            metavar="FILE",
            dest="attached",
            action="append",
            default=[],
            type=lambda source, kind=kind: attachments.part(kind, source),
            help=f"{kind} file or URL that the first question is about; repeatable",
        )
    answer.add_argument("--system-prompt", metavar="TEXT", help="what the model is told before the conversation")
    answer.add_argument("--max-tokens", type=int, metavar="N", help="of one answer; default: to the context limit")
    answer.add_argument("--temperature", "--temp", type=float, metavar="X", help="0 takes the likeliest token always")
    answer.add_argument("--top-p", type=float, metavar="X")
    answer.add_argument("--top-k", type=int, metavar="N")
    answer.add_argument("--min-p", type=float, metavar="X")
    answer.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    answer.add_argument("--prefill-step-size", type=int, metavar="N", help="prompt tokens read at once")
    parser.add_argument("--verbose", action="store_true", help="log lines, and figures after every answer")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    # Whatever is wrong with the flags or stdin is said before the model takes its time to load.
    from g3n_mlx.sampling import SamplingParams

    settings = {name: value for name in SETTINGS if (value := getattr(arguments, name, None)) is not None}
    SamplingParams(**settings)
    prompt = _one_shot_prompt(arguments.prompt)
    if arguments.model is None:
        from g3n_mlx.checkpoint.hub import default_model

        arguments.model, line = default_model()
        say(line)

    from g3n_mlx.loading import load

    model = load(
        arguments.model,
        backend=arguments.backend,
        matformer=arguments.matformer,
        matformer_config=arguments.matformer_config,
        q_bits=arguments.q_bits,
        dtype=arguments.dtype,
        device=arguments.device,
        revision=arguments.revision,
    )
    session = Session(model, arguments.system_prompt, settings, verbose=arguments.verbose)
    if prompt is None:
        say(f"{model.name} on {model.backend} ({model.device}); /help lists the commands, Ctrl-D ends")
    for part in arguments.attached:
        session.attach(part, quiet=prompt is not None)
    if prompt is not None:
        return INTERRUPTED if session.ask(prompt).stopped else 0
    if sys.stdin.isatty() and sys.stdout.isatty():
        session.run(typed_messages())
        return 0
    session.run(message_lines())
    return 1 if session.failures else 0


def _one_shot_prompt(prompt: str | None) -> str | None:
    """The text of `-p`; stdin's when it is a dash. Raises ValueError when there is none in it."""
    if prompt != "-":
        if prompt is not None and not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError("the prompt is empty: stdin had no text")
    return text


if __name__ == "__main__":
    sys.exit(main())

"""`python -m g3n_mlx.chat`: chat with Gemma 3n in a terminal, or ask it once with a prompt on the command line.

Heavy imports wait until they are needed: `--help` answers at once.
"""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g3n_mlx.chat import attachments, kept
from g3n_mlx.chat.keyboard import typed_messages
from g3n_mlx.chat.models import Models
from g3n_mlx.chat.session import Session
from g3n_mlx.chat.settings import SETTINGS
from g3n_mlx.chat.terminal import message_lines, takes_styles
from g3n_mlx.commands import (
    INTERRUPTED,
    MODEL_FLAGS,
    add_fits_flag,
    add_model_flag,
    check_choice,
    command_parser,
    log_to_stderr,
    run_command,
    say,
)
from g3n_mlx.config.fields import parse_json
from g3n_mlx.failures import BadValue, one_line
from g3n_mlx.history.store import History

NAME = "g3n-chat"
LEFT_OUT = ("--activations", "--dtype", "--revision")  # of the model's flags; `g3n serve` has them


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags, loads the model, chats; returns the exit code."""
    parser = command_line(prog)
    arguments = parser.parse_args(argv)
    check_choice(parser, arguments)
    if arguments.prompt is not None and arguments.asked:
        parser.error("give the prompt once: with -p or as an argument")
    if arguments.asked:
        arguments.prompt = " ".join(arguments.asked)  # quotes are easily forgotten
    if arguments.schema is not None and arguments.prompt is None:
        parser.error("--schema is for one answer: give a prompt, or - to read it from stdin")
    log_to_stderr(logging.INFO if arguments.verbose else logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model's words must not fail on a terminal's letters; in a pipe they are UTF-8 everywhere.
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    return run_command(prog, lambda: _run(arguments))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Chat with Gemma 3n, or ask it once.")
    model = parser.add_argument_group("model")
    for flag in MODEL_FLAGS:
        if flag not in LEFT_OUT:
            add_model_flag(model.add_argument, flag)
    parser.set_defaults(activations="exact", dtype=None, revision=None)
    add_fits_flag(parser.add_argument)
    answer = parser.add_argument_group("answer")
    parser.add_argument(
        "asked",
        nargs="*",
        metavar="PROMPT",
        help="ask once, print the answer and exit; what is piped in stands before it",
    )
    answer.add_argument("-p", "--prompt", help="the same; - takes what is piped in alone")
    answer.add_argument("--schema", type=Path, metavar="FILE", help="JSON schema that the one answer follows")
    for kind in (*attachments.SUFFIXES, attachments.FILE):
        what = "text or PDF file" if kind == attachments.FILE else f"{kind} file"
        answer.add_argument(
            f"--{kind}",
            metavar="FILE",
            dest="attached",
            action="append",
            default=[],
            type=lambda source, kind=kind: attachments.part(kind, source),
            help=f"{what} or URL that the first question is about; repeatable",
        )
    answer.add_argument("--system-prompt", metavar="TEXT", help="what the model is told before the conversation")
    answer.add_argument("--max-tokens", type=int, metavar="N", help="of one answer; default: to the context limit")
    answer.add_argument("--temperature", "--temp", type=float, metavar="X", help="0 always takes the most likely token")
    answer.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument(
        "-c", "--continue", dest="goes_on", action="store_true", help="go on with the last conversation"
    )
    parser.add_argument(
        "--no-history",
        action="store_true",
        default=kept.is_off(),
        help="do not keep this conversation; G3N_HISTORY=off in the environment keeps none",
    )
    parser.add_argument("--plain", action="store_true", help="show answers as they are, not as Markdown")
    parser.add_argument("--verbose", action="store_true", help="log lines, and figures after every answer")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    # Whatever is wrong with the flags or stdin is said before the model takes its time to load.
    from g3n_mlx.sampling import SamplingParams

    settings = {name: value for name in SETTINGS if (value := getattr(arguments, name, None)) is not None}
    SamplingParams(**settings)
    schema = None if arguments.schema is None else _schema(arguments.schema)
    prompt = _one_shot_prompt(arguments.prompt)
    record = None if arguments.no_history else kept.new_record()
    conversation = History().last() if arguments.goes_on else None
    models = Models(arguments)
    model = models.load()
    session = Session(
        model,
        arguments.system_prompt,
        settings,
        verbose=arguments.verbose,
        styled=not arguments.plain and takes_styles(),
        slice_table=arguments.matformer_config,
        models=models,
        record=record,
    )
    if prompt is None:
        model.warm_up()  # while the user reads and types
        say(f"{model.name} on {model.backend} ({model.device}); /help lists the commands, Ctrl-D ends")
    if conversation is not None:
        kept.take_up(session, conversation, quiet=prompt is not None)
        session.system = conversation.system if arguments.system_prompt is None else arguments.system_prompt
    for part in arguments.attached:
        session.attach(part, quiet=prompt is not None)
    if prompt is not None:
        return INTERRUPTED if session.ask(prompt, schema).stopped else 0
    if sys.stdin.isatty() and sys.stdout.isatty():
        session.run(typed_messages(keep=record is not None))
        return 0
    session.run(message_lines())
    return 1 if session.failures else 0


def _one_shot_prompt(prompt: str | None) -> str | None:
    """What is asked once: what was piped in, an empty line, then the prompt; a dash is the piped text alone.

    None without a prompt. Raises ValueError when there is no text in it, or what was piped in is none.
    """
    if prompt is None:
        return None
    if not prompt.strip():
        raise BadValue("the prompt is empty")
    piped = "" if sys.stdin.isatty() and prompt != "-" else _piped_text()
    if prompt != "-":
        return f"{piped.rstrip()}\n\n{prompt}" if piped.strip() else prompt
    if not piped.strip():
        raise BadValue("the prompt is empty: stdin had no text")
    return piped


def _piped_text() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadValue(
            f"stdin is not UTF-8 text: {error}; files of other kinds go with --image, --audio, --video or --file"
        ) from error


def _schema(path: Path) -> dict[str, Any]:
    try:
        schema = parse_json(path.read_text("utf-8"))
    except ValueError as error:
        raise BadValue(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(schema, dict):
        raise BadValue(f"{path} is no JSON schema: expected an object")
    return schema


if __name__ == "__main__":
    sys.exit(main())

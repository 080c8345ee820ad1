"""`python -m g3n_mlx.server`: a Gemma 3n behind OpenAI's API, for this machine alone unless told otherwise."""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from g3n_mlx.commands import (
    Terminated,
    add_choice_flags,
    add_draft_flag,
    add_model_flags,
    check_choice,
    command_parser,
    count,
    load_from,
    log_to_stderr,
    positive,
    positive_float,
    run_command,
)
from g3n_mlx.failures import MissingPackage
from g3n_mlx.installation import install_command
from g3n_mlx.server.access import (
    add_access_flags,
    add_media_flags,
    check_access,
    gate_policy,
    listener,
    media_policy,
    url_of,
)

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

NAME = "g3n-server"
DRAIN_S = 60  # at shutdown, for what is in progress
LOG_LEVELS = ("debug", "info", "warning", "error")

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags, loads the model, serves until interrupted; returns the exit code."""
    parser = command_line(prog)
    arguments = parser.parse_args(argv)
    check_choice(parser, arguments)
    log_to_stderr(arguments.log_level.upper(), "%(levelname)s %(name)s: %(message)s")
    check_access(parser, arguments)
    return run_command(prog, lambda: _serve(arguments))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Serves a Gemma 3n over OpenAI's API.")
    model = parser.add_argument_group("model")
    add_model_flags(model.add_argument)
    add_choice_flags(parser)
    model.add_argument(
        "--served-model-name",
        metavar="NAME",
        action="append",
        default=[],
        help="id in /v1/models; default: the folder's name; repeatable",
    )
    model.add_argument("--any-model", action="store_true", help="answer to every model id, whatever a program asks for")
    model.add_argument(
        "--slices",
        type=_names,
        default=["all"],
        metavar="NAMES",
        help="slices that requests may name as MODEL:SLICE, with commas between; all or none; default: all",
    )
    model.add_argument(
        "--lora",
        type=_named_adapter,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="LoRA adapter, folder or hub id, that requests get by the model id NAME; repeatable",
    )
    add_access_flags(parser.add_argument_group("access").add_argument, port=8080)
    add_media_flags(parser.add_argument_group("media in requests").add_argument)
    load = parser.add_argument_group("load")
    load.add_argument("--parallel", type=positive, metavar="N", help="answers in progress; default: what memory allows")
    add_draft_flag(load.add_argument, "auto")
    load.add_argument("--max-queue", type=count, default=64, metavar="N", help="requests behind them; default: 64")
    load.add_argument("--cache-memory", type=positive_float, default=4.0, metavar="GB", help="of caches; default: 4")
    load.add_argument("--request-timeout", type=positive_float, default=600.0, metavar="S", help="default: 600")
    load.add_argument("--max-body", type=positive, default=64, metavar="MB", help="of a request; default: 64")
    load.add_argument(
        "--shed", type=_names, default=[], metavar="SLICES", help="under load, answer with these instead of waiting"
    )
    load.add_argument(
        "--shed-after", type=positive_float, default=1.0, metavar="S", help="once requests wait so long; default: 1"
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info")
    return parser


def _named_adapter(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name.strip() or not path.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name.strip(), path


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return names


def _serve(arguments: argparse.Namespace) -> int:
    try:
        import uvicorn
    except ImportError:
        raise MissingPackage(f"the server needs more packages: {install_command('server')}") from None

    from g3n_mlx.server.app import create_app
    from g3n_mlx.server.capacity import default_parallel
    from g3n_mlx.server.engine import Engine, ServerLimits
    from g3n_mlx.server.metrics import Metrics
    from g3n_mlx.server.models import ModelTable
    from g3n_mlx.server.offer import largest_first, offered, with_adapters
    from g3n_mlx.server.scheduler import Scheduler
    from g3n_mlx.server.shedding import Shedding

    bound = listener(arguments)
    metrics = Metrics()
    model = _load(arguments)
    cache_bytes = int(arguments.cache_memory * 1e9)
    parallel = arguments.parallel or default_parallel(model, cache_bytes)
    limits = ServerLimits(
        parallel=parallel,
        max_queue=arguments.max_queue,
        request_timeout_s=arguments.request_timeout,
        policy=media_policy(arguments, arguments.max_body << 20),
    )
    slices = offered(model, arguments.slices, arguments.shed, arguments.matformer_config)
    shedding = None
    if arguments.shed:
        shedding = Shedding(largest_first(model, slices, arguments.shed), arguments.shed_after)
    name, loaded = [*arguments.served_model_name, model.name][0], _short_name(model, arguments.matformer_config)
    adapted = with_adapters(model, arguments.lora, ModelTable(name, loaded, list(slices)).ids)
    scheduler = Scheduler(
        model,
        parallel=parallel,
        cache_bytes=cache_bytes,
        metrics=metrics,
        draft=arguments.draft,
        slices=slices,
        shedding=shedding,
        adapted=adapted,
    )
    engine = Engine(model, scheduler, limits, metrics)
    table = ModelTable(
        name,
        loaded,
        list(slices),
        list(adapted),
        other_names=arguments.served_model_name[1:],
        any_name=arguments.any_model,
    )
    log.info("%s on %s (%s): %s", model.name, model.backend, model.device, ", ".join(table.ids))
    config = uvicorn.Config(
        create_app(engine, table, gate_policy(arguments, arguments.max_body << 20)),
        log_level=arguments.log_level,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
    url = url_of(bound)
    log.info("listening at %s", url)
    log.info("chat page: %s/", url)
    # uvicorn raises the signal that it has obeyed once more after its shutdown: to be told to stop is no failure.
    with suppress(KeyboardInterrupt, Terminated):
        uvicorn.Server(config).run(sockets=[bound])
    return 0


def _load(arguments: argparse.Namespace) -> "Gemma3n":
    return load_from(arguments, tell=lambda line: log.info("%s", line), slices_later=True)


def _short_name(model: "Gemma3n", table: Path | None) -> str | None:
    """The short name of the slice that was taken at load, as `--matformer` takes it."""
    from g3n_mlx.matformer.plan import find_slice
    from g3n_mlx.matformer.table import slices_for

    if model.slice_name is None:
        return None
    return find_slice(model.slice_name, slices_for(model.checkpoint.folder, table)).short_name


if __name__ == "__main__":
    sys.exit(main())

"""`python -m g3n_mlx.server`: a Gemma 3n behind OpenAI's API, for this machine alone unless told otherwise."""

import argparse
import ipaddress
import logging
import os
import re
import socket
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
from g3n_mlx.failures import FileProblem, MissingPackage
from g3n_mlx.installation import install_command

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

NAME = "g3n-server"
DRAIN_S = 60  # at shutdown, for what is in progress
LOG_LEVELS = ("debug", "info", "warning", "error")

_ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+/?")

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags, loads the model, serves until interrupted; returns the exit code."""
    parser = command_line(prog)
    arguments = parser.parse_args(argv)
    check_choice(parser, arguments)
    log_to_stderr(arguments.log_level.upper(), "%(levelname)s %(name)s: %(message)s")
    if arguments.media_root is not None and not arguments.media_root.is_dir():
        parser.error(f"--media-root {str(arguments.media_root)!r} is no folder")
    arguments.api_key = _api_key(parser, arguments)
    for origin in arguments.cors_origin:
        if not _ORIGIN.fullmatch(origin):
            parser.error(f"--cors-origin {origin!r} is no origin, expected SCHEME://HOST[:PORT], as https://a.b, or *")
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
    access = parser.add_argument_group("access")
    access.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine")
    access.add_argument("--port", type=_port, default=8080, help="0 takes a free one; default: 8080")
    access.add_argument("--api-key", metavar="KEY", help="what requests must bring; or set G3N_API_KEY")
    access.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="the key, where no list of processes shows it"
    )
    access.add_argument("--allow-host", metavar="NAME", action="append", default=[], help="a name of this server")
    access.add_argument(
        "--cors-origin", metavar="ORIGIN", action="append", default=[], help="web pages that may call, as https://a.b"
    )
    media = parser.add_argument_group("media in requests")
    media.add_argument("--media-root", type=Path, metavar="FOLDER", help="where local paths and file:// may point")
    media.add_argument(
        "--allow-media-host",
        metavar="HOST[:PORT]",
        action="append",
        default=[],
        help="a private host that media may come from",
    )
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


def _api_key(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str | None:
    """The key of --api-key, --api-key-file or G3N_API_KEY, in this order; None for none."""
    key, flag = arguments.api_key, "--api-key"
    if key is not None and arguments.api_key_file is not None:
        parser.error("give --api-key or --api-key-file, one of them")
    if arguments.api_key_file is not None:
        flag = "--api-key-file"
        try:
            key = arguments.api_key_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--api-key-file {str(arguments.api_key_file)!r} can't be read: {error}")
    if key is None:
        return os.environ.get("G3N_API_KEY") or None
    if not key.strip():
        parser.error(f"{flag} is empty, expected a key; leave the flag out to ask for none")
    return key


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 65535")
    return value


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

    from g3n_mlx.media.policy import MediaPolicy
    from g3n_mlx.server.app import create_app
    from g3n_mlx.server.capacity import default_parallel
    from g3n_mlx.server.engine import Engine, ServerLimits
    from g3n_mlx.server.gate import GatePolicy
    from g3n_mlx.server.metrics import Metrics
    from g3n_mlx.server.models import ModelTable
    from g3n_mlx.server.offer import largest_first, offered, with_adapters
    from g3n_mlx.server.scheduler import Scheduler
    from g3n_mlx.server.shedding import Shedding

    listener = _bound(arguments.host, arguments.port)
    if arguments.api_key is None and not _is_loopback(arguments.host):
        log.warning("listening at %s without --api-key: whoever reaches this machine can use it", arguments.host)
    metrics = Metrics()
    model = _load(arguments)
    cache_bytes = int(arguments.cache_memory * 1e9)
    parallel = arguments.parallel or default_parallel(model, cache_bytes)
    limits = ServerLimits(
        parallel=parallel,
        max_queue=arguments.max_queue,
        request_timeout_s=arguments.request_timeout,
        policy=MediaPolicy(
            paths=arguments.media_root,
            private_hosts=False,
            allowed_hosts=frozenset(host.lower() for host in arguments.allow_media_host),
            max_bytes=arguments.max_body << 20,
            max_pixels=64_000_000,
            max_seconds=1800.0,
            timeout_s=30.0,
            max_redirects=3,
        ),
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
    policy = GatePolicy(
        api_key=arguments.api_key,
        hosts=frozenset(name.lower() for name in [*arguments.allow_host, arguments.host, *_own_names(arguments.host)]),
        cors_origins=frozenset(origin.lower().rstrip("/") for origin in arguments.cors_origin),
        max_body_bytes=arguments.max_body << 20,
    )
    log.info("%s on %s (%s): %s", model.name, model.backend, model.device, ", ".join(table.ids))
    config = uvicorn.Config(
        create_app(engine, table, policy),
        log_level=arguments.log_level,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    log.info("listening at %s", url)
    log.info("chat page: %s/", url)
    # uvicorn raises the signal that it has obeyed once more after its shutdown: to be told to stop is no failure.
    with suppress(KeyboardInterrupt, Terminated):
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, before the model is read: a port that is taken should not cost that time.

    It does not listen yet, so clients are refused until the model can answer.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there it would let several servers take one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise FileProblem(
            f"can't listen at {host}:{port}: {error.strerror}; --host and --port name another place"
        ) from None
    return bound


def _load(arguments: argparse.Namespace) -> "Gemma3n":
    return load_from(arguments, tell=lambda line: log.info("%s", line), slices_later=True)


def _short_name(model: "Gemma3n", table: Path | None) -> str | None:
    """The short name of the slice that was taken at load, as `--matformer` takes it."""
    from g3n_mlx.matformer.plan import find_slice
    from g3n_mlx.matformer.table import slices_for

    if model.slice_name is None:
        return None
    return find_slice(model.slice_name, slices_for(model.checkpoint.folder, table)).short_name


def _own_names(host: str) -> list[str]:
    """The name that the local network knows this machine by, where the server listens to that network."""
    return [] if _is_loopback(host) else [f"{socket.gethostname().partition('.')[0]}.local"]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


if __name__ == "__main__":
    sys.exit(main())

"""`python -m g3n_mlx.mcp`: a Gemma 3n as tools of the Model Context Protocol, over stdin and stdout, or HTTP."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from g3n_mlx.commands import (
    Terminated,
    add_choice_flags,
    add_model_flags,
    check_choice,
    command_parser,
    load_from,
    log_to_stderr,
    run_command,
    say,
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
    import socket

    from mcp.server.mcpserver import MCPServer

NAME = "g3n mcp"
PATH = "/mcp"
MAX_BYTES = 64 << 20  # of a request, and of each file that a tool opens

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags, loads the model, offers the tools until the client is gone; returns the exit code."""
    parser = command_line(prog)
    arguments = parser.parse_args(argv)
    check_choice(parser, arguments)
    check_access(parser, arguments)
    log_to_stderr("INFO" if arguments.http else "WARNING", "%(levelname)s %(name)s: %(message)s")
    return run_command(prog, lambda: _serve(arguments))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Offers a Gemma 3n as tools to agents and editors, by the Model Context Protocol.")
    model = parser.add_argument_group("model")
    add_model_flags(model.add_argument)
    add_choice_flags(parser)
    parser.add_argument("--http", action="store_true", help="listen for HTTP instead of speaking over stdin and stdout")
    add_access_flags(parser.add_argument_group("access, with --http").add_argument, port=8081)
    add_media_flags(parser.add_argument_group("media").add_argument)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    if find_spec("mcp") is None:
        raise MissingPackage(f"g3n mcp needs the package mcp: {install_command('mcp')}")

    from g3n_mlx.mcp.tools import tool_server

    bound = listener(arguments) if arguments.http else None
    # Whoever started this process may read what it may; whoever calls over HTTP may read what --media-root says.
    policy = media_policy(arguments, MAX_BYTES, paths=None if arguments.http else "all")
    with load_from(arguments, tell=lambda line: log.info("%s", line)) as model:
        server = tool_server(model, policy)
        with suppress(KeyboardInterrupt, Terminated):
            if bound is None:
                if sys.stdin.isatty():
                    say("waiting for an MCP client on stdin, as an editor or an agent is; --http listens instead")
                # Nothing else interrupts the thread that waits for a line, and there is nothing to lose.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                server.run("stdio")
            else:
                _serve_http(server, bound, arguments)
    return 0


def _serve_http(server: "MCPServer[Any]", bound: "socket.socket", arguments: argparse.Namespace) -> None:
    import uvicorn
    from mcp.server.transport_security import TransportSecuritySettings

    from g3n_mlx.server.gate import Gate

    # The gate checks hosts and origins, as it does for the other server.
    unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    app = server.streamable_http_app(
        streamable_http_path=PATH, max_request_body_size=MAX_BYTES, transport_security=unchecked
    )
    gated = Gate(app, gate_policy(arguments, MAX_BYTES))
    log.info("tools at %s%s", url_of(bound), PATH)
    uvicorn.Server(uvicorn.Config(gated, log_config=None, log_level="info", server_header=False)).run(sockets=[bound])


if __name__ == "__main__":
    sys.exit(main())

"""`g3n batch`: answers every request of a file, or one question about many files; docs/batch.md.

What is done is in the file of results, so the same command goes on after whatever stopped it.
"""

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g3n_mlx.batch.results import TABLES
from g3n_mlx.commands import (
    AUTO,
    add_choice_flags,
    add_model_flags,
    check_choice,
    command_parser,
    load_from,
    log_to_stderr,
    model_of,
    positive,
    positive_float,
    run_command,
    say,
)
from g3n_mlx.failures import BadValue, FileInTheWay, MissingPackage, check_folder_of
from g3n_mlx.installation import install_command

if TYPE_CHECKING:
    from g3n_mlx.batch.journal import Journal
    from g3n_mlx.batch.question import Question
    from g3n_mlx.batch.requests import Entry, Source
    from g3n_mlx.batch.run import Progress

NAME = "g3n batch"
JOURNAL = ".jsonl"

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags and answers; returns the exit code, 0 also where requests failed."""
    parser = command_line(prog)
    arguments = parser.parse_args(argv)
    if (arguments.requests is None) == (not arguments.files):
        parser.error("give a file of requests, or --files")
    if bool(arguments.files) != (arguments.prompt is not None):
        parser.error("--files and --prompt go together")
    if arguments.requests is not None:
        for name in ("system_prompt", "schema", "max_tokens", "temperature", "seed"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is for --files: in a file of requests, each brings its own")
    if arguments.workers is not None and arguments.ray is None:
        parser.error("--workers is for --ray")
    check_choice(parser, arguments)
    if arguments.ray is not None and (arguments.fits != AUTO or arguments.speed is not None):
        parser.error("--fits and --speed are for this machine: with --ray give --matformer and --q-bits")
    if arguments.output.suffix not in (JOURNAL, *TABLES):
        parser.error(f"-o is {arguments.output}, expected a name that ends in {', '.join((JOURNAL, *TABLES))}")
    log_to_stderr(logging.WARNING)
    return run_command(prog, lambda: _batch(arguments), stopped="stopped; the same command goes on from here")


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Answers every request of a file, or one question about many files.")
    add = parser.add_argument
    add("requests", nargs="?", type=Path, metavar="FILE", help="requests in OpenAI's batch format, JSON lines")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="results: .jsonl; .csv and .parquet beside it")
    add("--ray", metavar="ADDRESS", help="run on a Ray cluster: its address, auto, or local for one of this machine")
    add("--workers", type=positive, metavar="N", help="models on the cluster; default: one per GPU, else per node")
    add("--retry-errors", action="store_true", help="run those again that failed")
    files = parser.add_argument_group("one question about many files")
    files.add_argument("--files", nargs="+", metavar="FILE", help="images, audio or videos; also globs, with **")
    files.add_argument("-p", "--prompt", metavar="TEXT", help="what is asked about each")
    files.add_argument("--system-prompt", metavar="TEXT", help="instructions before each")
    files.add_argument("--schema", type=Path, metavar="FILE", help="JSON schema that each answer follows")
    files.add_argument("--max-tokens", type=positive, metavar="N", help="of each answer")
    files.add_argument("--temperature", "--temp", type=float, metavar="T", help="0 takes the most likely tokens")
    files.add_argument("--seed", type=int, metavar="N", help="of each answer")
    add_model_flags(parser.add_argument_group("model").add_argument)
    add_choice_flags(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--parallel", type=positive, metavar="N", help="answers in progress; default: what memory allows")
    load.add_argument("--cache-memory", type=positive_float, default=4.0, metavar="GB", help="of caches; default: 4")
    return parser


def _batch(arguments: argparse.Namespace) -> int:
    from g3n_mlx.batch.journal import Journal
    from g3n_mlx.batch.results import check_table, write_table
    from g3n_mlx.batch.run import Progress, pending

    output: Path = arguments.output
    question = _question(arguments)
    check_folder_of(output)
    check_table(output)
    source = _source(arguments, question)
    journal_path = output.with_suffix(JOURNAL)
    _check_not_input(arguments, journal_path)
    with Journal(journal_path, retry_errors=arguments.retry_errors) as journal:
        entries = pending(source, journal)
        if journal.done:
            say(f"going on from {len(journal.done)} results in {journal.path}, {journal.failed} of them errors")
        if entries:
            with Progress(len(entries), shown=arguments.ray is None) as progress:
                (_run if arguments.ray is None else _run_on_cluster)(arguments, source, entries, journal, progress)
            say(progress.summary())
        if output.suffix in TABLES:
            write_table(journal.lines(), output, None if question is None else question.schema)
        failed = f"; {journal.failed} failed: --retry-errors runs them again" if journal.failed else ""
        say(f"{len(journal.done)} results in {output}{failed}")
    return 0


def _run(
    arguments: argparse.Namespace, source: "Source", entries: "list[Entry]", journal: "Journal", progress: "Progress"
) -> None:
    try:
        from g3n_mlx.batch.service import Service
    except ImportError:
        raise MissingPackage(f"batches need more packages: {install_command('server')}") from None
    from g3n_mlx.batch.run import run

    async def answered() -> None:
        cache_bytes = int(arguments.cache_memory * 1e9)
        async with Service(model, parallel=arguments.parallel, cache_bytes=cache_bytes) as service:
            await run(service, source, entries, journal, progress)

    with load_from(arguments) as model:
        asyncio.run(answered())


def _run_on_cluster(
    arguments: argparse.Namespace, source: "Source", entries: "list[Entry]", journal: "Journal", progress: "Progress"
) -> None:
    from g3n_mlx.batch.cluster import results
    from g3n_mlx.batch.results import refused, result_line, tokens_of
    from g3n_mlx.matformer.adapted import parsed_adapters

    names = ("backend", "matformer", "matformer_config", "q_bits", "dtype", "device", "revision", "chat_template")
    loading = {name: getattr(arguments, name) for name in (*names, "activations")}
    loading["adapter"] = parsed_adapters(arguments.adapter)
    model = model_of(arguments)
    if Path(model).exists():  # an actor has another working directory
        model = str(Path(model).resolve())
    options = {"model": model, "load_options": loading, "parallel": arguments.parallel}
    options["cache_bytes"] = int(arguments.cache_memory * 1e9)
    requests = [source.request(entry) for entry in entries]
    for request in requests:
        if request.problem is not None:
            journal.append(result_line(request.custom_id, refused(request.problem)))
            progress.add(0, failed=True)
    sent = [request for request in requests if request.problem is None]
    for line in results(arguments.ray, arguments.workers, sent, options) if sent else ():
        journal.append(line)
        progress.add(tokens_of(line), failed=line["error"] is not None)


def _source(arguments: argparse.Namespace, question: "Question | None") -> "Source":
    from g3n_mlx.batch.question import FilesOfQuestion
    from g3n_mlx.batch.requests import RequestFile

    if question is None:
        return RequestFile(arguments.requests)
    files = FilesOfQuestion(question, arguments.files)
    if files.skipped:
        say(f"left out {files.skipped} files that are no image, audio or video by their names")
    return files


def _question(arguments: argparse.Namespace) -> "Question | None":
    from g3n_mlx.batch.question import Question

    if arguments.prompt is None:
        return None
    schema = None if arguments.schema is None else _schema(arguments.schema)
    return Question(
        arguments.prompt,
        arguments.system_prompt,
        schema,
        arguments.max_tokens,
        arguments.temperature,
        arguments.seed,
    )


def _schema(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BadValue(f"{path} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise BadValue(f"{path} is no JSON schema: expected an object")
    return schema


def _check_not_input(arguments: argparse.Namespace, journal: Path) -> None:
    if arguments.requests is not None and journal.exists() and journal.samefile(arguments.requests):
        raise FileInTheWay(f"results would go into {journal}, which holds the requests: choose another -o")


if __name__ == "__main__":
    sys.exit(main())

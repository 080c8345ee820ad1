"""`python -m g3n_mlx.transcribe FILE...`: the words of audio files, of any length, into files beside them."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from g3n_mlx.commands import (
    add_choice_flags,
    add_model_flags,
    check_choice,
    command_parser,
    load_from,
    log_to_stderr,
    run_command,
    say,
    tell,
)
from g3n_mlx.failures import BadValue, MissingFile, is_expected, one_line

if TYPE_CHECKING:
    from g3n_mlx.model import Gemma3n

NAME = "g3n transcribe"
STDOUT = Path("-")


def main(argv: Sequence[str] | None = None, prog: str = NAME) -> int:
    """Parses the flags, loads the model, transcribes; returns the exit code, 1 when a file failed."""
    parser = command_line(prog)
    arguments = parser.parse_args(argv)
    check_choice(parser, arguments)
    if bool(arguments.files) == arguments.mic:
        parser.error("give audio files, or --mic")
    log_to_stderr("WARNING")
    return run_command(prog, lambda: _run(arguments))


def command_line(prog: str = NAME) -> argparse.ArgumentParser:
    """The flags, of a command that was called as prog."""
    parser = command_parser(prog, "Writes down what is said in audio files of any length and format.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="audio or video file, or URL")
    parser.add_argument("--mic", action="store_true", help="listen to the microphone instead, until Enter")
    parser.add_argument("-f", "--format", choices=["txt", "srt", "vtt", "json"], default="txt", help="default: txt")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="where to write, - for stdout; default: beside the input"
    )
    parser.add_argument("--language", metavar="NAME", help="what is spoken, as German or de; default: the model hears")
    parser.add_argument("--translate", action="store_true", help="write it in English")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="a hint at the words, such as names")
    add_model_flags(parser.add_argument_group("model").add_argument)
    add_choice_flags(parser)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    folder = arguments.output
    if folder is not None and folder != STDOUT and not folder.is_dir():
        raise MissingFile(f"-o {folder} is not a folder")
    paths = {source: _transcript_path(source, arguments) for source in arguments.files}
    if folder != STDOUT and len(set(paths.values())) < len(arguments.files):
        raise BadValue("two of the files would get the same transcript: give each run a folder of its own with -o")
    failures = 0
    with load_from(arguments) as model:
        if arguments.mic:
            return _listen(model, arguments)
        for source, path in paths.items():
            try:
                _transcribe(model, source, path, arguments)
            except BrokenPipeError:
                raise
            except Exception as error:
                if not is_expected(error):
                    raise
                failures += 1
                say(f"{source}: {one_line(error)}")
    return 1 if failures else 0


def _transcript_path(source: str, arguments: argparse.Namespace) -> Path:
    """Where the transcript of a file or URL goes: beside the file, in the folder of -o, or here."""
    is_url = urlsplit(source).scheme in ("http", "https", "file", "data")
    name = PurePosixPath(urlsplit(source).path).stem if is_url else Path(source).stem
    return (arguments.output or (Path() if is_url else Path(source).parent)) / f"{name or 'audio'}.{arguments.format}"


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("language", "prompt", "translate")}


def _listen(model: "Gemma3n", arguments: argparse.Namespace) -> int:
    from g3n_mlx.chat.attachments import recording
    from g3n_mlx.engine.transcript import FORMATS

    def until_enter() -> None:
        say("recording; Enter ends it")
        sys.stdin.readline()

    heard = model.transcribe(recording(until_enter)["audio"], **_options(arguments))
    tell(FORMATS[arguments.format](heard.segments), end="")
    return 0


def _transcribe(model: "Gemma3n", source: str, path: Path, arguments: argparse.Namespace) -> None:
    """One file, whose progress is kept beside the transcript until that is complete."""
    from g3n_mlx.engine.transcript import FORMATS
    from g3n_mlx.transcribe.progress import Progress

    if arguments.output == STDOUT:
        heard = model.transcribe(source, **_options(arguments))
        tell(FORMATS[arguments.format](heard.segments), end="")
        return
    # Whatever changes the words: of a run with other settings nothing is taken over.
    asked = {**_options(arguments), "model": model.name, "slice": model.slice_name, "source": source}
    asked |= {
        "adapters": arguments.adapter,
        "weights": str(model.checkpoint.folder),  # they differ by bits, which memory may have chosen
        "dtype": arguments.dtype,
        "backend": model.backend,
    }
    asked |= {"activations": arguments.activations, "revision": arguments.revision}
    if Path(source).is_file():
        asked |= {"bytes": Path(source).stat().st_size, "modified": Path(source).stat().st_mtime_ns}
    progress = Progress(path.with_name(f"{path.name}.part"), asked)
    segments = progress.begin()
    if segments:
        say(f"{source}: going on at {segments[-1].end_s:.0f} s")
    try:
        for segment in model.transcribe_stream(source, **_options(arguments), skip=len(segments)):
            segments.append(segment)
            progress.add(segment)
            _show(f"{source}: {segment.end_s:.0f} s")
    except ValueError:
        if not segments:  # nothing to go on from
            progress.end()
        raise
    finally:
        _show("")
    path.write_text(FORMATS[arguments.format](segments), "utf-8")
    progress.end()
    say(f"wrote {path}")


def _show(line: str) -> None:
    """How far it is, in one line of a terminal."""
    if sys.stderr.isatty():
        with suppress(OSError):
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())

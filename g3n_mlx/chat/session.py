"""A chat: its messages, its settings and its commands.

Answers go to stdout, everything else to stderr. In the terminal Ctrl-C stops the answer and keeps what was said;
while the prompt is still being read it gives up the question. A session whose stdin is no terminal reads one message
a line, so that a script can drive it.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g3n_mlx.chat import attachments
from g3n_mlx.chat.slices import Sizes
from g3n_mlx.chat.terminal import Interruption, reading, say_dimly
from g3n_mlx.commands import say, tell
from g3n_mlx.config.fields import parse_json
from g3n_mlx.failures import BadValue, FileProblem, check_folder_of, is_expected, one_line, size_in_words

if TYPE_CHECKING:
    from g3n_mlx.chat.markdown import MarkdownStream
    from g3n_mlx.engine.results import Usage
    from g3n_mlx.model import Gemma3n
    from g3n_mlx.prompt.prompt import Prompt

SETTINGS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "max_tokens": int,
    "seed": int,
    "prefill_step_size": int,
}


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one question."""

    text: str
    stopped: bool  # by Ctrl-C
    finish_reason: str | None  # None when stopped
    usage: "Usage | None"  # None when stopped


class Session:
    """One conversation with one model: its messages, its settings and the commands that change them."""

    def __init__(
        self,
        model: "Gemma3n",
        system: str | None,
        settings: dict[str, Any],
        *,
        verbose: bool = False,
        styled: bool = False,
        slice_table: Path | None = None,
    ) -> None:
        """settings: sampling keywords that differ from the model's defaults. styled: draw Markdown, and dim notes."""
        self.sizes = Sizes(model, slice_table)
        self.system, self.settings, self.verbose = system, dict(settings), verbose
        self._draft, self._styled = "auto", styled
        self.messages: list[dict[str, Any]] = []  # user and assistant in turn, without the system message
        self.failures = 0
        self._usage: Usage | None = None
        self._unanswered: str | list[Any] | None = None
        self._attached: list[dict[str, Any]] = []  # to the next question
        self._opened = attachments.OpenedMedia()
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "list the commands", self._help),
            "image": (
                "FILE [QUESTION]",
                "ask about an image, now or with the next line",
                partial(self._file, "image"),
            ),
            "audio": ("FILE [QUESTION]", "ask about an audio file", partial(self._file, "audio")),
            "video": ("FILE [QUESTION]", "ask about a video", partial(self._file, "video")),
            "paste": ("", "ask about the image in the clipboard", self._paste),
            "mic": ("", "ask about what you say now", self._mic),
            "system": ("[TEXT|-]", "show the system prompt, set it, or take it away with -", self._system),
            "clear": ("", "forget the conversation, keep the system prompt", self._clear),
            "undo": ("", "forget the last question and its answer", self._undo),
            "retry": ("", "ask the last question again", self._retry),
            "slice": ("[NAME]", "answer with a slice of the model from now on; alone, list them", self._slice),
            "save": ("FILE", "write the conversation as JSON", self._save),
            "load": ("FILE", "go on with a saved conversation", self._load),
            "stats": ("", "show the figures of the last answer", self._stats),
            "set": ("[NAME VALUE]", "show or change a setting, as in /set temperature 0.7", self._set),
            "exit": ("", "end (Ctrl-D too)", self._help),  # the loop sees it first
        }

    @property
    def model(self) -> "Gemma3n":
        """What answers: the model, or a slice of it."""
        return self.sizes.model

    def run(self, messages: Iterator[str]) -> None:
        """Answers messages and obeys commands until there are no more; a failure is said and does not end it."""
        for message in messages:
            # "/usr/bin is what?" is a question: a command's name is one word of letters.
            name, _, rest = message.strip().partition(" ")
            name = "/exit" if name == "/quit" else name
            if name == "/exit" and not rest.strip():
                return
            try:
                if name[:1] == "/" and name[1:].isalpha():
                    self._obey(name[1:], rest.strip())
                elif message.strip():
                    self.ask(message)
            except BrokenPipeError:
                raise
            except KeyboardInterrupt:
                self._note("[stopped]")
            except Exception as error:
                if not is_expected(error):
                    raise
                self.failures += 1
                say(f"error: {one_line(error)}")

    def ask(self, text: str, schema: dict[str, Any] | None = None) -> Reply:
        """Asks about what was attached and what the text names, which is said; see `_ask`.

        schema: a JSON schema that the answer follows.
        """
        content = attachments.content(text, self._attached)
        for line in attachments.notes(content, self._attached):
            self._note(line)
        return self._ask(content, schema)

    def attach(self, part: dict[str, Any], *, quiet: bool = False) -> None:
        """Takes a media part into the next question, once it is seen to be usable; shows what it is unless quiet."""
        messages = [{"role": "user", "content": [part]}]
        with attachments.errors_by_name(messages):
            prompt = self.model.prepare(self._opened.in_messages(messages))
        self._attached.append(part)
        if not quiet:
            self._present(part, prompt)

    def _present(self, part: dict[str, Any], prompt: "Prompt") -> None:
        from g3n_mlx.media.image import Image
        from g3n_mlx.media.policy import MediaPolicy

        kinds = [span.features.kind for span in prompt.media]
        found, size = self._opened.object_of(part), ""
        if isinstance(found, Image):
            pixels = found.rgb(MediaPolicy())
            size = f", {pixels.shape[1]} x {pixels.shape[0]}"
            attachments.show(pixels)
        elif part["type"] == "video":
            counts = {"frame": kinds.count("image"), "audio clip": kinds.count("audio")}
            size = "".join(f", {count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
        tokens = sum(span.length for span in prompt.media)
        self._note(f"{attachments.name_of(part)}{size}: {tokens} tokens, with the next question")

    def _ask(self, content: str | list[Any], schema: dict[str, Any] | None = None) -> Reply:
        """Streams the answer to stdout and keeps it in the conversation, a stopped one as far as it came."""
        self._unanswered = content
        messages = [*self.messages, {"role": "user", "content": content}]
        answer = self._stream([*self._system_message(), *messages], schema)
        self._detach(content)
        if answer.text or not answer.stopped:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
            self._unanswered = None
        self._usage = answer.usage
        if answer.usage is not None:
            self.sizes.note(answer.usage)
        if answer.stopped:
            self._note("[stopped]" if answer.text else "[stopped before the answer began; /retry asks again]")
        elif answer.finish_reason == "length":
            self._note("[cut off: the limit of tokens was reached]")
        if self.verbose:
            self._stats("")
        return answer

    def _detach(self, content: str | list[Any]) -> None:
        """Of what was attached, what a question holds is not for the next one."""
        self._attached = [part for part in self._attached if isinstance(content, str) or part not in content]

    def _stream(self, messages: list[dict[str, Any]], schema: dict[str, Any] | None) -> Reply:
        parts: list[str] = []
        finish_reason, usage, stopped = None, None, False
        with attachments.errors_by_name(messages), Interruption() as interruption:
            options: dict[str, Any] = {"draft": self.sizes.draft(self._draft), **self.settings}
            if schema is not None:
                options["schema"] = schema
            if sys.stderr.isatty():
                options["progress"] = reading
            drawn = self._markdown() if schema is None else None
            chunks = self.model.stream(self._opened.in_messages(messages), **options)
            try:
                for chunk in chunks:
                    interruption.answering = True
                    parts.append(chunk.text)
                    if drawn is None:
                        tell(chunk.text, end="")
                        sys.stdout.flush()
                    else:
                        drawn.write(chunk.text)
                    finish_reason, usage = chunk.finish_reason, chunk.usage
                    if interruption.noted:
                        stopped = True
                        break
            except KeyboardInterrupt:
                stopped = True
            finally:
                chunks.close()
            text = "".join(parts)
            if drawn is not None:
                drawn.end()
            elif not text.endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()
        return Reply(text, stopped, None if stopped else finish_reason, None if stopped else usage)

    def _markdown(self) -> "MarkdownStream | None":
        """What draws an answer; None where it is written as it comes."""
        if not self._styled:
            return None
        from g3n_mlx.chat.markdown import MarkdownStream

        return MarkdownStream()

    def _note(self, line: str) -> None:
        """Says what is neither an answer nor an error."""
        if self._styled:
            say_dimly(line)
        else:
            say(line)

    def _system_message(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _obey(self, name: str, argument: str) -> None:
        if name not in self._commands:
            raise BadValue(f"there is no command /{name}; /help lists them")
        takes, _, do = self._commands[name]
        if argument and not takes:
            raise BadValue(f"/{name} takes no argument, and got {argument!r:.40}")
        do(argument)

    def _help(self, _: str) -> None:
        for name, (argument, text, _do) in self._commands.items():
            self._note(f"  {f'/{name} {argument}':<24} {text}")
        self._note("  An image, audio or video file may also be dropped at the beginning or end of a message.")
        self._note("  A new line in a message: Alt-Enter, or Enter after a backslash. Ctrl-C stops an answer.")

    def _file(self, kind: str, argument: str) -> None:
        if not argument:
            raise BadValue(f"/{kind} needs a file name or URL")
        name, question = attachments.name_and_rest(argument)
        self.attach(attachments.part(kind, name), quiet=bool(question))
        if question:
            self.ask(question)

    def _paste(self, _: str) -> None:
        self.attach(attachments.clipboard_image())

    def _mic(self, _: str) -> None:
        def until_enter() -> None:
            self._note("recording; Enter ends it, Ctrl-C gives it up")
            sys.stdin.readline()

        self.attach(attachments.recording(until_enter))

    def _system(self, text: str) -> None:
        if text:
            self.system = None if text == "-" else text
        self._note(f"system prompt: {self.system or 'none'}")

    def _clear(self, _: str) -> None:
        pending = ", ".join(map(attachments.name_of, self._attached))
        self.messages, self._unanswered, self._attached, self._opened = [], None, [], attachments.OpenedMedia()
        self._note(f"the conversation is empty{f'; not asked about and forgotten too: {pending}' if pending else ''}")

    def _undo(self, _: str) -> None:
        if self._attached and self._unanswered is None:
            self._note(f"forgotten: {', '.join(map(attachments.name_of, self._attached))}")
            self._attached = []
            return
        if self._unanswered is None:
            self._last_question()
            self.messages = self.messages[:-2]
        else:
            self._detach(self._unanswered)
        self._unanswered = None
        left = len(self.messages) // 2
        self._note(f"forgotten; {left} question{' is' if left == 1 else 's are'} left")

    def _retry(self, _: str) -> None:
        if self._unanswered is not None:
            self._ask(self._unanswered)
            return
        question = self._last_question()
        self.messages = self.messages[:-2]
        self._ask(question)

    def _last_question(self) -> Any:
        if not self.messages:
            raise BadValue("there is no question yet")
        return self.messages[-2]["content"]

    def _slice(self, name: str) -> None:
        if not name:
            for line in self.sizes.lines():
                self._note(line)
            return
        self.sizes.choose(name)
        again = "; it reads the conversation again at the next question" if self.messages else ""
        self._note(f"{self.sizes.name} answers from now on{again}")

    def _save(self, name: str) -> None:
        path = _path(name, "save")
        if path.exists() and _conversation(path) is None:
            raise BadValue(f"{path} exists and is no saved conversation; choose another name")
        check_folder_of(path)
        document = {"model": self.model.name, "messages": [*self._system_message(), *self.messages]}
        # Written beside it first: a full disk must not cost the conversation saved before.
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:  # hides the temporary file's name
            raise FileProblem(f"{path} can't be written: {error.strerror or error}") from None
        finally:
            partial.unlink(missing_ok=True)
        self._note(f"saved {len(self.messages)} messages to {path}")

    def _load(self, name: str) -> None:
        path = _path(name, "load")
        messages = _conversation(path)
        if not messages:
            raise BadValue(f"{path} is no saved conversation; expected JSON with a list of messages")
        self.model.prepare(self._opened.in_messages(messages))  # raises if it can't be rendered
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = messages[1:] if system is not None else messages
        if len(turns) % 2:
            raise BadValue(f"{path} ends with a question; expected an answer last")
        self.system, self.messages, self._unanswered = system, turns, None
        self._note(f"loaded {len(turns)} messages from {path}")

    def _stats(self, _: str) -> None:
        usage = self._usage
        if usage is None:
            self._note("no figures: there was no whole answer yet, or the last one was stopped")
            return
        self._note(
            f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} of them cached), "
            f"{usage.completion_tokens} in the answer; first token after {usage.time_to_first_token_s:.2f} s, "
            f"prefill {usage.avg_prompt_tok_per_sec:.1f} tok/s, decode {usage.avg_compl_tok_per_sec:.1f} tok/s, "
            f"{usage.accepted_tokens} of {usage.drafted_tokens} drafted tokens accepted, "
            f"peak memory {size_in_words(usage.peak_memory_bytes)}"
        )

    def _set(self, argument: str) -> None:
        from g3n_mlx.sampling import SamplingParams

        name, _, value = argument.partition(" ")
        name = name.replace("-", "_")
        if name == "draft" and value:
            self._draft = self.sizes.checked_draft("auto" if value == "default" else value)
            self._note(f"draft {self._draft}")
            return
        if name and name not in SETTINGS and name != "draft":
            raise BadValue(f"there is no setting {name!r}; there are {', '.join(SETTINGS)} and draft")
        if name and not value:
            raise BadValue(f"/set {name} needs a value, a number or 'default'")
        if value == "default":
            self.settings.pop(name, None)
        elif name:
            try:
                number = SETTINGS[name](value)
            except ValueError:
                kind = "a whole number" if SETTINGS[name] is int else "a number"
                raise BadValue(f"/set {name} needs {kind} or 'default', not {value!r}") from None
            changed: dict[str, Any] = {**self.settings, name: number}
            SamplingParams(**changed)
            self.settings = changed
        self._note(
            ", ".join(f"{key} {setting}" for key, setting in self.settings.items()) or "all settings: the model's own"
        )


def _path(name: str, command: str) -> Path:
    if not name:
        raise BadValue(f"/{command} needs a file name")
    return Path(name).expanduser()


def _conversation(path: Path) -> list[dict[str, Any]] | None:
    """The messages of a saved conversation; None when the file is something else."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    messages = document.get("messages") if isinstance(document, dict) else None
    return messages if isinstance(messages, list) else None

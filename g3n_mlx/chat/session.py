"""A chat: its messages, its settings and its commands.

Answers go to stdout, everything else to stderr. In the terminal Ctrl-C stops the answer and keeps what was said;
while the prompt is still being read it gives up the question. A session whose stdin is no terminal reads one message
a line, so that a script can drive it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g3n_mlx.chat import attachments, commands, kept
from g3n_mlx.chat.models import Models
from g3n_mlx.chat.slices import Sizes
from g3n_mlx.chat.terminal import Interruption, quoted, say_wrapped
from g3n_mlx.chat.waiting import Waiting
from g3n_mlx.commands import say, tell
from g3n_mlx.failures import BadValue, is_expected, one_line

if TYPE_CHECKING:
    from g3n_mlx.chat.markdown import MarkdownStream
    from g3n_mlx.engine.results import Usage
    from g3n_mlx.history.record import Record
    from g3n_mlx.model import Gemma3n
    from g3n_mlx.prompt.prompt import Prompt


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
        models: Models | None = None,
        record: "Record | None" = None,
    ) -> None:
        """settings: sampling keywords that differ from the model's defaults. styled: draw Markdown, and dim notes.

        models: what loads another model; without it the one stays. record: what keeps the conversation; without it
        nothing is kept.
        """
        self._models = models
        self.sizes = Sizes(model, slice_table)
        self.system, self.settings, self.verbose = system, dict(settings), verbose
        self.draft, self._styled = "auto", styled
        self.messages: list[dict[str, Any]] = []  # user and assistant in turn, without the system message
        self.failures = 0
        self.usage: Usage | None = None
        self.unanswered: str | list[Any] | None = None
        self.attached: list[dict[str, Any]] = []  # to the next question
        self.opened = attachments.OpenedMedia()
        self.record = record
        self.unkept = False  # whether the last try to keep the conversation failed

    @property
    def model(self) -> "Gemma3n":
        """What answers: the model, or a slice of it."""
        return self.sizes.model

    def change_model(self, name: str) -> None:
        """Has another model go on with the conversation; what can't be loaded is an error and changes nothing."""
        if self._models is None:
            raise BadValue("this chat stays with its model")
        self.sizes = self._models.other(name, self.sizes)
        self.draft = "auto"
        self.usage = None
        self.model.warm_up()

    def run(self, messages: Iterator[str]) -> None:
        """Answers messages and obeys commands until there are no more; a failure is said and does not end it."""
        for message in messages:
            in_quotes = quoted(message)
            # "/usr/bin is what?" is a question: a command's name is one word of letters.
            name, _, rest = message.strip().partition(" ")
            name = "/exit" if name == "/quit" else name
            if name == "/exit" and not rest.strip():
                return
            try:
                if in_quotes is not None:
                    if in_quotes.strip():
                        self.ask(in_quotes)
                elif name[:1] == "/" and name[1:].isalpha():
                    commands.obey(self, name[1:], rest.strip())
                elif message.strip():
                    self.ask(message)
            except BrokenPipeError:
                raise
            except KeyboardInterrupt:
                self.note("[stopped]")
            except Exception as error:
                if not is_expected(error):
                    raise
                self.failures += 1
                self._say(f"error: {one_line(error)}", dim=False)

    def ask(self, text: str, schema: dict[str, Any] | None = None) -> Reply:
        """Asks about what was attached and what the text names, which is said; see `ask_content`.

        schema: a JSON schema that the answer follows.
        """
        content = attachments.content(text, self.attached)
        for line in attachments.notes(content, self.attached):
            self.note(line)
        return self.ask_content(content, schema)

    def attach(self, part: dict[str, Any], *, quiet: bool = False) -> None:
        """Takes a media part into the next question, once it is seen to be usable; shows what it is unless quiet."""
        messages = [{"role": "user", "content": [part]}]
        with attachments.errors_by_name(messages), Waiting(f"opening {attachments.name_of(part)}"):
            prompt = self.model.prepare(self.opened.in_messages(messages))
        self.attached.append(part)
        if not quiet:
            self._present(part, prompt)

    def _present(self, part: dict[str, Any], prompt: "Prompt") -> None:
        from g3n_mlx.media.image import Image
        from g3n_mlx.media.policy import MediaPolicy

        if part["type"] == attachments.FILE:
            self.note(f"{attachments.name_of(part)}: {len(prompt.token_ids):,} tokens, with the next question")
            return
        kinds = [span.features.kind for span in prompt.media]
        found, size = self.opened.object_of(part), ""
        if isinstance(found, Image):
            pixels = found.rgb(MediaPolicy())
            size = f", {pixels.shape[1]} x {pixels.shape[0]}"
            attachments.show(pixels)
        elif part["type"] == "video":
            counts = {"frame": kinds.count("image"), "audio clip": kinds.count("audio")}
            size = "".join(f", {count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
        tokens = sum(span.length for span in prompt.media)
        self.note(f"{attachments.name_of(part)}{size}: {tokens} tokens, with the next question")

    def ask_content(self, content: str | list[Any], schema: dict[str, Any] | None = None) -> Reply:
        """Streams the answer to stdout and keeps it in the conversation, a stopped one as far as it came."""
        self.unanswered = content
        messages = [*self.messages, {"role": "user", "content": content}]
        answer = self._stream([*self.system_message(), *messages], schema)
        self.detach(content)
        if answer.text or not answer.stopped:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
            self.unanswered = None
            kept.keep(self)
        self.usage = answer.usage
        if answer.usage is not None:
            self.sizes.note(answer.usage)
        if answer.stopped:
            self.note("[stopped]" if answer.text else "[stopped before the answer began; /retry asks again]")
        elif answer.finish_reason == "length":
            self.note("[cut off: the limit of tokens was reached]")
        if self.verbose:
            commands.stats(self, "")
        return answer

    def detach(self, content: str | list[Any]) -> None:
        """Of what was attached, what a question holds is not for the next one."""
        self.attached = [part for part in self.attached if isinstance(content, str) or part not in content]

    def _stream(self, messages: list[dict[str, Any]], schema: dict[str, Any] | None) -> Reply:
        parts: list[str] = []
        finish_reason, usage, stopped = None, None, False
        with attachments.errors_by_name(messages), Interruption() as interruption, Waiting("reading") as waiting:
            options: dict[str, Any] = {"draft": self.sizes.draft(self.draft), **self.settings}
            if schema is not None:
                options["schema"] = schema
            if waiting.shown:
                options["progress"] = waiting.read
            drawn = self._markdown() if schema is None else None
            chunks = self.model.stream(self.opened.in_messages(messages), **options)
            try:
                for chunk in chunks:
                    waiting.end()
                    interruption.answering = True
                    parts.append(chunk.text)
                    if drawn is None:
                        tell(chunk.text, end="")
                        sys.stdout.flush()
                    else:
                        if interruption.resumed:
                            drawn.begin_anew()
                            interruption.resumed = False
                        drawn.write(chunk.text)
                    finish_reason, usage = chunk.finish_reason, chunk.usage
                    if interruption.noted:
                        stopped = True
                        break
            except KeyboardInterrupt:
                stopped = True
            finally:
                waiting.end()
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

    def note(self, line: str) -> None:
        """Says what is neither an answer nor an error."""
        self._say(line, dim=True)

    def _say(self, line: str, *, dim: bool) -> None:
        if self._styled:
            say_wrapped(line, dim=dim)
        else:
            say(line)

    def system_message(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

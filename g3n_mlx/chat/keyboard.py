"""Messages typed into a terminal: a line editor with history over sessions, and completion."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from g3n_mlx.chat.terminal import is_unfinished
from g3n_mlx.commands import say
from g3n_mlx.failures import one_line

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyPressEvent


def typed_messages(keep: bool = True) -> Iterator[str]:
    """Messages typed into the terminal, until Ctrl-D. keep: for the arrow keys of later sessions."""
    session = _prompt_session(keep)
    while True:
        try:
            yield session.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            say("Ctrl-D or /exit ends")


def _prompt_session(keep: bool) -> "PromptSession[str]":
    """Line editing, history over sessions, and messages of several lines; pasted newlines are kept as they are."""
    import platformdirs
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    from g3n_mlx.chat.completer import ChatCompleter

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _alt_enter(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    path = platformdirs.user_state_path("g3n_mlx", appauthor=False) / "chat_history"
    history = InMemoryHistory()
    try:
        if keep:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # what one asks a model is private
            history = FileHistory(str(path))
    except OSError as error:
        say(f"no history is kept: {one_line(error)}")
    return PromptSession(
        history=history,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        completer=ChatCompleter(),
        complete_while_typing=False,
        complete_in_thread=True,  # a folder of a network may take its time
        enable_suspend=True,
    )

"""What a session is about, in lines: its model, context and settings."""

from typing import TYPE_CHECKING

from g3n_mlx.chat.settings import SETTINGS
from g3n_mlx.failures import size_in_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from g3n_mlx.chat.session import Session


def facts(session: "Session") -> "Iterator[str]":
    """Each fact in a line of its own."""
    from g3n_mlx.model import ACTIVATION_BYTES

    model, sizes = session.model, session.sizes
    bits = sorted({stored.bits for stored in model.checkpoint.quantizations.values()})
    memory = model.checkpoint.nbytes_in_memory(ACTIVATION_BYTES[model.dtype])
    yield _fact("model", " with ".join([model.name, *model.adapters]))
    yield _fact("slice", model.slice_name or sizes.name)
    yield _fact("bits", " and ".join(map(str, bits)) or "not quantized")
    yield _fact("runs on", f"{model.backend} on {model.device}, {model.dtype}, {size_in_words(memory)} of weights")
    whole = model.config.text.max_position_embeddings
    used = _used(session)
    yield _fact("context", f"{used:,} of {whole:,} tokens used, {max(0, whole - used):,} left")
    effective = model.sampling_params(**session.settings)
    names = [name for name in SETTINGS if getattr(effective, name) is not None]
    shown = [f"{name} {getattr(effective, name)}{'*' if name in session.settings else ''}" for name in names]
    yield _fact("settings", ", ".join([*shown, f"draft {session.draft}"]) + "; * by you")
    if session.system:
        yield _fact("system", session.system)


def _used(session: "Session") -> int:
    messages = [*session.system_message(), *session.messages]
    return session.model.count_tokens(session.opened.in_messages(messages)) if session.messages else 0


def _fact(name: str, value: str) -> str:
    return f"{name:<10}{value}"

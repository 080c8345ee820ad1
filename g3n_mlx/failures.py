"""Failures that a user, a file, a network or too little memory caused, and how they read: one line each."""

import re
from pathlib import Path

# What PyTorch and MLX say in a RuntimeError, on CPUs, CUDA and Metal.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|unable to allocate|attempting to allocate"
    r"|insufficient memory|bad_alloc",
    re.IGNORECASE,
)


def is_expected(error: BaseException) -> bool:
    """Whether a user, a file, a network or too little memory caused it; all else is a bug whose traceback is wanted."""
    return isinstance(error, OSError | ValueError | ImportError) or is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy, PyTorch or MLX could not have the memory it asked for."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def one_line(error: BaseException) -> str:
    """An error's message, folded to one line; its type's name when it has none."""
    if is_out_of_memory(error):
        words = " ".join(str(error).partition("\n")[0].split())
        return (
            f"out of memory{f' ({words:.160})' if words else ''}: a smaller slice (matformer), fewer bits (q_bits) or "
            "a shorter prompt needs less"
        )
    if isinstance(error, OSError) and error.strerror and str(error).startswith(("[Errno ", "[WinError ")):
        words = error.strerror[:1].lower() + error.strerror[1:]
        return words if error.filename is None else f"{error.filename}: {words}"
    return " ".join(str(error).split()) or type(error).__name__


def check_folder_of(path: Path) -> None:
    """Raises FileNotFoundError when a file to write has no folder to be written into."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path} can't be written: there is no folder {path.absolute().parent}")


def size_in_words(num_bytes: float) -> str:
    """A size as users read it: in GB, below a tenth of one in MB, below a tenth of that in KB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:.{2 if num_bytes < 10 * size else 1}f} {unit}"
    return f"{num_bytes / 1e3:.1f} KB"

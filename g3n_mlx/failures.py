"""Failures that a user, a file, a network or too little memory caused, and how they read: one line each.

Whatever the package raises on purpose is an `Error`, and the builtin error of its kind as well, so that callers may
catch either.
"""

import re
from pathlib import Path

# What PyTorch and MLX say in a RuntimeError, on CPUs, CUDA and Metal.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|unable to allocate|attempting to allocate"
    r"|insufficient memory|bad_alloc",
    re.IGNORECASE,
)

# What MLX says when macOS ends a command that has kept a GPU for seconds.
_GPU_TIMEOUT = re.compile(r"Impacting Interactivity|GPUCommandBufferCallbackError(Timeout|ImpactingInter|Hang)", re.I)


class Error(Exception):
    """The base of all errors that the package raises on purpose; the message says what to do."""


class BadValue(Error, ValueError):
    """An option, a message, a file's content or a config that can't be used."""


class FileProblem(Error, OSError):
    """A file, a disk or a port that can't be used, for a reason that is none of those below."""


class MissingFile(Error, FileNotFoundError):
    """A file or folder that is not there."""


class FileInTheWay(Error, FileExistsError):
    """A file or folder that would be overwritten."""


class NotAFolder(Error, NotADirectoryError):
    """A file where a folder is expected."""


class IsAFolder(Error, IsADirectoryError):
    """A folder where a file is expected."""


class NotPermitted(Error, PermissionError):
    """A file, a folder or a repository of the hub that the user may not read or write."""


class MissingPackage(Error, ImportError):
    """A package that is needed and not installed; the message has the command that installs it."""


class NoConnection(Error, ConnectionError):
    """A server that can't be reached or refuses."""


class TooLate(Error, TimeoutError):
    """A deadline that has passed."""


class WorkerFailed(Error, ChildProcessError):
    """A process of the bench that ended without a result."""


def is_expected(error: BaseException) -> bool:
    """Whether a user, a file, a network or too little memory caused it; all else is a bug whose traceback is wanted."""
    known = isinstance(error, OSError | ValueError | ImportError)
    return known or is_out_of_memory(error) or is_gpu_timeout(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy, PyTorch or MLX could not have the memory it asked for."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def is_gpu_timeout(error: BaseException) -> bool:
    """Whether the system has ended work on the GPU because it took too long."""
    return isinstance(error, RuntimeError) and _GPU_TIMEOUT.search(str(error)) is not None


def one_line(error: BaseException) -> str:
    """An error's message, folded to one line; its type's name when it has none."""
    if is_out_of_memory(error):
        words = " ".join(str(error).partition("\n")[0].split())
        return (
            f"out of memory{f' ({words:.160})' if words else ''}: a smaller slice (matformer), fewer bits (q_bits) or "
            "a shorter prompt needs less"
        )
    if is_gpu_timeout(error):
        words = " ".join(str(error).split())
        return (
            f"the system ended work on the GPU that took too long ({words:.160}): close other programs that use the "
            "GPU, or read prompts in smaller parts (prefill_step_size=128)"
        )
    if isinstance(error, OSError) and error.strerror and str(error).startswith(("[Errno ", "[WinError ")):
        words = error.strerror[:1].lower() + error.strerror[1:]
        return words if error.filename is None else f"{error.filename}: {words}"
    return " ".join(str(error).split()) or type(error).__name__


def check_folder_of(path: Path) -> None:
    """Raises FileNotFoundError when a file to write has no folder to be written into."""
    if not path.absolute().parent.is_dir():
        raise MissingFile(f"{path} can't be written: there is no folder {path.absolute().parent}")


def size_in_words(num_bytes: float) -> str:
    """A size as users read it: in GB, below a tenth of one in MB, below a tenth of that in KB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:.{2 if num_bytes < 10 * size else 1}f} {unit}"
    return f"{num_bytes / 1e3:.1f} KB"

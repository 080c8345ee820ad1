"""The text of a document: plain text as it is, a PDF's text through pypdf in a process of its own.

A PDF is a program in disguise, and anybody's: the process that reads it has a limit of time and memory, and what goes
wrong in it is one error here.
"""

import subprocess
import sys
from importlib.util import find_spec

from g3n_mlx.failures import BadValue, MissingPackage
from g3n_mlx.installation import install_command

MAX_PAGES = 200
MAX_SECONDS = 30
MAX_CHARACTERS = 4_000_000  # far more than the context holds, which has an error of its own


def document_text(data: bytes) -> str:
    """The text of a PDF or a UTF-8 text file. Raises ValueError when there is none, or it is too long."""
    if data[:1024].lstrip().startswith(b"%PDF-"):
        return _pdf_text(data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadValue("the file is neither UTF-8 text nor a PDF") from None
    if "\0" in text:
        raise BadValue("the file is neither UTF-8 text nor a PDF")
    return _checked(text)


def _checked(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise BadValue(f"the file's text has {len(text)} characters, expected at most {MAX_CHARACTERS}")
    if not text.strip():
        raise BadValue("the file has no text; a scanned page can be sent as an image")
    return text


def _pdf_text(data: bytes) -> str:
    if find_spec("pypdf") is None:
        raise MissingPackage(f"reading PDF files needs pypdf: {install_command('pdf')}")
    command = [sys.executable, "-m", "g3n_mlx.media.pdf_reader", str(MAX_PAGES), str(MAX_SECONDS)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=MAX_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BadValue(f"the PDF was not read within {MAX_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise BadValue(f"the PDF can't be read: {lines[-1] if lines else 'its reader ended'}")
    return _checked(done.stdout.decode("utf-8"))

"""A text in the user's editor."""

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from g3n_mlx.failures import BadValue


def edited(text: str) -> str:
    """The text as $VISUAL or $EDITOR leaves it, else vi or Notepad. Raises ValueError when there is no editor."""
    usual = "notepad" if os.name == "nt" else "vi"
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or usual
    program, *options = shlex.split(command, posix=os.name != "nt")
    if shutil.which(program) is None:
        raise BadValue(f"there is no editor {program!r}: set the environment variable EDITOR to one")
    with tempfile.TemporaryDirectory() as folder:  # which no one else may read
        path = Path(folder) / "message.md"
        path.write_text(text, encoding="utf-8")
        code = subprocess.run([program, *options, str(path)], check=False).returncode
        if code:
            raise BadValue(f"{program} ended with the code {code}: nothing was asked")
        return path.read_text(encoding="utf-8").strip()

"""How this copy of the package was installed: its version, and the command that adds an extra to it.

The standard library's metadata and URLs take 50 ms to import, so the functions do it.
"""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import Distribution

DISTRIBUTION = "g3n-mlx"


def version() -> str:
    """The version that is installed; "unknown" in a checkout that never was."""
    distribution = _installed()
    return "unknown" if distribution is None else distribution.version


def install_command(extra: str) -> str:
    """The shell command that installs the package's extra into this copy, as in `pip install -e '/src/g3n[server]'`.

    The installer's record says where the copy came from: a folder, an archive, a repository or an index.
    Source: PEP 610 (direct_url.json), PEP 627 (INSTALLER).
    """
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    distribution = _installed()
    if distribution is None:
        return _pip("install", "-e", f"{Path(__file__).parent.parent}[{extra}]")
    installer = (distribution.read_text("INSTALLER") or "").strip()
    tool = "uv pip" if installer == "uv" else "pip"  # environments made by uv hold no pip
    record = distribution.read_text("direct_url.json")
    origin: dict[str, Any] = json.loads(record) if record else {}
    url = str(origin.get("url", ""))
    if url.startswith("file:") and "vcs_info" not in origin:
        editable = ["-e"] if origin.get("dir_info", {}).get("editable") else []
        return _pip("install", *editable, f"{url2pathname(urlsplit(url).path)}[{extra}]", tool=tool)
    if "vcs_info" in origin:
        source = origin["vcs_info"]
        revision = source.get("requested_revision") or source["commit_id"]
        url = f"{source['vcs']}+{url}@{revision}"
    wanted = f"{DISTRIBUTION}[{extra}]"
    return _pip("install", f"{wanted} @ {url}" if url else wanted, tool=tool)


def _installed() -> "Distribution | None":
    """What an installer wrote of this package; None in a checkout that never was installed.

    A build leaves metadata in the checkout too, a g3n_mlx.egg-info, which comes first where Python runs there.
    """
    from importlib import metadata

    found = metadata.distributions(name=DISTRIBUTION)
    return next((one for one in found if one.read_text("INSTALLER") or one.read_text("direct_url.json")), None)


def _pip(*arguments: str, tool: str = "pip") -> str:
    return " ".join([tool, *map(_quoted, arguments)])


def _quoted(argument: str) -> str:
    """For the shell of the system; cmd.exe knows double quotes alone."""
    if os.name != "nt":
        return shlex.quote(argument)
    return f'"{argument}"' if set(argument) & set(" []@&") else argument

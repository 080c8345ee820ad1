"""Where models are: a folder, the Hugging Face hub, this machine's caches, or the package's own demo."""

import filecmp
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from g3n_mlx.checkpoint import registry
from g3n_mlx.checkpoint.files import RESIDUAL, UQFF, before_uqff_1, uqff_shards, weight_files
from g3n_mlx.checkpoint.shards import TensorInfo
from g3n_mlx.config.adapter import SETTINGS, adapter_files, adapter_message
from g3n_mlx.config.fields import read_json
from g3n_mlx.failures import BadValue, MissingFile, NoConnection, NotAFolder, NotPermitted

SUGGESTED_MODEL = "google/gemma-3n-E2B-it"
DEMO = "demo"
_DESCRIPTION_FILES = ["config.json", "matformer.csv"]
# Never pickles. The last four are for conversions, which hand them on.
_WANTED_FILES = [*_DESCRIPTION_FILES, "*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*"]
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(.+)", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def demo_folder() -> Path:
    """The folder of the embedded demo model."""
    return Path(__file__).parent.parent / "demo"


def resolve(path_or_id: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model, given as a folder, a hub id like google/gemma-3n-E2B-it, or a conversion's name.

    A model of mistral.rs may be given as a .uqff file, its own or a hub id's: owner/name/q4k-0.uqff. It is returned as
    a file if it was, and always if it is of a hub id, where no other of its models is downloaded.
    "demo" is the embedded demo model, unless there is a folder of that name. A conversion's name is that of its folder,
    wherever that lies.
    A hub id is downloaded (resumable, with a progress bar on stderr) unless it is in the hub cache already;
    HF_HUB_OFFLINE, HF_HOME and the like are respected. revision: a branch, tag or commit; of a hub id only.
    weights: False downloads the config and the table of slices alone.
    Raises FileNotFoundError, PermissionError (gated), ConnectionError or ValueError.
    """
    if not isinstance(path_or_id, str | Path) or not str(path_or_id).strip():
        raise BadValue(f"the model is {path_or_id!r}, expected a folder or a hub id as in {SUGGESTED_MODEL}")
    folder, file = Path(path_or_id).expanduser(), None
    hub_id = path_or_id.as_posix() if isinstance(path_or_id, Path) else path_or_id.rstrip("/")
    if folder.suffix == UQFF and not folder.is_dir():
        folder, file, hub_id = folder.parent, folder.name, hub_id.rpartition("/")[0]
    if folder.is_dir():
        if revision is not None:
            raise BadValue(f"revision {revision!r} was given for the folder {folder}; only a hub id has revisions")
        if file is None or not weights:
            return folder
        return folder / uqff_shards((path.name for path in folder.iterdir()), str(folder), file)[0]
    if folder.exists() and file is None:
        raise NotAFolder(f"{folder} is a file; give the folder that holds it and its config.json")
    if hub_id == DEMO and (revision, file) == (None, None):
        return demo_folder()
    if not _HUB_ID.fullmatch(hub_id):
        return _conversion_named(str(path_or_id), revision)
    found = _download(hub_id, revision, _WANTED_FILES if weights else _DESCRIPTION_FILES)
    if weights and (file is not None or all(path.name == RESIDUAL for path in found.glob("*.safetensors"))):
        names = _uqff_names(hub_id, revision, found)
        if file is not None or names:
            return _download_uqff(hub_id, revision, uqff_shards(names, hub_id, file), found)
    if weights:
        _require_weights(found, hub_id, revision)
    return found


def is_absent(path_or_id: str | Path, revision: str | None = None) -> bool:
    """Whether a model is a hub id whose weights are not in the hub cache, where `resolve` would look for them."""
    hub_id = str(path_or_id).rstrip("/")
    if Path(path_or_id).expanduser().exists() or not _HUB_ID.fullmatch(hub_id):
        return False
    import huggingface_hub

    try:
        weight_files(Path(huggingface_hub.snapshot_download(hub_id, revision=revision, local_files_only=True)))
    except (OSError, ValueError):
        return True
    return False


def _conversion_named(name: str, revision: str | None) -> Path:
    found = registry.named(name)
    if not found:
        raise MissingFile(
            f"no model folder at {name!r}, and it is no hub id either, nor a conversion that `g3n models` lists; give "
            f"an existing folder, or owner/name as in {SUGGESTED_MODEL}"
        )
    if len(found) > 1:
        raise BadValue(f"{name!r} is the name of {len(found)} conversions, give a folder: {', '.join(map(str, found))}")
    if revision is not None:
        raise BadValue(f"revision {revision!r} was given for the conversion {found[0]}; only a hub id has revisions")
    return found[0]


def resolve_file(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The local path of a file, given as such or as one of the hub's, owner/name/FILE, which alone is downloaded.

    revision: a branch, tag or commit; of a hub's file only. Raises as `resolve` does.
    """
    path = Path(path_or_id).expanduser()
    named = None if path.exists() else _HUB_FILE.fullmatch(Path(path_or_id).as_posix())
    if named is None:
        if revision is not None:
            raise BadValue(f"revision {revision!r} was given for the file {path}; only the hub has revisions")
        return path
    import huggingface_hub
    from huggingface_hub import errors

    hub_id, name = named.groups()
    with _hub_errors(hub_id, revision):
        try:
            return Path(huggingface_hub.hf_hub_download(hub_id, name, revision=revision))
        except errors.RemoteEntryNotFoundError:
            pass
    there = ", ".join(_gguf_files(hub_id, revision)) or "none"
    raise MissingFile(f"{hub_id} has no file {name}; its GGUF files: {there}")


def resolve_adapter(path_or_id: str | Path) -> Path:
    """The local folder of an adapter, given as a folder, as one file of it or as a hub id; raises as `resolve` does."""
    if not isinstance(path_or_id, str | Path) or not str(path_or_id).strip():
        raise BadValue(f"the adapter is {path_or_id!r}, expected a folder or a hub id")
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    hub_id = str(path_or_id).rstrip("/")
    if not _HUB_ID.fullmatch(hub_id):
        raise MissingFile(f"no adapter at {str(path_or_id)!r}, nor is it a hub id; give a folder, or owner/name")
    return _snapshot(hub_id, None, [SETTINGS, "adapter*.safetensors"])


def tensor_headers(hub_id: str, revision: str | None = None) -> dict[str, TensorInfo]:
    """Dtypes and shapes of a hub id's tensors, by the names on disk, of which the files' headers alone are read.

    Raises as `resolve` does.
    """
    import huggingface_hub
    from huggingface_hub import errors

    hub_id = hub_id.rstrip("/")
    with _hub_errors(hub_id, revision):
        try:
            found = huggingface_hub.get_safetensors_metadata(hub_id, revision=revision)
        except errors.NotASafetensorsRepoError as error:
            raise MissingFile(f"{hub_id} has no safetensors files: {_first_line(error)}") from error
        except errors.SafetensorsParsingError as error:
            raise BadValue(f"{hub_id} has no readable safetensors files: {_first_line(error)}") from error
    return {
        name: TensorInfo(tuple(info.shape), info.dtype)
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    }


def models_here() -> list[tuple[Path, str]]:
    """Every complete Gemma 3n of this program's conversions and of the hub cache: its folder, its path or hub id."""
    conversions = [(folder, str(folder)) for folder in registry.conversions() if _is_complete_gemma3n(folder)]
    return [*conversions, *snapshots_here()]


def snapshots_here() -> list[tuple[Path, str]]:
    """Every complete Gemma 3n of the hub cache: its folder, its hub id."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [
        (path.parent, path.parts[-4].removeprefix("models--").replace("--", "/", 1))
        for path in Path(HF_HUB_CACHE).glob("models--*/snapshots/*/config.json")
        if _is_complete_gemma3n(path.parent)
    ]


def default_model() -> tuple[Path, str]:
    """The model to use when none was named, and the line that says which one it is.

    The newest complete Gemma 3n of this program's conversions and of the hub cache, else the embedded demo.
    """
    if found := models_here():
        folder, name = max(found, key=lambda entry: (entry[0] / "config.json").stat().st_mtime)
        return folder, f"no --model given: using the newest Gemma 3n on this machine, {name}"
    return demo_folder(), (
        "no --model given and no Gemma 3n on this machine: using the embedded demo model, which is tiny and "
        f"knows a few skills only; for the real one: --model {SUGGESTED_MODEL}, after accepting its licence at "
        f"https://huggingface.co/{SUGGESTED_MODEL} and `hf auth login`"
    )


def _download(hub_id: str, revision: str | None, files: list[str]) -> Path:
    folder = _snapshot(hub_id, revision, files)
    version = "" if revision is None else f" at revision {revision!r}"
    if not (folder / "config.json").is_file():
        if (folder / SETTINGS).is_file():
            raise MissingFile(f"{hub_id}{version}: {adapter_message(folder)}")
        _require_no_gguf_files(hub_id, revision)
        raise MissingFile(f"{hub_id}{version} has no config.json; is it a model in safetensors format?")
    return folder


def _uqff_names(hub_id: str, revision: str | None, folder: Path) -> list[str]:
    """The .uqff files of a hub id, or those in the cache where the hub can't be asked."""
    import huggingface_hub

    try:
        with _hub_errors(hub_id, revision):
            names = huggingface_hub.list_repo_files(hub_id, revision=revision)
    except NoConnection:
        names = [path.name for path in folder.iterdir()]
    return [name for name in names if name.endswith(UQFF) and "/" not in name]


def _download_uqff(hub_id: str, revision: str | None, shards: list[str], folder: Path) -> Path:
    """The first file of a model of mistral.rs, once all are here, with what its repository's models share."""
    import huggingface_hub

    if not (folder / shards[0]).is_file():
        with _hub_errors(hub_id, revision):
            header = huggingface_hub.parse_safetensors_file_metadata(hub_id, shards[0], revision=revision)
        if "uqff.version.major" not in header.tensors:
            raise before_uqff_1(f"{hub_id}/{shards[0]}")
    _snapshot(hub_id, revision, [*shards, RESIDUAL])
    return folder / shards[0]


def _snapshot(hub_id: str, revision: str | None, files: list[str]) -> Path:
    # Imported here: the hub client takes a third of a second to import, and a local folder does not need it.
    import huggingface_hub

    with _hub_errors(hub_id, revision):
        # What UQFF models share is no model of its own: it comes with one of them, or not at all.
        left = None if RESIDUAL in files else [RESIDUAL]
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=files, ignore_patterns=left)
        )


@contextmanager
def _hub_errors(hub_id: str, revision: str | None) -> Generator[None]:
    """What the hub's client raises as errors of ours, each in one sentence."""
    import huggingface_hub
    from huggingface_hub import errors

    version = "" if revision is None else f" at revision {revision!r}"
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        # A refusal (gated, unknown) can reach us as the cause of "not in the cache" as well.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _hub_error(error.__cause__, hub_id, revision) from error
        reason = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the hub can't be reached"
        raise NoConnection(
            f"{hub_id}{version} is not in the cache {huggingface_hub.constants.HF_HUB_CACHE} as a whole, and {reason}; "
            "go online once, or give a local folder"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise NoConnection(f"{hub_id}{version} can't be asked for, because HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        raise _hub_error(error, hub_id, revision) from error
    except errors.HFValidationError as error:
        raise BadValue(f"{hub_id!r} is no hub id: {_first_line(error)}") from error
    # The HTTP client's own error, whichever client the installed version uses.
    except (errors.HTTPError, errors.XetDownloadError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NoConnection(
            f"the download of {hub_id}{version} broke off ({_first_line(error)}); "
            "the same command goes on where it stopped"
        ) from error


def _require_no_gguf_files(hub_id: str, revision: str | None) -> None:
    """Raises ValueError that lists the GGUF files of a repository from which no model in safetensors came."""
    try:
        found = _gguf_files(hub_id, revision)
    except NoConnection:  # of which the caller's error speaks
        return
    if found:
        raise BadValue(
            f"{hub_id} holds GGUF files: name one of them, as in {hub_id}/{found[0]}; there are {', '.join(found)}"
        )


def _gguf_files(hub_id: str, revision: str | None) -> list[str]:
    import huggingface_hub

    with _hub_errors(hub_id, revision):
        found = huggingface_hub.list_repo_files(hub_id, revision=revision)
    models = (name for name in found if name.lower().endswith(".gguf"))
    return sorted(models, key=lambda name: ("mmproj" in name.lower(), name))  # files of towers last


def _require_weights(folder: Path, hub_id: str, revision: str | None) -> None:
    """Raises ConnectionError when a snapshot in the cache lacks weights that could not be fetched.

    The hub's client returns what it has of a snapshot when it can't ask for more, be it the config alone.
    """
    from huggingface_hub import constants

    try:
        weight_files(folder)
    except MissingFile as error:
        if adapter_files(folder):
            raise
        _require_no_gguf_files(hub_id, revision)
        offline = ", and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise NoConnection(
            f"the cache {constants.HF_HUB_CACHE} holds {hub_id} without its weights{offline}; go online once, or give "
            "a local folder; only safetensors files are read"
        ) from error


def _hub_error(error: Exception, hub_id: str, revision: str | None) -> OSError:
    """The hub's refusal, in one sentence that says what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{hub_id}"
    match error:
        case errors.GatedRepoError():
            return NotPermitted(
                f"{hub_id} is gated: accept its licence at {page}, log in with `hf auth login`, then try again"
            )
        case errors.RevisionNotFoundError():
            return MissingFile(f"{hub_id} has no revision {revision!r}; its branches and tags are listed at {page}")
        case errors.RepositoryNotFoundError():
            return MissingFile(
                f"there is no model {hub_id!r} on the hub, or it is private (then log in with `hf auth login`), "
                "nor a folder of that name here"
            )
        case _:
            return NoConnection(f"the hub refused to give {hub_id}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _is_complete_gemma3n(folder: Path) -> bool:
    """Whether a folder holds all files of a Gemma 3n, and not of the demo, which a conversion may have been made of."""
    try:
        if read_json(folder / "config.json").get("model_type") not in ("gemma3n", "gemma3n_text"):
            return False
        index = folder / "model.safetensors.index.json"
        shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file() or filecmp.cmp(tokenizer, demo_folder() / "tokenizer.json", shallow=False):
        return False
    return all((folder / shard).is_file() for shard in shards)

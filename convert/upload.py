"""A conversion's way to the Hugging Face hub: what can be known before it is made, and its upload once it is whole."""

import shlex
from pathlib import Path

from g3n_mlx.failures import BadValue, NoConnection, NotPermitted, one_line

_STALE = "model*.safetensors*"  # an earlier model's shards and index: mlx-lm would load them together with the new ones


def check_upload(repo: str) -> None:
    """Asks the hub whether this machine's token may write to a repository, OWNER/NAME; there need be none yet.

    Raises ValueError for a name that the hub would not take, PermissionError without a token that may write there, and
    ConnectionError when the hub can't be asked.
    """
    # Imported here: the hub's client takes a third of a second to import, and most conversions stay on the machine.
    from huggingface_hub import HfApi, constants, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise BadValue(f"{repo!r} can't be the name of a repository: {one_line(error)}") from None
    owner, slash, _ = repo.partition("/")
    if not slash:
        raise BadValue(f"the repository is {repo!r}, expected OWNER/NAME; the owner is you or an organization of yours")
    later = "or convert without an upload, and upload the folder later: hf upload REPOSITORY FOLDER"
    if constants.HF_HUB_OFFLINE:
        raise NoConnection(f"nothing can be uploaded while HF_HUB_OFFLINE is set: go online, {later}")
    try:
        user = HfApi().whoami()
    except errors.LocalTokenNotFoundError:
        raise NotPermitted(
            f"an upload to {repo} needs a token that may write: `hf auth login`, or set HF_TOKEN"
        ) from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise NotPermitted(
                f"the hub does not know this token: `hf auth login` anew, or mend HF_TOKEN ({one_line(error)})"
            ) from None
        raise NoConnection(f"the hub does not say who you are ({one_line(error)}): try again, {later}") from error
    # The HTTP client's own error, whichever client the installed version uses.
    except errors.HTTPError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NoConnection(f"the hub can't be reached ({one_line(error)}): go online, {later}") from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise NotPermitted(
            f"this machine's token may only read: make one that may write at {constants.ENDPOINT}/settings/tokens, "
            "and `hf auth login` with it"
        )
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    if owner not in owners and role != "fineGrained":  # which may write where it does not see the organization
        raise NotPermitted(f"{user['name']} can't write to {repo}: the owner can be {', '.join(owners)}")


def upload(folder: str | Path, repo: str) -> str:
    """Uploads a folder that `convert` wrote to OWNER/NAME, which is made if there is none; returns its URL.

    Files of an earlier upload are replaced, its other weights deleted. Nothing local changes. Raises as `check_upload`
    does, with the command that goes on.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, delete_patterns=_STALE, commit_message="Upload a conversion by g3n_mlx"
        )
    # The hub's client raises errors of any kind, its storage's among them. The folder is whole whatever went wrong.
    except Exception as error:
        refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403)
        kind, did = (NotPermitted, "was refused") if refused else (NoConnection, "broke off")
        raise kind(f"the upload to {repo} {did} ({one_line(error)}); {going_on(folder, repo)}") from error
    return str(url)


def going_on(folder: str | Path, repo: str) -> str:
    """What to do after an upload that did not end."""
    return f"{folder} is whole, and `hf upload {repo} {shlex.quote(str(folder))} --delete '{_STALE}'` goes on"

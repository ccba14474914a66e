"""Upload a published artifact to the hub, when the user asks for it."""

import importlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._http import get_session

from lora_ft.errors import ResourceError, UsageError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository, or a push without a login, before anything long is done."""
    if not REPOSITORY.fullmatch(name):
        raise UsageError(f"{name!r} is no repository of the hub", fix="--push USER/NAME")
    if not get_token():
        raise UsageError("nobody is logged in to the hub", where=name, fix="hf auth login, or set HF_TOKEN")


_REFUSALS = (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, HFValidationError, OSError)


def _no_connection() -> type[Exception]:
    """What the hub's client raises: of httpx or httpx2, as its version says."""
    package: Any = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    kind: type[Exception] = package.HTTPError
    return kind


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder's files in one commit and return the address.

    Args:
        folder: a published artifact.
        name: USER/NAME; made where it does not exist.
        private: whether a new repository is private.

    Raises:
        ResourceError: the hub cannot be reached or refuses; the folder stays where it is.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Written and verified by lora-ft")
    except (*_REFUSALS, _no_connection()) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ResourceError(
            f"the artifact could not be uploaded: {first[:240]}",
            where=name,
            fix=f"it is complete in {folder}; log in with `hf auth login` and upload it, or try again",
        ) from error
    return str(done.commit_url)

"""Uploading a finished folder to the hub."""

from __future__ import annotations

from pathlib import Path

from nybble.errors import CannotRunError
from nybble.guard import brief, check_links


def push_folder(folder: Path, repository: str) -> str:
    """Upload `folder` to the model repository, which is created as private if it is new; returns its address.

    Raises:
        InputError: a link in `folder` leads out of it, so that another file would be uploaded.
        CannotRunError: there is no network, no token or no right to write; the folder stays on disk.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    check_links(folder)
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CannotRunError(
            f"push_to_hub {repository!r} failed ({brief(error)}); the weights are "
            f"kept in {folder}: log in with `hf auth login`, connect, and upload that folder"
        ) from error
    return str(address)

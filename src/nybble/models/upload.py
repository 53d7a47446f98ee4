"""Uploading a finished folder to the hub."""

from __future__ import annotations

import json
from pathlib import Path

from nybble.errors import CannotRunError
from nybble.guard import brief, check_links
from nybble.models.adapter_files import CONFIG


def push_folder(folder: Path, repository: str, base: Path | None = None) -> str:
    """Upload `folder` to the model repository, which is created as private if it is new; returns its address.

    `base` is the base of the adapter in `folder` if nobody else has it: it goes to `REPOSITORY-base`, and the uploaded
    adapter names that.

    Raises:
        InputError: a link in `folder` leads out of it, so that another file would be uploaded.
        CannotRunError: there is no network, no token or no right to write; the folder stays on disk.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for part in (folder, base):
        if part is not None:
            check_links(part)
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        if base is None:
            api.upload_folder(repo_id=repository, folder_path=folder)
        else:
            settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            settings["base_model_name_or_path"] = f"{repository}-base"
            api.create_repo(f"{repository}-base", private=True, exist_ok=True)
            api.upload_folder(repo_id=f"{repository}-base", folder_path=base, ignore_patterns=["start/*"])
            api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=[CONFIG])
            text = json.dumps(settings, indent=2, sort_keys=True)
            api.upload_file(repo_id=repository, path_in_repo=CONFIG, path_or_fileobj=text.encode())
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CannotRunError(
            f"push_to_hub {repository!r} failed ({brief(error)}); the weights are "
            f"kept in {folder}: log in with `hf auth login`, connect, and upload that folder"
        ) from error
    return str(address)

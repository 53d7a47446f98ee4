"""Uploads: an adapter whose base nobody else has takes it along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from nybble.models import push_folder


class Hub:
    """Stands for HfApi, and notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **settings: Any) -> str:
        self.asked.append((name, settings))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id: str, **settings: Any) -> None:
        self.asked.append((repo_id, settings))

    def upload_file(self, repo_id: str, **settings: Any) -> None:
        self.asked.append((repo_id, settings))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    own = str(tmp_path / "run" / "base")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": own, "r": 8}))
    (tmp_path / "run" / "base").mkdir()
    return folder


def test_an_adapter_of_a_base_on_the_hub_goes_alone(hub: Hub, adapter: Path) -> None:
    assert push_folder(adapter, "me/it") == "https://hub/me/it"
    assert [name for name, _ in hub.asked] == ["me/it"] * 2
    assert hub.asked[1][1] == {"folder_path": adapter}


def test_an_adapter_of_a_base_of_its_own_names_the_uploaded_base(hub: Hub, adapter: Path) -> None:
    base = adapter.parent / "base"
    assert push_folder(adapter, "me/it", base) == "https://hub/me/it"
    created = [name for name, settings in hub.asked if "private" in settings]
    assert created == ["me/it", "me/it-base"]
    assert all(settings["private"] for _, settings in hub.asked if "private" in settings)
    folders = {name: settings for name, settings in hub.asked if "folder_path" in settings}
    assert folders["me/it-base"]["folder_path"] == base
    assert folders["me/it"] == {"folder_path": adapter, "ignore_patterns": ["adapter_config.json"]}
    (file,) = [settings for name, settings in hub.asked if "path_in_repo" in settings and name == "me/it"]
    assert json.loads(file["path_or_fileobj"]) == {"base_model_name_or_path": "me/it-base", "r": 8}
    kept = json.loads((adapter / "adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == str(base)  # the folder of the run stays as it is

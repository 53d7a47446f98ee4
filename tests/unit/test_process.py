"""What the command line sets for its own process."""

from __future__ import annotations

import os

import pytest

from nybble.cli.process import own_process


def test_waiting_threads_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    own_process()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    own_process()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"

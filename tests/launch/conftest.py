"""Commands that stand in for Slurm's."""

from __future__ import annotations

from pathlib import Path

import pytest
from pretend_slurm import PretendSlurm


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretendSlurm:
    """Slurm's commands on PATH: two partitions, and every submission is job 77."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    pretend = PretendSlurm(folder)
    monkeypatch.setenv("PATH", pretend.path)
    return pretend

"""A Slurm of one's own for the tests in this folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from one_machine import PROGRAMS, SYSTEM_FOLDERS, Slurm


@pytest.fixture(scope="session")
def _daemons() -> Iterator[Slurm]:
    path = f"{os.environ['PATH']}:{SYSTEM_FOLDERS}"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)}): make test-slurm installs it")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons start jobs as any user, so they need root")
    with Slurm() as slurm:
        yield slurm


@pytest.fixture
def slurm(_daemons: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A cluster without jobs, which the commands of this test ask."""
    _daemons.cancel_all()
    monkeypatch.setenv("SLURM_CONF", _daemons.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", _daemons.environment["PATH"])
    return _daemons

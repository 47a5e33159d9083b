"""Ray, started once for the tests in this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="make test-ray installs it")
pytest.importorskip("lance")


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """Two cores of this machine, whose workers find what tests import."""
    from strata.explicit.bank.ray_add import running

    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with running(2):
        yield

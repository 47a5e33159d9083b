"""Ray, started once for the tests in this folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray() -> Iterator[str]:
    """Two workers on this machine, which find what tests import and a bucket; gives its URL."""
    pytest.importorskip("ray", reason="make test-ray installs it")
    from s3_server import serving
    from strata.explicit.bank.ray_add import running

    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving() as url, running(2):
        yield url

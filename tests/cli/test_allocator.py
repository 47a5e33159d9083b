"""Freed memory is kept by the process where it asks for that, and by no other."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is asked"
)

_BUFFER_MIB, _TIMES = 64, 20
_SCRIPT = f"""
import resource, sys
from strata.cli.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({_TIMES}):
    bytearray({_BUFFER_MIB} << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(how: str, **env: str) -> list[str]:
    command = [sys.executable, "-c", _SCRIPT, how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_pages_are_cleared_once_not_for_each_buffer() -> None:
    pages = _BUFFER_MIB * 256
    said, kept = _run("keep")
    (given_back,) = _run("no")
    assert said == "True"
    assert int(given_back) > _TIMES * pages * 0.9
    assert int(kept) < 2 * pages


def test_the_environment_goes_first() -> None:
    assert _run("keep", MALLOC_ARENA_MAX="2")[0] == "False"

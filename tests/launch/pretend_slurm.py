"""Slurm's commands as small shell scripts, for tests without a cluster.

Each notes how it was called in `calls`, and answers as its test says.
"""

from __future__ import annotations

import os
from pathlib import Path

ANSWERS = {
    "sbatch": "echo 77",
    "sinfo": "echo low; echo high",
    "squeue": 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1',
    "sacct": "exit 1",
}


class PretendSlurm:
    """A folder of commands, first on PATH.

    Args:
        folder: where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "bin"
        self._folder.mkdir()
        self._calls = folder / "calls"
        for name, shell in ANSWERS.items():
            self.answer(name, shell)
        self.path = f"{self._folder}:{os.environ['PATH']}"

    def answer(self, name: str, shell: str) -> None:
        """Let a command do what this line of shell says."""
        command = self._folder / name
        command.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >> "{self._calls}"\n{shell}\n')
        command.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """The arguments of each call of a command, in one line."""
        if not self._calls.exists():
            return []
        lines = self._calls.read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

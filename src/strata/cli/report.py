"""`strata report`: runs as one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from strata.cli.bank import AsJson
from strata.errors import ConfigError


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="folders of strata train, reader train, quickstart or knowledge probe; JSON files "
            "of strata eval; several training runs are compared",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="the folder to write; default: report in the first run")
    ] = None,
    answers: Annotated[
        int, typer.Option(help="questions whose answers are shown, of each evaluation")
    ] = 40,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page, and its pictures as PNG, of what runs left behind.

    Curves, tables, memory health, answers with their sources; every number with its file and key.
    """
    from strata.report.page import write_report

    if answers < 0:
        raise ConfigError(f"--answers {answers}: give 0 or more")
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a folder")
    first = runs[0]
    written = write_report(
        runs,
        out=out or (first if first.is_dir() else first.parent) / "report",
        answers=answers,
    )
    if as_json:
        found = {"page": written.page, "pictures": written.pictures, "sections": written.sections}
        print(json.dumps(found, default=str))
        return
    print(f"{written.page}: {len(written.sections)} sections, {len(written.pictures)} pictures")

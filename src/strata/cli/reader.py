"""`strata reader`: a small decoder that learns to answer from references."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def data(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=value, replaces a key of the settings")
    ] = None,
    out: Annotated[Path, typer.Option(help="the folder to make")] = Path("runs/reader/data"),
    questions: Annotated[
        Path | None,
        typer.Option(
            help="folder of entity_questions_{train,dev}.jsonl.gz; the extract in strata otherwise"
        ),
    ] = None,
    prose: Annotated[
        list[Path] | None,
        typer.Option(help="articles: file or folder, as for data prepare (repeatable)"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Make the texts that the reader is taught with, its tokenizer, and its questions.

    Interrupted, the same command goes on with the folder it was at.
    """
    from strata.reader.data import make_data, read_settings

    config = read_settings(overrides or (), extract=questions is None)
    say = (lambda line: None) if as_json else print
    report = make_data(questions, prose or (), out=out, config=config, say=say)
    if as_json:
        print(json.dumps(asdict(report)))

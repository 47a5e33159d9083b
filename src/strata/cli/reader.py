"""`strata reader`: a small decoder that learns to answer from references."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from strata.errors import ConfigError

GO_ON = 75  # EX_TEMPFAIL: nothing failed, the same command goes on


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


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=value, replaces a key of the stages")
    ] = None,
    data: Annotated[Path, typer.Option(help="a folder of strata reader data")] = Path(
        "runs/reader/data"
    ),
    out: Annotated[Path, typer.Option(help="the folder for all stages")] = Path("runs/reader/run"),
    stages: Annotated[
        Path | None, typer.Option(help="YAML of stages; those in strata otherwise")
    ] = None,
    for_minutes: Annotated[
        float | None, typer.Option(help="stop after about so long, saved, and exit with 75")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the result as JSON; no progress")
    ] = False,
) -> None:
    """Teach the reader: references as text first, then as memories.

    Interrupted, the same command goes on where it was. SIGTERM and --for-minutes finish the step,
    save and exit with 75 while stages are left; Ctrl-C does the same and exits with 130.
    """
    from strata.reader.stages import read_stages
    from strata.reader.train import train_reader

    if for_minutes is not None and not 0 < for_minutes < float("inf"):
        raise ConfigError(f"--for-minutes {for_minutes}: give more than 0")
    result = train_reader(
        data,
        out=out,
        config=read_stages(stages, overrides or ()),
        for_s=None if for_minutes is None else 60 * for_minutes,
        say=(lambda line: None) if as_json else print,
        progress=not as_json,
    )
    if as_json:
        print(json.dumps(asdict(result), default=str))
    elif result.stopped_by is None:
        print(f"all stages are done, the model is {result.model_dir}")
    else:
        print(
            f"{result.stopped_by}: stopped at step {result.step} of {result.stage}, "
            "run the same command to go on"
        )
    if result.stopped_by is not None:
        raise typer.Exit(130 if result.stopped_by == "SIGINT" else GO_ON)

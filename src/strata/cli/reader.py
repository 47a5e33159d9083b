"""`strata reader`: a small decoder that learns to answer from references."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from strata.cli.allocator import keep_freed_memory
from strata.errors import GO_ON, ConfigError


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
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="folder of one to use, as DATA/tokenizer; else one is trained"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Make the texts that the reader is taught with, its tokenizer, and its questions.

    Interrupted, the same command goes on with the folder it was at.
    """
    from strata.reader.data import make_data, read_settings

    config = read_settings(overrides or (), extract=questions is None)
    say = (lambda line: None) if as_json else print
    report = make_data(questions, prose or (), out=out, config=config, tokenizer=tokenizer, say=say)
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
    """Teach the reader: references as text first, then as memories, last what it shall know.

    Interrupted, the same command goes on where it was. SIGTERM and --for-minutes finish the step,
    save and exit with 75 while stages are left; Ctrl-C does the same and exits with 130.
    """
    from strata.reader.stages import read_stages
    from strata.reader.train import train_reader

    if for_minutes is not None and not 0 < for_minutes < float("inf"):
        raise ConfigError(f"--for-minutes {for_minutes}: give more than 0")
    keep_freed_memory()
    result = train_reader(
        data,
        out=out,
        config=read_stages(stages, overrides or ()),
        for_s=None if for_minutes is None else 60 * for_minutes,
        say=(lambda line: None) if as_json else partial(print, flush=True),
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


def evaluate(
    data: Annotated[Path, typer.Option(help="a folder of strata reader data")] = Path(
        "runs/reader/data"
    ),
    run: Annotated[Path, typer.Option(help="the folder of strata reader train")] = Path(
        "runs/reader/run"
    ),
    stage: Annotated[
        str | None, typer.Option(help="whose model; default: the last finished one")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for bank and report; default: RUN/exam/STAGE")
    ] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="of memories, beside the bank's own (repeatable)")
    ] = None,
    top_k: Annotated[int, typer.Option(help="references found for a question")] = 5,
    limit: Annotated[int | None, typer.Option(help="first questions only")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 16,
    embedder: Annotated[str, typer.Option(help="minilm (offline); none: by words only")] = "minilm",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Make a bank of the test references and ask the test questions in every format.

    Twice: given the one reference that answers, and given what the bank's search finds.
    """
    from rich.console import Console

    from strata.cli.eval import _progress
    from strata.cli.eval_memory import table
    from strata.reader.exam import CODECS, examine

    for name, number in (
        ("--top-k", top_k), ("--max-new-tokens", max_new_tokens), ("--limit", limit),
    ):  # fmt: skip
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number}: give 1 or more")
    with _progress("questions") as progress:
        exam = examine(
            data,
            run=run,
            out=out,
            stage=stage,
            codecs=codec or CODECS,
            top_k=top_k,
            limit=limit,
            max_new_tokens=max_new_tokens,
            embedder=None if embedder == "none" else embedder,
            progress=progress,
        )
    results = {"oracle": exam.oracle, "search": exam.search}
    if as_json:
        scores = {by: [asdict(s) for s in result.scores] for by, result in results.items()}
        print(json.dumps({"stage": exam.stage, **scores}))
        return
    for by, result in results.items():
        shown = table(result)
        shown.title = f"{exam.stage}, {by}: {shown.title}"
        Console().print(shown)


def pack(
    out: Annotated[Path, typer.Option(help="the folder to make, or to replace")],
    data: Annotated[Path, typer.Option(help="a folder of strata reader data")] = Path(
        "runs/reader/data"
    ),
    run: Annotated[Path, typer.Option(help="the folder of strata reader train")] = Path(
        "runs/reader/run"
    ),
    stage: Annotated[str | None, typer.Option(help="whose model; default: the last one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Write the taught reader as one small folder: bf16, tokenizer, and what is known of it.

    The validation questions are asked once more, of the rounded weights.
    """
    from strata.reader.pack import pack_reader

    packed = pack_reader(run, data=data, out=out, stage=stage)
    if as_json:
        print(json.dumps(asdict(packed), default=str))
        return
    shares = ", ".join(f"{way} {share:.1%}" for way, share in packed.exact.items())
    print(f"{packed.folder}: {packed.stage}, {packed.num_bytes / 1e6:.1f} MB; {shares}")

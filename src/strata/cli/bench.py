"""`strata bench`: speed, beside the rivals, for anyone to repeat."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from strata.cli.allocator import keep_freed_memory
from strata.errors import ConfigError


def bench_ops(
    size: Annotated[
        str, typer.Option(help="small (seconds), medium, large (needs 24 GB), rows (2^16..2^22)")
    ] = "medium",
    op: Annotated[
        list[str] | None, typer.Option(help="time this operation only (repeatable)")
    ] = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds that count")] = 7,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list")] = False,
) -> None:
    """Time each operation against every installed rival, after checking it against float64.

    Rivals beside torch come with `pip install strata-lm[bench]`.
    """
    from rich.console import Console

    from strata.bench.ops import OPS
    from strata.bench.ops import bench_ops as run
    from strata.bench.report import ops_table
    from strata.bench.sizes import SIZES
    from strata.device import pick_device

    if size not in SIZES:
        raise ConfigError(f"no size {size!r}: give one of {', '.join(SIZES)}")
    for name in op or ():
        if name not in OPS:
            raise ConfigError(f"no operation {name!r}: give one of {', '.join(OPS)}")
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds} is not allowed: give 1 or more")
    target = pick_device(device)
    shown = Console(stderr=True)
    with shown.status("starting") as status:
        results = list(
            run(SIZES[size], device=target, ops=op, rounds=rounds, on_progress=status.update)
        )
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        Console().print(ops_table(results, device=target))


def bench_train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="a.b=value, replaces a key of the quickstart's recipe"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="steps of each contestant that count")] = 15,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time training steps of the quickstart's Memory+ model, its dense control, and a bare loop.

    The bare loop is plain torch around the same Memory+ model. It takes transformers' own loss,
    with logits at every position; strata computes logits at label tokens only.
    """
    from rich.console import Console

    from strata.bench.report import train_table
    from strata.bench.train import bench_train as run
    from strata.device import pick_device

    if rounds < 1:
        raise ConfigError(f"--rounds {rounds} is not allowed: give 1 or more")
    target = pick_device(device)
    keep_freed_memory()
    with Console(stderr=True).status("starting") as status:
        result = run(
            device=target,
            rounds=rounds,
            overrides=tuple(overrides or ()),
            on_progress=status.update,
        )
    if as_json:
        print(json.dumps(result.as_dict(), indent=1))
    else:
        Console().print(train_table(result, device=target))


def bench_decode(
    size: Annotated[
        str, typer.Option(help="small (seconds), full (12 GB of memory, 5 GB of disk)")
    ] = "full",
    rounds: Annotated[int, typer.Option(help="steps of each contestant that count")] = 15,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list")] = False,
) -> None:
    """Time decoding one token at a time, with the value table in memory, quantized and mapped."""
    from rich.console import Console

    from strata.bench.decode import SIZES
    from strata.bench.decode import bench_decode as run
    from strata.bench.report import decode_table
    from strata.device import pick_device

    if size not in SIZES:
        raise ConfigError(f"no size {size!r}: give one of {', '.join(SIZES)}")
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds} is not allowed: give 1 or more")
    target = pick_device(device)
    with Console(stderr=True).status("starting") as status:
        results = run(SIZES[size], device=target, rounds=rounds, on_progress=status.update)
    if as_json:
        print(json.dumps([result.as_dict() for result in results], indent=1))
    else:
        Console().print(decode_table(results, device=target))


def bench_memory(
    size: Annotated[str, typer.Option(help="small (seconds), full (ten minutes)")] = "full",
    model: Annotated[
        Path | None,
        typer.Option(help="folder written by save_pretrained; default: random weights"),
    ] = None,
    embedder: Annotated[
        str, typer.Option(help="minilm (offline), a name on the hub, a folder; none: by words only")
    ] = "minilm",
    rounds: Annotated[int, typer.Option(help="answers of each contestant that count")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list")] = False,
) -> None:
    """Time answers with no knowledge, text, cached text, and dense, sparse and quantized memories.

    One decoder, one retriever, the same references: how soon the first token comes, how fast the
    others, and what is stored.
    """
    from rich.console import Console

    from strata.bench.memory import SIZES
    from strata.bench.memory import bench_memory as run
    from strata.bench.report import memory_table
    from strata.cli.device import open_model
    from strata.device import pick_device
    from strata.explicit.embed import make_embedder

    if size not in SIZES:
        raise ConfigError(f"no size {size!r}: give one of {', '.join(SIZES)}")
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds} is not allowed: give 1 or more")
    target = pick_device(device)
    opened: dict[str, Any] = {}
    if model is not None:
        opened["model"], opened["tokenizer"] = open_model(model, device=device)
    with Console(stderr=True).status("starting") as status:
        results = run(
            SIZES[size],
            device=target,
            rounds=rounds,
            embedder=None if embedder == "none" else make_embedder(embedder, device=device),
            on_progress=status.update,
            **opened,
        )
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        Console().print(memory_table(results, device=target))

"""`strata quickstart`: memory layers and explicit memory in minutes, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strata.cli.allocator import keep_freed_memory


def quickstart(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=value, replaces a key of both recipes")
    ] = None,
    out: Annotated[Path, typer.Option(help="the folder for everything made")] = Path(
        "runs/quickstart"
    ),
    reader: Annotated[
        Path | None,
        typer.Option(
            help="decoder to ask with a bank, as of strata reader pack; else strata's own"
        ),
    ] = None,
) -> None:
    """Train a small model with memory layers and its dense twin on facts, and ask both.

    Then articles become a bank, and a decoder that has learned to read is asked with it.

    Interrupted, it goes on where it was; finished, it starts over.
    """
    from strata.quickstart.run import quickstart as run

    keep_freed_memory()
    run(out, overrides=overrides or (), reader=reader)

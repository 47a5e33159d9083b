"""`strata quickstart`: the whole of memory layers in minutes, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=value, replaces a key of both recipes")
    ] = None,
    out: Annotated[Path, typer.Option(help="the folder for everything made")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Train a small model with memory layers and its dense twin on facts, and ask both.

    Interrupted, it goes on where it was; finished, it starts over.
    """
    from strata.quickstart.run import quickstart as run

    run(out, overrides=overrides or ())

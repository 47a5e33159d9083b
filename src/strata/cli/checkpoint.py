"""`strata checkpoint convert`: a checkpoint of training as a model, or as the other kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="RUN/checkpoints/step_..., or RUN for its newest")
    ],
    out: Annotated[Path, typer.Option(help="folder to make")],
    to: Annotated[str, typer.Option(help="model, single or sharded")] = "model",
    tokenizer: Annotated[
        Path | None, typer.Option(help="folder of a tokenizer for the model; default: the data's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Turn a checkpoint of strata train into a model, or into the other kind of checkpoint.

    --to model: weights and tokenizer, as save_pretrained writes them; no optimizer, no step.

    --to single or sharded: a run folder with one checkpoint of everything (weights, the state of
    both optimizers, step, place in the data, recipe; random numbers only of one process), as one
    process writes it (safetensors) or as many do (torch's DCP). It is in one part, and any number
    of processes go on from it.

    strata train itself goes on from either kind, in any number of processes.
    """
    from strata.data.progress import ProgressBar
    from strata.train.convert import convert as convert_checkpoint

    kind: Any = to  # checked there
    parts = 4
    with ProgressBar(f"converting to {to}", total=parts, enabled=not as_json) as bar:
        read: list[str] = []

        def on_group(name: str) -> None:
            bar.update(len(read), note=name)
            read.append(name)

        made = convert_checkpoint(checkpoint, out, to=kind, tokenizer=tokenizer, on_group=on_group)
    if as_json:
        print(json.dumps({"out": str(out), "step": made.step, "bytes": made.num_bytes}))
        return
    print(f"{out}: {to}, step {made.step}, {made.num_bytes / 2**20:,.1f} MiB")
    if made.recipe is not None:
        print(f"go on with: strata train {made.recipe}")

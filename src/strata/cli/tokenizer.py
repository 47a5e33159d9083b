"""`strata tokenizer`: a vocabulary of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def train_tokenizer(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="parquet, jsonl, txt or folders")
    ],
    out: Annotated[Path, typer.Option(help="folder to make")],
    vocab_size: Annotated[int, typer.Option(help="tokens, 256 bytes and 3 special ones included")],
    text_field: Annotated[str, typer.Option(help="field or column of the text")] = "text",
    paragraphs: Annotated[
        bool, typer.Option("--paragraphs", help="each block of a txt file is a document")
    ] = False,
    sample_fraction: Annotated[float, typer.Option(help="share of the documents to learn from")] = (
        1.0
    ),
    seed: Annotated[int, typer.Option(help="of the sample")] = 42,
    add_bos: Annotated[
        bool, typer.Option("--add-bos", help="let every text begin with <bos>")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Train a byte-level BPE tokenizer that AutoTokenizer opens."""
    from strata.data.tokenizer import train_tokenizer as train

    size = train(
        sources,
        out=out,
        vocab_size=vocab_size,
        text_field=text_field,
        txt_documents="paragraph" if paragraphs else "file",
        sample_fraction=sample_fraction,
        seed=seed,
        add_bos=add_bos,
        progress=not as_json,
    )
    if as_json:
        print(json.dumps({"out": str(out), "vocab_size": size}))
        return
    print(f"{out}: {size:,} tokens")
    if size < vocab_size:
        print(f"the text holds no more merges: {size:,} of {vocab_size:,} tokens were made")

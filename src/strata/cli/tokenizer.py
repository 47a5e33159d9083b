"""`strata tokenizer`: a vocabulary of one's own, of a model on the hub, or out of a file."""

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
    _report(out, size, as_json=as_json)
    if size < vocab_size and not as_json:
        print(f"the text holds no more merges: {size:,} of {vocab_size:,} tokens were made")


def fetch_tokenizer(
    name: Annotated[
        str,
        typer.Argument(
            help="owner/name on the hub, or llama3, llama2, mistral, gemma2, qwen2, qwen3, olmo2, "
            "gpt2"
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="folder to make; default: NAME")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
    token_env: Annotated[
        str | None,
        typer.Option(
            help="environment variable with a token of the hub; default: HF_TOKEN, if set"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Fetch the tokenizer of a model on the hub."""
    from strata.data.hub.tokenizer import fetch_tokenizer as fetch

    out = out or Path(name.rpartition("/")[2])
    _report(out, fetch(name, out=out, revision=revision, token_env=token_env), as_json=as_json)


def convert_tokenizer(
    file: Annotated[Path, typer.Argument(help="a .tiktoken file or a .model of either kind")],
    out: Annotated[Path, typer.Option(help="folder to make")],
    bos: Annotated[str | None, typer.Option(help="token that begins a text")] = None,
    eos: Annotated[str | None, typer.Option(help="token that ends a text")] = None,
    pad: Annotated[str | None, typer.Option(help="token that fills up")] = None,
    add_bos: Annotated[
        bool | None,
        typer.Option(help="let every text begin with the bos token; default: for Llama 3 only"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Convert a tiktoken or sentencepiece file to a folder that AutoTokenizer opens."""
    from strata.data.convert_tokenizer import convert_tokenizer as convert

    size = convert(file, out=out, bos=bos, eos=eos, pad=pad, add_bos=add_bos)
    _report(out, size, as_json=as_json)


def _report(out: Path, size: int, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"out": str(out), "vocab_size": size}))
    else:
        print(f"{out}: {size:,} tokens")

"""`strata data`: documents to shards of tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strata.errors import ConfigError

if TYPE_CHECKING:
    from strata.data.manifest import TokenManifest
    from strata.data.references import ReferencesManifest


def prepare_data(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="parquet, jsonl, txt or folders; a data set of the hub as "
            "owner/name[:config][@revision], or fineweb_edu, fineweb_edu_10bt, dclm",
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder to make")],
    tokenizer: Annotated[
        Path, typer.Option(help="folder with a tokenizer.json, tiktoken or sentencepiece file")
    ],
    memory_gb: Annotated[float, typer.Option(help="memory to use, in 1e9 bytes")] = 8.0,
    workers: Annotated[
        int, typer.Option(help="processes that encode; 0: the tokenizer's threads in this one")
    ] = 0,
    seed: Annotated[int, typer.Option(help="of the shuffle and the validation split")] = 42,
    shuffle: Annotated[bool, typer.Option(help="one random order of all documents")] = True,
    val_fraction: Annotated[float, typer.Option(help="share of documents kept for val")] = 0.0,
    val: Annotated[
        list[str] | None, typer.Option(help="a SOURCE that is all val (repeatable)")
    ] = None,
    config: Annotated[str | None, typer.Option(help="configuration of data sets")] = None,
    split: Annotated[str, typer.Option(help="split of data sets")] = "train",
    val_split: Annotated[str, typer.Option(help="split of data sets given with --val")] = (
        "validation"
    ),
    streaming: Annotated[
        bool, typer.Option("--streaming", help="read files of the hub without fetching them whole")
    ] = False,
    text_field: Annotated[str, typer.Option(help="field or column of the text")] = "text",
    paragraphs: Annotated[
        bool, typer.Option("--paragraphs", help="each block of a txt file is a document")
    ] = False,
    shard_tokens: Annotated[int, typer.Option(help="most tokens of a shard")] = 2**27,
    append_eos: Annotated[bool, typer.Option(help="end each document with <eos>")] = True,
    prepend_bos: Annotated[
        bool | None,
        typer.Option(help="begin each document with <bos>; default: as the tokenizer does"),
    ] = None,
    parse_special_tokens: Annotated[
        bool, typer.Option(help='let "<eos>" in a text be that token, not text')
    ] = False,
    min_chars: Annotated[int | None, typer.Option(help="drop shorter documents")] = None,
    max_chars: Annotated[int | None, typer.Option(help="drop longer documents")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="drop shorter documents")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="drop longer documents")] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="drop what breaks a rule of Gopher (repeatable): NAME, NAME=LEAST..MOST, or "
            "gopher for all"
        ),
    ] = None,
    near_duplicates: Annotated[
        float | None, typer.Option(help="drop documents so similar to an earlier one, as 0.8")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Tokenise, shuffle and shard documents.

    Interrupted, the same command goes on where it was. Rows hold a text, or a prompt and a
    completion; prompts carry no loss.
    """
    from strata.config import validate
    from strata.data.filters import parse_rules
    from strata.data.manifest import MANIFEST_NAME
    from strata.data.prepare import PrepareConfig, prepare

    filters = {
        "min_chars": min_chars,
        "max_chars": max_chars,
        "min_tokens": min_tokens,
        "max_tokens": max_tokens,
        "rules": parse_rules(rule or ()),
    }
    settings = {
        "memory_gb": memory_gb,
        "workers": workers,
        "seed": seed,
        "shuffle": shuffle,
        "val_fraction": val_fraction,
        "text_field": text_field,
        "txt_documents": "paragraph" if paragraphs else "file",
        "shard_tokens": shard_tokens,
        "append_eos": append_eos,
        "prepend_bos": prepend_bos,
        "parse_special_tokens": parse_special_tokens,
        "config": config,
        "split": split,
        "val_split": val_split,
        "streaming": streaming,
        "filters": filters,
        "near_duplicates": near_duplicates,
    }
    chosen = validate(PrepareConfig, settings, origin="strata data prepare")
    was_complete = (out / MANIFEST_NAME).is_file()
    try:
        manifest = prepare(
            sources,
            out=out,
            tokenizer=tokenizer,
            config=chosen,
            val_sources=val or (),
            progress=not as_json,
        )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(_summary(out, manifest, was_complete=was_complete)))
        return
    if was_complete:
        print(f"{out} is complete already, nothing to do")
    for part, written in manifest.splits.items():
        print(
            f"{part}: {written.num_tokens:,} tokens in {written.num_documents:,} documents "
            f"and {len(written.shards)} shards"
        )
    if manifest.num_empty:
        print(f"left out {manifest.num_empty:,} records without text")
    for name, count in manifest.num_dropped.items():
        print(f"left out {count:,} documents by {name}")


def references(
    tokens: Annotated[Path, typer.Argument(help="folder made by strata data prepare")],
    bank: Annotated[str, typer.Option(help="the bank to search, a folder or a URL")],
    out: Annotated[Path, typer.Option(help="folder to make")],
    by: Annotated[str | None, typer.Option(help="search by vector, text or hybrid")] = None,
    chunk_tokens: Annotated[int, typer.Option(help="tokens of a chunk")] = 64,
    candidates: Annotated[int, typer.Option(help="hits looked at for each chunk")] = 8,
    leak_threshold: Annotated[
        float, typer.Option(help="drop references of which a greater share stands in the document")
    ] = 0.9,
    device: Annotated[str, typer.Option(help="of the embedder: auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Find the reference that each chunk of every document reads in training.

    A reference that is nearly a copy of a part of the document is left out. Interrupted, the same
    command goes on where it was.
    """
    from strata.config import validate
    from strata.data.find_references import find_references
    from strata.data.references import ReferencesConfig
    from strata.explicit.bank import Bank
    from strata.explicit.source import open_retriever

    settings = {
        "chunk_tokens": chunk_tokens,
        "candidates": candidates,
        "leak_threshold": leak_threshold,
    }
    config = validate(ReferencesConfig, settings, origin="strata data references")
    if by not in (None, "vector", "text", "hybrid"):
        raise ConfigError(f"--by is vector, text or hybrid, given {by!r}")
    opened = Bank.open(bank)
    by = by or ("text" if opened.embedder_name is None else "hybrid")
    retriever = open_retriever(opened, by, device=device)  # type: ignore[arg-type]
    try:
        manifest = find_references(
            tokens,
            out=out,
            find=retriever.search,
            searched={"bank": opened.digest(), "by": by},
            config=config,
            progress=not as_json,
        )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    counts = _found(manifest)
    if as_json:
        print(json.dumps({"out": str(out), **counts}))
        return
    print(
        f"{counts['num_chunks']:,} chunks, {counts['num_found']:,} with a reference; "
        f"{counts['num_leaks']:,} references left out of documents that they give away"
    )


def _found(manifest: ReferencesManifest) -> dict[str, int]:
    return {name: manifest.count(name) for name in ("num_chunks", "num_found", "num_leaks")}


def _summary(out: Path, manifest: TokenManifest, *, was_complete: bool) -> dict[str, object]:
    return {
        "out": str(out),
        "was_complete": was_complete,
        "num_tokens": manifest.num_tokens,
        "num_documents": manifest.num_documents,
        "num_empty": manifest.num_empty,
        "num_dropped": manifest.num_dropped,
        "vocab_size": manifest.vocab_size,
        "splits": {
            name: {
                "num_tokens": split.num_tokens,
                "num_documents": split.num_documents,
                "num_shards": len(split.shards),
            }
            for name, split in manifest.splits.items()
        },
    }

"""`strata cost plan`: a format for each reference of a corpus."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strata.cli.cost import (
    BankFolder,
    Cached,
    Codec,
    Model,
    Months,
    Preset,
    Profile,
    Set,
    make_setting,
    read_profile,
)
from strata.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from rich.console import Group

    from strata.explicit.memories import Reference
    from strata.theory.planner import Plan

Find = Callable[[Sequence[str]], list[list[int]]]


def plan(
    corpus: Annotated[list[Path], typer.Argument(help="files and folders", metavar="CORPUS...")],
    out: Annotated[Path, typer.Option(help="folder to make")],
    queries: Annotated[
        Path | None, typer.Option(help="log of queries (.jsonl): what was asked, or read")
    ] = None,
    zipf: Annotated[
        float | None,
        typer.Option(help="no log: uses fall as 1 / rank ** ZIPF, in the corpus' own order"),
    ] = None,
    total_uses: Annotated[
        float | None, typer.Option(help="reads over the corpus' life; default: those of the log")
    ] = None,
    budget_disk: Annotated[
        str | None, typer.Option(help="for text and memories: 10GB, 512MiB, ...")
    ] = None,
    budget_ram: Annotated[str | None, typer.Option(help="for parameters")] = None,
    budget_compute: Annotated[
        float | None, typer.Option(help="TFLOPs for training and encoding")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="folder of the tokenizer; default: the model's")
    ] = None,
    preset: Preset = "memory3_2b",
    model: Model = None,
    bank: BankFolder = None,
    codec: Codec = None,
    set_: Set = None,
    profile: Profile = None,
    cached: Cached = 0.0,
    months: Months = None,
    top_k: Annotated[int, typer.Option(help="references read for a query that is searched")] = 1,
    text_field: Annotated[str, typer.Option(help="of a row of jsonl and parquet")] = "text",
    id_field: Annotated[str | None, typer.Option(help="field that names a row's source")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Place each reference of a corpus in parameters, explicit memory or text, under budgets.

    Costs are TFLOPs, with --profile seconds, with --months money. The plan's files go to `strata
    bank add` and `strata data prepare`. A profile's disk and memory are budgets too.
    """
    from rich.console import Console

    from strata.theory.plan_files import check_out, write_plan
    from strata.theory.planner import Budgets, make_plan
    from strata.theory.uses import count_uses, zipf_uses

    if (queries is None) == (zipf is None):
        raise ConfigError("give either --queries LOG or --zipf S: how often each part is asked for")
    if zipf is not None and total_uses is None:
        raise ConfigError("--zipf needs --total-uses: how many reads there will be")
    if total_uses is not None and not 0 < total_uses < float("inf"):
        raise ConfigError(f"--total-uses {total_uses}: give more than 0")
    if top_k < 1:
        raise ConfigError(f"--top-k {top_k}: give 1 or more")
    if profile is None and (months is not None or cached):
        raise ConfigError("--months and --cached need --profile: make one with cost calibrate")
    check_out(out)
    disk, ram = parse_bytes("--budget-disk", budget_disk), parse_bytes("--budget-ram", budget_ram)
    if budget_compute is not None and not budget_compute >= 0:
        raise ConfigError(f"--budget-compute {budget_compute}: give 0 or more")
    setting = make_setting(preset, model, bank, codec, set_)
    rates = None if profile is None else read_profile(profile)
    if rates is not None:  # no plan holds more than the machine does
        disk = min(rates.disk_bytes, rates.disk_bytes if disk is None else disk)
        ram = min(rates.ram_bytes, rates.ram_bytes if ram is None else ram)
    budgets = Budgets(disk_bytes=disk, ram_bytes=ram, compute_tflops=budget_compute)
    with Console(stderr=True).status("cutting the corpus") as status:
        references, tokens = _references(
            corpus, tokenizer or model, setting.memory.reference_tokens, text_field, id_field
        )
        said: dict[str, Any] = {}
        if queries is None:
            assert zipf is not None and total_uses is not None
            distinct, merged = _distinct(references)
            uses = zipf_uses(len(distinct), exponent=zipf, total=total_uses)
        else:
            status.update("counting queries")
            with tempfile.TemporaryDirectory() as folder:
                find = _by_words(references, Path(folder), top_k)
                log = count_uses(queries, references, find=find)
            said = {"log_rows": log.rows, "log_rows_lost": log.lost}
            distinct, merged = _distinct(references)
            uses = merged(log.uses_n)
            if total_uses is not None:
                uses = uses * (total_uses / uses.sum())
        kept = [references[number] for number in distinct]
        tokens_n = tokens[distinct]
        status.update("placing")
        made = make_plan(
            setting,
            tokens_n,
            [len(reference.text.encode("utf-8")) for reference in kept],
            uses,
            budgets,
            profile=rates,
            months=months,
            cached=cached,
        )
    write_plan(out, made, kept, tokens_n=tokens_n, uses_n=uses, setting=setting, more=said)
    if said.get("log_rows_lost"):
        print(
            f"{said['log_rows_lost']:,} of {said['log_rows']:,} rows of the log name nothing of "
            "the corpus",
            file=sys.stderr,
        )
    if as_json:
        print(json.dumps({**made.to_json(), **said, "out": str(out)}))
    else:
        Console().print(_table(made, len(references) - len(kept)))
        print(_next(out, made, model))


_BYTES = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<two>i?)B?", re.IGNORECASE)


def parse_bytes(option: str, text: str | None) -> float | None:
    """10GB is 1e10, 10GiB is 10 * 2**30."""
    if text is None:
        return None
    match = _BYTES.fullmatch(text.strip())
    if match is None or (match["two"] and not match["unit"]):
        raise ConfigError(f"{option} {text!r}: give bytes as 10GB, 512MiB or 1000000")
    power = "KMGT".find(match["unit"].upper()) + 1 if match["unit"] else 0
    return float(match["number"]) * (1024 if match["two"] else 1000) ** power


def _references(
    corpus: list[Path],
    tokenizer: Path | None,
    reference_tokens: int,
    text_field: str,
    id_field: str | None,
) -> tuple[list[Reference], Any]:
    """The corpus as a bank would cut it, and tokens of each reference."""
    import numpy as np
    from transformers import AutoTokenizer

    from strata.explicit.cut import Tokens, cut
    from strata.explicit.documents import ReadReport, read_documents
    from strata.explicit.settings import ExplicitMemoryConfig

    if tokenizer is None:
        raise ConfigError("references are cut by tokens: give --model, or --tokenizer FOLDER")
    if not tokenizer.is_dir():
        raise ModelError(f"no folder {tokenizer}: give one with a tokenizer")
    try:
        opened = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"no tokenizer in {tokenizer}: {reason}") from None
    config = ExplicitMemoryConfig(reference_tokens=reference_tokens)
    read = ReadReport()
    documents = read_documents(corpus, text_field=text_field, id_field=id_field, report=read)
    references = [
        reference for document in documents for reference in cut(document, opened, config)
    ]
    for skipped in read.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}", file=sys.stderr)
    if not references:
        raise ConfigError("the corpus holds no references: nothing to place")
    ids = Tokens(opened).ids([reference.text for reference in references])
    return references, np.array([len(one) for one in ids])


def _distinct(references: Sequence[Reference]) -> tuple[list[int], Callable[[Any], Any]]:
    """The first of references of equal text, as a bank keeps them, and how to sum over each."""
    import numpy as np

    first: dict[str, int] = {}
    for number, one in enumerate(references):
        first.setdefault(one.text, number)
    places = list(first.values())
    rank = {number: at for at, number in enumerate(places)}
    group = [rank[first[one.text]] for one in references]

    def merged(values_n: Any) -> Any:
        return np.bincount(group, weights=values_n, minlength=len(places))

    return places, merged


def _by_words(references: Sequence[Reference], folder: Path, top_k: int) -> Find:
    """Searches the references by words, in a bank of texts that is made when it is needed."""

    def find(queries: Sequence[str]) -> list[list[int]]:
        from strata.explicit.bank import Bank
        from strata.explicit.documents import Document
        from strata.explicit.memories import Reference as Whole

        first: dict[str, int] = {}
        for number, reference in enumerate(references):
            first.setdefault(reference.text, number)
        texts = Bank.create(folder / "bank")
        texts.add(
            (Document(text, str(number)) for text, number in first.items()),
            cut=lambda one: [Whole(one.text, one.source, 0, len(one.text))],
        )
        return [
            [int(hit.source) for hit in texts.search(query, top_k)] if query.strip() else []
            for query in queries
        ]

    return find


def _table(made: Plan, num_twice: int) -> Group:
    from rich.console import Group
    from rich.table import Table

    from strata.explicit.sizes import readable

    table = Table(title=f"the whole corpus over its life, {made.unit}")
    table.add_column("all in", no_wrap=True)
    for column in ("parameters", "explicit", "text", "write", "read", "total", "disk", "memory",
                   "TFLOPs", "fits"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in made.rows:
        table.add_row(
            row.name,
            *(f"{count:,}" if count else "" for count in row.references.values()),
            *(f"{number:,.4g}" for number in (row.write, row.read, row.total)),
            readable(row.disk_bytes),
            readable(row.ram_bytes),
            f"{row.compute_tflops:,.4g}",
            "yes" if row.fits else "no",
        )
    sure = "No plan costs less." if made.exact else (
        f"The best plan costs at most {made.gap:.2%} less."
    )  # fmt: skip
    twice = f" {num_twice:,} references stand in the corpus twice and count once." * bool(num_twice)
    return Group(table, sure + twice)


def _next(out: Path, made: Plan, model: Path | None) -> str:
    """The commands that carry the plan out."""
    count = made.rows[0].references
    name = model or "MODEL"
    lines = [f"wrote {out}"]
    if count["explicit"]:
        lines.append(f"strata bank add BANK {out}/explicit.jsonl --id-field id --model {name}")
    if count["text"]:
        lines.append(f"strata bank add TEXTS {out}/text.jsonl --id-field id --model {name} --cold")
    if count["parameters"]:
        lines.append(f"strata data prepare {out}/parameters.jsonl --tokenizer {name} --out TOKENS")
    return "\n".join(lines)

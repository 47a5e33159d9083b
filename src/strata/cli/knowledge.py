"""`strata knowledge`: what a model knows, and what can stand in for knowing it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strata.cli.bank import AsJson, DeviceOption, ModelOption
from strata.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from rich.table import Table

    from strata.evals.knowledge import Estimate, KnowledgeSummary, WayScore
    from strata.explicit.settings import ExplicitMemoryConfig

_CARD = "reader.json"  # of a packed reader; says what its references become


def probe(
    facts: Annotated[
        Path, typer.Argument(help="questions with answers and stating texts (.jsonl, .jsonl.gz)")
    ],
    model: ModelOption,
    documents: Annotated[
        Path | None,
        typer.Option(help="file or folder of documents that the facts' `source` names, by `id`"),
    ] = None,
    wordings: Annotated[
        bool, typer.Option("--wordings", help="state facts of strata reader data in all wordings")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="settings of memories: selector=expected, tokens_per_head=16, codec=int8, ... "
            "(repeatable); default: those that the model was taught with, else the paper's",
        ),
    ] = None,
    template: Annotated[
        str, typer.Option(help=r"prompt of a question; \n is a line break")
    ] = r"Question: {question}\nAnswer:",
    limit: Annotated[int | None, typer.Option(help="first facts only")] = None,
    batch_size: Annotated[int, typer.Option(help="sequences of one forward pass")] = 32,
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option(help="folder for figures and facts")] = Path(
        "runs/knowledge"
    ),
    as_json: AsJson = False,
) -> None:
    """Sort facts into known, imitable, separable and not, by text and by explicit memory.

    Each is asked alone, behind every text that states it, and with that text's memory: known is
    what gets more than 1/2 on all answer tokens alone; a text supplies what then gets 0.9 or more
    on all. Interrupted, the same command goes on.
    """
    from rich.console import Console

    from strata.cli.device import open_model
    from strata.cli.eval import _progress, _unescape
    from strata.evals.facts import read_facts
    from strata.evals.knowledge_run import run_probe

    for name, number in (("--limit", limit), ("--batch-size", batch_size)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number}: give 1 or more")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a folder")
    texts = None if documents is None else _read_documents(documents)
    asked = read_facts(facts, template=_unescape(template), documents=texts, wordings=wordings)
    config = memory_settings(model, set_ or ())
    decoder, tokenizer = open_model(model, device=device)
    if decoder.device.type == "cpu":
        decoder.float()  # many CPUs are slow in bf16, and a reader is packed so
    with _progress("facts") as progress:
        summary = run_probe(
            decoder,
            tokenizer,
            asked[:limit],
            out=out,
            config=config,
            named=str(model),
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        print(json.dumps(asdict(summary)))
        return
    for table in tables(summary):
        Console().print(table)
    print(f"facts one by one: {out / 'facts.jsonl'}")


def memory_settings(model: Path, overrides: Any) -> ExplicitMemoryConfig:
    """What this model was taught to read, else the defaults, with `key=value` laid over.

    Raises:
        ConfigError: an unknown setting, or one that cannot be.
        ModelError: a packed reader's card is damaged.
    """
    from strata.config import apply_override, validate
    from strata.explicit.settings import ExplicitMemoryConfig

    tree = _taught(model)
    for override in overrides:
        apply_override(tree, override)
    return validate(ExplicitMemoryConfig, tree, origin="settings of memories")


def _taught(model: Path) -> dict[str, Any]:
    """Settings on a packed reader's card, or in the recipe of the run that made the model."""
    from strata.config import read_tree
    from strata.train.recipe import RECIPE_NAME

    card, recipe = model / _CARD, model.parent / RECIPE_NAME
    if card.is_file():
        try:
            return dict(json.loads(card.read_text(encoding="utf-8"))["memory"])
        except (ValueError, KeyError, TypeError):
            raise ModelError(f"{card} says no settings of memory: pack the reader again") from None
    if recipe.is_file():
        reading = read_tree(recipe).get("reading")
        memory = reading.get("memory") if isinstance(reading, dict) else None
        return dict(memory) if isinstance(memory, dict) else {}
    return {}


def _read_documents(path: Path) -> dict[str, str]:
    """Texts by their source: the field `id` of rows, the path of files."""
    from strata.explicit.documents import read_documents

    found: dict[str, str] = {}
    for document in read_documents([path], id_field="id"):
        if found.setdefault(document.source, document.text) != document.text:
            raise DataError(f"--documents {path}: two documents are called {document.source!r}")
    return found


def tables(summary: KnowledgeSummary) -> list[Table]:
    """Facts by class, ways, and what is recovered."""
    from rich.table import Table

    from strata.theory.knowledge import KINDS

    kinds = Table(title=f"{summary.num_facts:,} facts, by text and by explicit memory")
    kinds.add_column("class", no_wrap=True)
    for column in ("text", "explicit"):
        kinds.add_column(column, justify="right")
    for kind in KINDS:
        kinds.add_row(kind, f"{summary.shares[kind]:.1%}", f"{summary.shares_explicit[kind]:.1%}")
    ways = Table(
        title=f"probability of the answer; {summary.num_lacking:,} facts are lacking alone",
    )
    for column in ("way", "wording"):
        ways.add_column(column, no_wrap=True)
    for column in ("answer", "least token", "all tokens ≥ 0.9"):
        ways.add_column(column, justify="right")
    for score in summary.ways:
        ways.add_row(*_cells(score))
    recovered = Table(title="explicit memory / text, of what is lacking; 95% over facts")
    recovered.add_column("recovered", no_wrap=True)
    for column in ("share", "from", "to"):
        recovered.add_column(column, justify="right")
    recovery = summary.recovery
    for name, estimate in (
        ("supplied by memory / by text", recovery.supplied),
        ("by memory too, of what text supplies", recovery.both),
        ("gain in the answer's probability", recovery.gain),
    ):
        recovered.add_row(name, *_shown(estimate))
    return [kinds, ways, recovered]


def _cells(score: WayScore) -> tuple[str, ...]:
    wording = "" if score.way == "alone" else score.wording or "all"
    share = "" if score.supplied is None else f"{score.supplied:.1%}"
    return score.way, wording, f"{score.answer:.3f}", f"{score.least:.3f}", share


def _shown(estimate: Estimate | None) -> tuple[str, ...]:
    if estimate is None:
        return "", "", ""
    return tuple(f"{value:.3f}" for value in (estimate.value, estimate.low, estimate.high))

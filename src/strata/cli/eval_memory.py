"""`strata eval memory`: one decoder and one bank, every format of knowledge in one table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strata.cli.bank import AsJson, DeviceOption, Folder, ModelOption
from strata.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from strata.evals.memory import MemoryEvaluation


def evaluate_memory(
    bank: Folder,
    questions: Annotated[Path, typer.Argument(help="question file (.jsonl, .jsonl.gz)")],
    model: ModelOption,
    absent: Annotated[
        Path | None, typer.Option(help="questions that the bank cannot answer")
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(help="none, text, cached, dense, explicit (repeatable; default all)"),
    ] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="also explicit memories in this code (repeatable)")
    ] = None,
    refusal: Annotated[
        list[str] | None, typer.Option(help="what a model may write that does not know")
    ] = None,
    template: Annotated[
        str, typer.Option(help=r"prompt of a question; \n is a line break")
    ] = r"Question: {question}\nAnswer:",
    top_k: Annotated[int, typer.Option(help="references a question")] = 5,
    by: Annotated[
        str | None, typer.Option(help="search by vector, text, hybrid, queries; or oracle")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="first questions of each file only")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 32,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the figures and every answer")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of accuracy and first tokens")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask one decoder every question with the same references in every format.

    The oracle gives the references of a question's own `source` that hold an accepted answer.
    """
    from rich.console import Console

    from strata.cli.device import open_model
    from strata.cli.eval import _check_out, _progress, _save, _unescape
    from strata.evals.memory import FORMATS, REFUSALS, eval_memory
    from strata.evals.questions import read_questions
    from strata.explicit.bank import Bank
    from strata.explicit.source import open_retriever

    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: give 1 or more")
    for name, number in (("--top-k", top_k), ("--max-new-tokens", max_new_tokens)):
        if number < 1:
            raise ConfigError(f"{name} {number}: give 1 or more")
    for name in format or ():
        if name not in FORMATS:
            raise ConfigError(f"--format {name!r}: give some of {', '.join(FORMATS)}")
    for path in (out, plot):
        _check_out(path)
    asked = read_questions(questions, template=_unescape(template))[:limit]
    without = [] if absent is None else read_questions(absent, template=_unescape(template))[:limit]
    opened = Bank.open(bank)
    decoder, tokenizer = open_model(model, device=device)
    opened.use(decoder, tokenizer)
    kind: Any = by  # checked there
    retriever = None
    if by != "oracle":
        retriever = open_retriever(opened, kind, device=device, encoder=opened.encoder)
    with _progress("questions") as progress:
        result = eval_memory(
            decoder,
            tokenizer,
            opened,
            asked,
            retriever=retriever,
            absent=without,
            formats=format or FORMATS,
            codecs=codec or (),
            refusals=refusal or REFUSALS,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    if out is not None:
        _save(out, json.dumps(asdict(result), ensure_ascii=False, indent=1))
    if plot is not None:
        save_plot(result, plot)
    if as_json:
        print(json.dumps({k: v for k, v in asdict(result).items() if k != "records"}))
    else:
        Console().print(table(result))


def table(result: MemoryEvaluation) -> Table:
    """A row a format."""
    from rich.table import Table

    first = result.scores[0]
    shown = Table(
        title=f"{first.num_questions} questions; an answer stands in the references given for "
        f"{result.found:.1%}"
    )
    shown.add_column("format", no_wrap=True)
    for column in (
        "accuracy", "contains", "nats/answer", "hallucinated", "first token, ms", "tokens/s",
        "KiB/reference",
    ):  # fmt: skip
        shown.add_column(column, justify="right")
    for score in result.scores:
        shown.add_row(
            score.format,
            f"{score.accuracy:.1%}",
            f"{score.contains:.1%}",
            "" if score.nats_per_answer is None else f"{score.nats_per_answer:.2f}",
            "" if score.hallucinated is None else f"{score.hallucinated:.1%}",
            f"{score.ttft_ms:,.1f}",
            "" if score.tokens_per_s is None else f"{score.tokens_per_s:,.1f}",
            f"{score.kib_per_reference:,.1f}",
        )
    return shown


def save_plot(result: MemoryEvaluation, path: Path) -> None:
    """Accuracy against the time to the first token, a point a format, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for score in result.scores:
        axes.scatter(score.ttft_ms, 100 * score.accuracy, s=30)
        axes.annotate(
            score.format, (score.ttft_ms, 100 * score.accuracy), xytext=(5, 5),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set(xlabel="to the first token, ms (median)", ylabel="answered right, %", ylim=(0, None))
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{result.scores[0].num_questions} questions, one decoder", fontsize=10)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)

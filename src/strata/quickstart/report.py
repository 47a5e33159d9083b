"""What the quickstart tells: a table, answers side by side, a plot, and `report.json`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from strata.evals.recall import RecallResult
from strata.models import Counts
from strata.quickstart.bank import BankOutcome, Sourced

_COLOURS = {"memory": "#c2410c", "dense": "#475569"}


@dataclass(frozen=True)
class Point:
    """One look at a model in training: loss in nats a token, recall 0..1."""

    step: int
    loss: float
    recall: float


@dataclass(frozen=True)
class Contestant:
    """One of the two models and what was measured of it."""

    kind: str
    steps: int
    tokens_per_s: float
    counts: Counts
    recall: RecallResult
    curve: Sequence[Point]


@dataclass(frozen=True)
class Example:
    """One question, the right answer, and what each model writes."""

    question: str
    answer: str
    written: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """The whole comparison."""

    dense: Contestant
    memory: Contestant
    examples: Sequence[Example]
    bank: BankOutcome | None
    num_questions: int
    wall_s: float
    threads: int
    precision: str


def print_end(outcome: Outcome, out: Path, console: Console) -> None:
    """Print what the bank did, where everything lies and what to do next."""
    if outcome.bank is not None:
        print_bank(outcome.bank, console)
    console.print(
        f"Plot [bold]{out / 'recall.png'}[/], numbers [bold]{out / 'report.json'}[/], "
        f"models [bold]{out / 'memory' / 'model'}[/] and [bold]{out / 'dense' / 'model'}[/]; "
        f"{outcome.wall_s:.0f} s in all.\n\n"
        "What next\n"
        f'  strata generate {out}/memory/model "The capital of Peru is"\n'
        f"  strata eval {out}/memory/model --recall {out}/questions.jsonl\n"
        "  strata train recipes/pkplus_373m_1024k.yaml --dry-run\n"
        f"{_bank_verbs(outcome.bank)}"
        "  README.md: put memory layers into a model of your own",
        highlight=False,
        soft_wrap=True,
    )


def print_bank(bank: BankOutcome, console: Console) -> None:
    """Print what the bank did, and some answers."""
    console.print(with_bank(bank))
    console.print(sourced(bank.examples))
    given = "one reference" if bank.top_k == 1 else f"one of {bank.top_k} references"
    console.print(
        f"The answer stands in {given} found for {bank.found:.1%} of the questions. All ways get "
        "the same ones; times are medians of single questions, searching included.",
        soft_wrap=True,
    )


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """The contents of `report.json`."""
    both = {"memory": outcome.memory, "dense": outcome.dense}
    counts = ("params_total", "params_dense", "params_values", "params_active")
    return {
        "closed_book": {
            **{kind: one.recall.exact for kind, one in both.items()},
            "num_questions": outcome.num_questions,
            "nats_per_answer": {kind: one.recall.nats_per_answer for kind, one in both.items()},
        },
        "tokens_per_s": {kind: one.tokens_per_s for kind, one in both.items()},
        "flops_per_token": {kind: one.counts.flops_per_token for kind, one in both.items()},
        **{
            name: {kind: getattr(one.counts, name) for kind, one in both.items()} for name in counts
        },
        "steps": outcome.memory.steps,
        "curve": {kind: [vars(point) for point in one.curve] for kind, one in both.items()},
        "examples": [vars(example) for example in outcome.examples],
        "explicit": None if outcome.bank is None else asdict(outcome.bank),
        "wall_s": outcome.wall_s,
        "threads": outcome.threads,
        "precision": outcome.precision,
        "machine": platform.processor() or platform.machine(),
    }


def write_json(outcome: Outcome, path: Path) -> None:
    """Write `report.json`; its presence marks a finished quickstart."""
    path.write_text(json.dumps(as_dict(outcome), indent=2, ensure_ascii=False) + "\n", "utf-8")


def save_plot(outcome: Outcome, path: Path) -> None:
    """Draw recall and loss over training steps, both models, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for one in (outcome.memory, outcome.dense):
        steps = [point.step for point in one.curve]
        style = {"color": _COLOURS[one.kind], "label": one.kind, "marker": "o", "markersize": 3}
        left.plot(steps, [100 * point.recall for point in one.curve], **style)
        right.plot(steps, [point.loss for point in one.curve], **style)
    left.set(xlabel="training step", ylabel="recall, %", ylim=(0, None))
    left.set_title(f"{outcome.num_questions:,} facts, asked in a held-out wording", fontsize=10)
    right.set(xlabel="training step", ylabel="training loss, nats a token", ylim=(0, None))
    right.set_title("loss on the same batches", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def comparison(memory: Contestant, dense: Contestant) -> Table:
    """The two models side by side."""
    num_questions = len(memory.recall.questions)
    table = Table(title=f"{num_questions:,} facts asked, equal data, steps and active FLOPs")
    table.add_column("")
    for column in ("memory", "dense", "memory / dense"):
        table.add_column(column, justify="right")

    def row(name: str, form: str, ours: float, control: float) -> None:
        ratio = f"{ours / control:.2f}" if control else "-"
        table.add_row(name, form.format(ours), form.format(control), ratio)

    row("facts recalled", "{:.1%}", memory.recall.exact, dense.recall.exact)
    row("nats per answer", "{:.2f}", memory.recall.nats_per_answer, dense.recall.nats_per_answer)
    row("training tokens/s", "{:,.0f}", memory.tokens_per_s, dense.tokens_per_s)
    row(
        "forward FLOPs per token",
        "{:,.0f}",
        memory.counts.flops_per_token,
        dense.counts.flops_per_token,
    )
    row("parameters, active", "{:,.0f}", memory.counts.params_active, dense.counts.params_active)
    row("parameters, total", "{:,.0f}", memory.counts.params_total, dense.counts.params_total)
    return table


def answers(examples: Sequence[Example]) -> Table:
    """What both models write."""
    table = Table(title="Some answers, in question order, not chosen")
    for column in ("question", "right", "memory", "dense"):
        table.add_column(column)
    for example in examples:
        cells = []
        for kind in ("memory", "dense"):
            text = example.written[kind]
            cells.append(f"[green]{_escape(text)}[/]" if text == example.answer else _escape(text))
        table.add_row(_escape(example.question), _escape(example.answer), *cells)
    return table


def with_bank(bank: BankOutcome) -> Table:
    """What a bank does for answers, and what it costs: nothing, text and memories side by side."""
    untold = " it was never taught about" if bank.learned else ""
    table = Table(title=f"{bank.num_questions} facts on {bank.documents} countries{untold}")
    table.add_column("given")
    names = {
        "none": "nothing",
        "text": "text",
        "explicit": "memories",
        "explicit_vq": "memories, VQ",
    }
    for name in bank.accuracy:
        table.add_column(names[name], justify="right")

    def row(name: str, form: str, values: Mapping[str, float | None]) -> None:
        cells = (values.get(kind) for kind in bank.accuracy)
        table.add_row(name, *("" if value is None else form.format(value) for value in cells))

    row("answered right", "{:.1%}", bank.accuracy)
    row("first token, ms", "{:.1f}", bank.ttft_ms)
    row("tokens/s", "{:,.0f}", bank.tokens_per_s)
    row("KiB a reference", "{:.1f}", bank.kib_per_reference)
    return table


def sourced(examples: Sequence[Sourced]) -> Table:
    """Answers with the reference that says what was written."""
    table = Table(title="Some answers, in question order, not chosen")
    for column in ("question", "right", "text", "memories", "who says so", "what it says"):
        table.add_column(column)
    for one in examples:
        said = one.text if len(one.text) <= 120 else one.text[:120] + "..."
        source = "no reference given" if one.source is None else one.source
        cells = [_escape(one.written[name]) for name in ("text", "explicit")]
        cells = [f"[green]{text}[/]" if text == _escape(one.answer) else text for text in cells]
        asked, right, said = map(_escape, (one.question, one.answer, " ".join(said.split())))
        table.add_row(asked, right, *cells, _escape(source), said)
    return table


def _bank_verbs(bank: BankOutcome | None) -> str:
    if bank is None:
        return ""
    asked = bank.examples[0].question
    quoted = "Question: {}\\nAnswer:".format(asked.replace("'", "\\'"))  # for $'...' of a shell
    return (
        f'  strata bank search {bank.bank} "{asked}"\n'
        f"  strata ask {bank.bank} $'{quoted}' --model {bank.reader} --max-new-tokens 8\n"
    )


def _escape(text: str) -> str:
    return text.replace("[", r"\[")

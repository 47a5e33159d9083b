"""A quickstart: two models on the same facts, and a reader with a bank."""

from __future__ import annotations

from functools import partial

from strata.report import pictures
from strata.report.parts import Cell, Picture, Section, Table, count, number, share, words
from strata.report.source import Node, Run
from strata.report.training import METRICS_NAME, training_section

REPORT_NAME = "report.json"
_KINDS = ("memory", "dense")
_GIVEN = {"none": "nothing", "text": "text", "explicit": "memories", "explicit_vq": "memories, VQ"}


def quickstart_sections(run: Run, *, name: str) -> list[Section]:
    """Sections of a folder of `strata quickstart` that is finished.

    Args:
        run: the folder.
        name: of its pictures.
    """
    tree = run.json(REPORT_NAME)
    sections = [_twins(tree, run, name)]
    if tree["explicit"].value is not None:
        sections.append(_bank(tree["explicit"], run))
    trained = [run.below(kind) for kind in _KINDS if (run.path / kind / METRICS_NAME).is_file()]
    if trained:
        title = f"Training of {run.label}"
        sections.append(training_section(trained, name=f"{name}-training", title=title))
    return sections


def _twins(tree: Node, run: Run, name: str) -> Section:
    closed = tree["closed_book"]
    nats = closed["nats_per_answer"]
    rows = [
        (Cell("facts recalled"), *(share(closed[kind]) for kind in _KINDS)),
        (Cell("nats per answer"), *(number(nats[kind], "{:.2f}") for kind in _KINDS)),
        *(
            (Cell(says), *(count(tree[key][kind]) for kind in _KINDS))
            for key, says in (
                ("tokens_per_s", "training tokens/s"),
                ("flops_per_token", "forward FLOPs per token"),
                ("params_active", "parameters, active"),
                ("params_values", "parameters, value tables"),
                ("params_total", "parameters, total"),
            )
        ),
    ]  # fmt: skip
    asked = count(closed["num_questions"]).text
    parts: list[Table | Picture] = [
        Table("Memory layers and their dense twin", ("", *_KINDS), rows, f"{asked} facts asked."),
        *(
            _curve(tree["curve"], key, f"{name}-{key}", title, y, is_share)
            for key, title, y, is_share in (
                ("recall", "Facts recalled while training", "share of facts", True),
                ("loss", "Loss on the same batches", "nats a token", False),
            )
        ),
        _examples(tree["examples"], _KINDS),
    ]
    return Section(f"{run.label}: two models, the same facts", "", parts)


def _curve(tree: Node, key: str, name: str, title: str, y: str, is_share: bool) -> Picture:
    nodes = {kind: [(at["step"], at[key]) for at in tree[kind]] for kind in _KINDS}
    lines = {
        kind: [(x.number or 0.0, value.number or 0.0) for x, value in points]
        for kind, points in nodes.items()
        if points
    }
    ends = ", ".join(f"{kind} {points[-1][1]:.3g}" for kind, points in lines.items())
    return Picture(
        name,
        title,
        partial(pictures.curves, lines, x="training step", y=y, share=is_share),
        [node.place for points in nodes.values() for point in points for node in point],
        f"{title}, in the end: {ends}.",
    )


def _examples(tree: Node, ways: tuple[str, ...]) -> Table:
    rows = [
        (
            words(one["question"]), words(one["answer"]),
            *(
                words(one["written"][way],
                      right=one["written"][way].value == one["answer"].value)
                for way in ways
            ),
        )
        for one in tree
    ]  # fmt: skip
    return Table("Some answers, in question order, not chosen", ("question", "right", *ways), rows)


def _bank(tree: Node, run: Run) -> Section:
    ways = [way for way, _ in tree["accuracy"].items()]
    forms = (
        ("accuracy", "answered right", share),
        ("ttft_ms", "first token, ms", partial(number, form="{:,.1f}")),
        ("tokens_per_s", "tokens/s", partial(number, form="{:,.0f}")),
        ("kib_per_reference", "KiB a reference", partial(number, form="{:,.1f}")),
    )
    rows = [(Cell(says), *(form(tree[key][way]) for way in ways)) for key, says, form in forms]
    sizes = [
        (Cell(says), form(tree[key]))
        for key, says, form in (
            ("documents", "documents", count), ("references", "references", count),
            ("num_questions", "questions", count), ("top_k", "references given with each", count),
            ("found", "an answer stands in one of them", share),
        )
    ]  # fmt: skip
    columns = ("", *(_GIVEN.get(way, way) for way in ways))
    said = [
        (
            words(one["question"]), words(one["answer"]),
            *(
                words(one["written"][way],
                      right=one["written"][way].value == one["answer"].value)
                for way in ("text", "explicit")
            ),
            words(one["source"]) if one["source"].value else Cell("no reference given"),
            words(one["text"]),
        )
        for one in tree["examples"]
    ]  # fmt: skip
    return Section(
        f"{run.label}: a reader with a bank",
        f"{tree['reader'].value} asked with {tree['bank'].value}.",
        [
            Table("The same references, given in each way", columns, rows),
            Table("What was asked", ("", "number"), sizes),
            Table(
                "Answers and their sources",
                ("question", "right", "text", "memories", "who says so", "what it says"),
                said,
                "In question order, not chosen. The source is the first reference given that says "
                "what was written with memories.",
            ),
        ],
    )

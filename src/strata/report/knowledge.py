"""A knowledge probe: classes, what each way gives, what memory recovers, and facts one by one."""

from __future__ import annotations

import math
from functools import partial

from strata.errors import DataError
from strata.report import pictures
from strata.report.parts import Cell, Picture, Section, Table, number, share, words
from strata.report.source import Node, Run

SUMMARY_NAME = "knowledge.json"
FACTS_NAME = "facts.jsonl"
_KINDS = ("known", "imitable", "separable", "not")
_MEANS = {
    "known": "every answer token gets more than 1/2 alone",
    "imitable": "every wording brings every token to 0.9",
    "separable": "some wording does, not every one",
    "not": "none of these wordings does",
}
_RECOVERED = {
    "supplied": "pairs supplied by memory / by text",
    "both": "of the pairs that text supplies, memory too",
    "gain": "gain in the answer's probability, memory / text",
}


def knowledge_section(run: Run, *, name: str, title: str, answers: int) -> Section:
    """A folder of `strata knowledge probe`.

    Args:
        run: the folder.
        name: of its pictures.
        title: of the section.
        answers: facts that are shown.

    Raises:
        DataError: its files are something else.
    """
    tree, facts = run.json(SUMMARY_NAME), run.lines(FACTS_NAME)
    if tree["num_facts"].number is None or not isinstance(tree["shares"].value, dict):
        raise DataError(f"{tree.place} has no shares: is it of strata knowledge probe?")
    num_facts, lacking = (tree[key].number or 0 for key in ("num_facts", "num_lacking"))
    parts: list[Table | Picture] = [_shares(tree, name), _kinds(tree), _ways(tree), _recovery(tree)]
    if facts:
        parts.append(_against(facts, name))
        if answers:
            parts.append(_facts(facts, answers))
    about = f"{num_facts:,.0f} facts, of which the model alone lacks {lacking:,.0f}."
    return Section(title, about, parts)


def _shares(tree: Node, name: str) -> Picture:
    by = {"text": tree["shares"], "explicit memory": tree["shares_explicit"]}
    groups = {
        kind: {way: shares[kind].number or 0.0 for way, shares in by.items()} for kind in _KINDS
    }
    says = ", ".join(f"{kind} {share(tree['shares'][kind]).text}" for kind in _KINDS)
    return Picture(
        f"{name}-classes",
        "Facts by class",
        partial(pictures.bars, groups, y="share of facts"),
        [shares[kind].place for shares in by.values() for kind in _KINDS],
        f"By text: {says}.",
    )


def _kinds(tree: Node) -> Table:
    rows = [
        (Cell(kind), share(tree["shares"][kind]), share(tree["shares_explicit"][kind]),
         Cell(_MEANS[kind]))
        for kind in _KINDS
    ]  # fmt: skip
    return Table("Classes", ("class", "by text", "by explicit memory", "which is"), rows)


def _ways(tree: Node) -> Table:
    rows = [
        (
            words(way["way"]),
            words(way["wording"]) if way["wording"].value else Cell("all"),
            number(way["answer"]), number(way["least"]), share(way["supplied"]),
        )
        for way in tree["ways"]
    ]  # fmt: skip
    return Table(
        "Probability of the answer",
        ("way", "wording", "whole answer", "least likely token", "all tokens ≥ 0.9"),
        rows,
        "Means over facts; the last column over facts that the model alone lacks.",
    )


def _recovery(tree: Node) -> Table:
    rows = [
        (Cell(says), *(number(tree["recovery"][key][part]) for part in ("value", "low", "high")))
        for key, says in _RECOVERED.items()
    ]
    return Table(
        "What explicit memory recovers of what text recovers",
        ("measure", "share", "95% from", "to"),
        rows,
        "Facts that the model alone lacks; intervals by a bootstrap over facts.",
    )


def _against(facts: list[Node], name: str) -> Picture:
    points, places = [], []
    for fact in facts:
        for wording, tokens in fact["text"].items():
            memory = fact["explicit"][wording]
            points.append((_product(tokens), _product(memory)))
            places += [tokens.place, memory.place]
    above = sum(memory > text for text, memory in points)
    return Picture(
        f"{name}-text-memory",
        "Each fact and wording: probability of the answer",
        partial(pictures.scatter, points, x="behind the text", y="with its explicit memory"),
        places,
        f"Memory gives more than text in {above:,} of {len(points):,} pairs.",
    )


def _facts(facts: list[Node], most: int) -> Table:
    shown = facts[:most]
    rows = []
    for fact in shown:
        wordings = list(fact["text"].items())
        for place, (wording, tokens) in enumerate(wordings):
            first = place == 0
            rows.append((
                words(fact["prompt"]) if first else Cell(""),
                words(fact["answer"]) if first else Cell(""),
                words(fact["kind"]) if first else Cell(""),
                _least(fact["alone"]) if first else Cell(""),
                Cell(wording, tokens.place), _least(tokens), _least(fact["explicit"][wording]),
            ))  # fmt: skip
    return Table(
        "Facts one by one",
        ("asked", "answer", "class", "alone", "stated by", "text", "memory"),
        rows,
        f"The first {len(shown):,} of {len(facts):,}, in order, not chosen; numbers are the "
        "probability of the least likely answer token.",
        folded=True,
    )


def _product(tokens: Node) -> float:
    return math.prod(token.number or 0.0 for token in tokens)


def _least(tokens: Node) -> Cell:
    nodes = list(tokens)
    return number(min(nodes, key=lambda node: node.number or 0.0)) if nodes else Cell("-")

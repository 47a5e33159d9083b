"""What `strata eval` measured of a model."""

from __future__ import annotations

from strata.report.parts import Section, Table, count, number, words
from strata.report.source import Node


def evaluation_section(tree: Node, *, title: str) -> Section:
    """One evaluation: a row a figure.

    Args:
        tree: what `strata eval --out` writes.
        title: of the section.
    """
    rows = [
        (
            words(measure["source"]), words(measure["metric"]), number(measure["value"], "{:.4f}"),
            number(measure["stderr"], "{:.4f}"), count(measure["num_samples"]),
            count(measure["num_fewshot"]),
        )
        for measure in tree["measures"]
    ]  # fmt: skip
    columns = ("source", "metric", "value", "standard error", "samples", "shots")
    return Section(title, f"Of {tree['model'].value}.", [Table("Figures", columns, rows)])

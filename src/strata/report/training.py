"""Training runs: curves, what they came to, memory health, and how they were set up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from strata.config import read_tree
from strata.report import pictures
from strata.report.parts import Cell, Picture, Section, Table, count, number, share
from strata.report.source import Node, Run

METRICS_NAME = "metrics.jsonl"
RECIPE_NAME = "recipe.yaml"
_MOST_SAID = 6  # lines whose first and last values are said
_HEALTH = {
    "rows_used": "share of rows in use",
    "entropy": "evenness of use, 1 is even",
    "hottest": "share of picks of the hottest row",
}


def training_section(runs: Sequence[Run], *, name: str, title: str) -> Section:
    """One section for runs that are compared.

    Args:
        runs: folders of `strata train`, at least one.
        name: of its pictures.
        title: of the section.
    """
    records = {run.label: run.lines(METRICS_NAME) for run in runs}
    begun = {label: lines for label, lines in records.items() if lines}
    parts: list[Table | Picture] = [_numbers(records)]
    short = _short_names(list(begun))
    drawn = {short[label]: lines for label, lines in begun.items()}
    if begun:
        parts += _curves(drawn, name)
    health = [table for table in map(_health_table, begun.items()) if table is not None]
    if health:
        parts += _health_curves(drawn, name)
        parts += health
    parts += _recipes(runs)
    about = ""
    if len(begun) < len(records):
        idle = ", ".join(label for label, lines in records.items() if not lines)
        about = f"Nothing was logged yet by {idle}."
    elif not health:
        about = "No record of memory health: no layer has a table, or run.health_every is null."
    return Section(title, about, parts)


def _numbers(records: dict[str, list[Node]]) -> Table:
    columns = ("run", "step", "tokens", "loss", "validation loss", "learning rate", "tokens/s")
    rows = []
    for label, lines in records.items():
        last = lines[-1] if lines else Node({}, "")
        validated = next(
            (n for n in reversed(lines) if n["validation_loss"].value is not None), last
        )
        rows.append((
            Cell(label), count(last["step"]), count(last["tokens"]), number(last["loss"], "{:.4f}"),
            number(validated["validation_loss"], "{:.4f}"), number(last["lr"], "{:.2e}"),
            count(last["tokens_per_s"]),
        ))  # fmt: skip
    return Table("The newest record of each run", columns, rows, "Losses are nats a token.")


def _curves(records: dict[str, list[Node]], name: str) -> list[Picture]:
    loss: dict[str, list[tuple[Node, Node]]] = {}
    dashed = []
    for label, lines in records.items():
        loss[label] = _points(lines, lambda line: line["loss"])
        validated = _points(lines, lambda line: line["validation_loss"])
        if validated:
            dashed.append(f"{label}, validation")
            loss[dashed[-1]] = validated
    speed = {label: _points(n, lambda line: line["tokens_per_s"]) for label, n in records.items()}
    y = "nats a token (dashed: validation)" if dashed else "nats a token"
    drawn = [
        _picture(f"{name}-loss", "Loss", loss, y, dashed=dashed),
        _picture(f"{name}-speed", "Speed", speed, "tokens/s"),
    ]
    return [picture for picture in drawn if picture is not None]


def _health_curves(records: dict[str, list[Node]], name: str) -> list[Picture]:
    drawn = []
    for key, says in _HEALTH.items():
        lines: dict[str, list[tuple[Node, Node]]] = {}
        for label, found in records.items():
            layers = dict.fromkeys(layer for line in found for layer, _ in line["health"].items())
            for layer in layers:
                shown = _short(layer) if len(records) == 1 else f"{label}, {_short(layer)}"
                pick: Callable[[Node], Node] = partial(_health_of, layer=layer, key=key)
                lines[shown] = _points(found, pick)
        title, stem = f"Memory health: {says}", f"{name}-{key.replace('_', '-')}"
        picture = _picture(stem, title, lines, says, share=key != "hottest")
        if picture is not None:
            drawn.append(picture)
    return drawn


def _health_of(line: Node, *, layer: str, key: str) -> Node:
    return line["health"][layer][key]


def _health_table(run: tuple[str, list[Node]]) -> Table | None:
    """Each layer's newest record."""
    label, lines = run
    last = next((line for line in reversed(lines) if line["health"].value), None)
    if last is None:
        return None
    rows = [
        (
            Cell(_short(layer)), share(of["rows_used"]), number(of["entropy"]),
            number(of["kl_nats"]), number(of["hottest"], "{:.2%}"), count(of["picks"]),
        )
        for layer, of in last["health"].items()
    ]  # fmt: skip
    step = last["step"].number
    return Table(
        f"Memory health of {label}, step {step:,.0f}" if step is not None else label,
        ("layer", "rows used", "evenness", "from even, nats", "hottest row", "picks"),
        rows,
        "Of the picks since the record before.",
    )


def _recipes(runs: Sequence[Run]) -> list[Table]:
    """The settings of one run, or those in which several differ."""
    trees = {
        run.label: (_flat(read_tree(run.path / RECIPE_NAME)), f"{run.label}/{RECIPE_NAME}")
        for run in runs
        if (run.path / RECIPE_NAME).is_file()
    }
    if not trees:
        return []
    keys = list(dict.fromkeys(key for tree, _ in trees.values() for key in tree))
    if len(trees) > 1:
        keys = [k for k in keys if len({str(tree.get(k)) for tree, _ in trees.values()}) > 1]
    rows = [
        (
            Cell(key),
            *(
                Cell("-") if tree.get(key) is None else Cell(str(tree[key]), f"{file}#{key}")
                for tree, file in trees.values()
            ),
        )
        for key in keys
    ]
    title = "Recipe" if len(trees) == 1 else "Where the recipes differ"
    return [Table(title, ("key", *trees), rows, folded=True)]


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def _points(lines: Sequence[Node], pick: Callable[[Node], Node]) -> list[tuple[Node, Node]]:
    """Where a record has a value: tokens read by then, or steps, and the value."""
    key = "tokens" if all(line["tokens"].value is not None for line in lines) else "step"
    found = [(line[key], pick(line)) for line in lines]
    return [(x, y) for x, y in found if x.number is not None and y.number is not None]


def _picture(
    name: str,
    title: str,
    lines: dict[str, list[tuple[Node, Node]]],
    y: str,
    *,
    dashed: Sequence[str] = (),
    share: bool = False,
) -> Picture | None:
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return None
    steps = any(points[0][0].place.endswith("/step") for points in lines.values())
    scale, x = (1.0, "step") if steps else (1e6, "tokens read, millions")
    drawn = {
        label: [((at.number or 0.0) / scale, value.number or 0.0) for at, value in points]
        for label, points in lines.items()
    }
    places = [node.place for points in lines.values() for point in points for node in point]
    ends = "; ".join(
        f"{label} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for label, points in drawn.items()
    )
    if len(drawn) > _MOST_SAID:
        ends = ", ".join(label for label in drawn if label not in dashed)
    draw = partial(pictures.curves, drawn, x=x, y=y, dashed=dashed, share=share)
    return Picture(name, title, draw, places, f"{title}: {ends}.")


def _short_names(labels: Sequence[str]) -> dict[str, str]:
    """Last parts of labels where these tell them apart, for a picture has little room."""
    short = {label: label.rpartition("/")[2] for label in labels}
    return short if len(set(short.values())) == len(short) else {label: label for label in labels}


def _short(layer: str) -> str:
    """A layer's number where its name has one."""
    numbers = [part for part in layer.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else layer

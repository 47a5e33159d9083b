"""Tables and pictures of `reading_study.py`: numbers of arms, and how they came to be."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.reader.curves import Look, read_looks
from strata.train import read_metrics

Number = Callable[["Result"], float | None]
OfArm = Callable[[str, "Result"], float | None]

# Columns behind the probe's ways: a number's name in `also`, what it is called, whether a share.
_OF_ABLATIONS = (
    ("rows_answers", "rows", True),
    ("rows_answer_loss", "rows, nats", False),
    ("unread_answers", "unread rows", True),
    ("unread_answer_loss", "unread rows, nats", False),
    ("rows_read", "read by a chunk", False),
)
_OF_STAGES = (
    ("text_answers", "text rows", True),
    ("text_answer_loss", "text rows, nats", False),
    ("memory_answers", "memory rows", True),
    ("memory_answer_loss", "memory rows, nats", False),
    ("unread_answers", "unread rows", True),
    ("unread_answer_loss", "unread rows, nats", False),
)
_LEGEND = (
    "none, text_N, memory_N: share of held-out questions answered exactly, alone or given N "
    "references as text or as memories, the one that answers among them. Rows: share of the "
    "answers in validation rows that are given right, token for token after those before them, "
    "and nats a token of an answer; unread rows are the same ones without their memories. With "
    "several seeds: the mean (least to most). What stands in text is asked once where no arm is "
    "trained."
)


@dataclass(frozen=True)
class Result:
    """What came of an arm.

    Attributes:
        arm: its name.
        folder: of the run.
        stages: folders of its stages, in order; none of an arm that was not trained.
        tree: of its `result.json`.
    """

    arm: str
    folder: Path
    stages: tuple[Path, ...]
    tree: Mapping[str, Any]

    @property
    def is_trained(self) -> bool:
        """Not only asked."""
        return bool(self.tree["trained"])

    def exact(self, way: str) -> float | None:
        """Share of questions answered exactly in a way; None if it was not asked."""
        return self.tree["exact"].get(way)

    def also(self, name: str) -> float | None:
        """A number that was measured beside the probe."""
        return self.tree["also"].get(name)


@dataclass(frozen=True)
class Column:
    """A number of each arm, and how it is shown."""

    title: str
    of: Number
    is_share: bool


def write_ablations(
    out: Path,
    header: Mapping[str, Any],
    results: Sequence[Result],
    studies: Mapping[str, Mapping[str, Any]],
    notes: Mapping[str, str],
) -> list[Path]:
    """OUT/results.md and .json, and OUT/STUDY.png for each ablation of which two arms are done.

    Args:
        out: the folder.
        header: what the numbers are of.
        results: of arms named STUDY/ARM.
        studies: arms by study, in order; others are left out.
        notes: what is to be known of a study, above its tables.

    Returns:
        What was written.
    """
    lines, tables, written = _head(header, results), {}, []
    for study, arms in studies.items():
        mine = {name: [r for r in results if r.arm == f"{study}/{name}"] for name in arms}
        if len([found for found in mine.values() if found]) < 2:
            continue  # at most the arm that all ablations share
        lines += ["", f"## {study.replace('_', ' ')}"]
        lines += ["", notes[study]] if study in notes else []
        tables[study] = {}
        for title, trained in (("trained so", True), ("only asked so", False)):
            part = {name: [r for r in found if r.is_trained == trained] for name, found in
                    mine.items()}  # fmt: skip
            part = {name: found for name, found in part.items() if found}
            if part:
                columns = _columns(part, _OF_ABLATIONS)
                lines += ["", *table(part, columns, corner=title)]
                tables[study][title] = numbers(part, columns)
        written.append(_draw_arms(out / f"{study}.png", study, mine))
        lines += ["", f"![{study}]({study}.png)"]
    return [*_write(out, header, results, lines, tables), *written]


def write_stages(out: Path, header: Mapping[str, Any], results: Sequence[Result]) -> list[Path]:
    """OUT/results.md and .json, OUT/stages.png (losses, accuracy) and OUT/stages_ways.png.

    Returns:
        What was written.
    """
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    lines, tables, written = _head(header, results), {}, []
    if arms:
        columns = _columns(arms, _OF_STAGES)
        lines += ["", "## At the end", "", *table(arms, columns, corner="arm")]
        tables["end"] = numbers(arms, columns)
        looks = {name: [read_looks(r.folder) for r in found] for name, found in arms.items()}
        written.append(_draw_stages(out / "stages.png", arms, looks))
        written.append(_draw_ways(out / "stages_ways.png", looks))
        lines += ["", "## By tokens", "", "![losses and accuracy](stages.png)"]
        lines += ["", "![each way to ask](stages_ways.png)"]
    return [*_write(out, header, results, lines, tables), *written]


def table(
    arms: Mapping[str, Sequence[Result]], columns: Sequence[Column], *, corner: str
) -> list[str]:
    """Lines of a markdown table, a row an arm."""
    lines = [
        f"| {corner} | seeds | {' | '.join(column.title for column in columns)} |",
        f"|---|---:|{'---:|' * len(columns)}",
    ]
    for name, results in arms.items():
        seeds = len([r for r in results if r.is_trained]) or "-"
        cells = [_cell([column.of(r) for r in results], column.is_share) for column in columns]
        lines.append(f"| {name.replace('_', ' ')} | {seeds} | {' | '.join(cells)} |")
    return lines


def numbers(
    arms: Mapping[str, Sequence[Result]], columns: Sequence[Column]
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, least and most of each column, by arm and column; what was not measured is left out."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, results in arms.items():
        found[name] = {}
        for column in columns:
            values = [value for r in results if (value := column.of(r)) is not None]
            if values:
                mean = statistics.fmean(values)
                found[name][column.title] = {
                    "mean": mean, "least": min(values), "most": max(values), "runs": len(values),
                }  # fmt: skip
    return found


def _columns(
    arms: Mapping[str, Sequence[Result]], also: Sequence[tuple[str, str, bool]]
) -> list[Column]:
    ways = dict.fromkeys(way for found in arms.values() for r in found for way in r.tree["exact"])
    order = sorted(ways, key=_order)
    columns = [Column(way, lambda r, way=way: r.exact(way), True) for way in order]
    return columns + [
        Column(title, lambda r, name=name: r.also(name), share) for name, title, share in also
    ]


def _order(way: str) -> tuple[int, int]:
    kind, _, number = way.partition("_")
    return ("none", "text", "memory").index(kind), int(number or 0)


def _cell(values: Sequence[float | None], is_share: bool) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    show = (lambda x: f"{100 * x:.1f}") if is_share else (lambda x: f"{x:.2f}")
    unit = "%" if is_share else ""
    spread = f" ({show(min(known))} to {show(max(known))})" if len(known) > 1 else ""
    return f"{show(statistics.fmean(known))}{unit}{spread}"


def _head(header: Mapping[str, Any], results: Sequence[Result]) -> list[str]:
    trees = [r.tree for r in results]
    seeds = sorted({tree["seed"] for tree in trees if tree["seed"] is not None})
    steps = sorted({tree["steps"] for tree in trees if tree["trained"]})
    tokens = sorted({tree["tokens"] for tree in trees if tree["trained"]})
    data = sorted({tree["data_sha256"] for tree in trees})
    model = header["model_sha256"]
    lines = [f"# Reading: {header['study']}", "", "```", *header["commands"], "```", ""]
    lines += [f"- model: {f'weights {model}' if model else 'from scratch'}"]
    lines += [f"- data: {', '.join(data) or '-'}"]
    lines += [f"- seeds: {', '.join(map(str, seeds)) or '-'}"]
    lines += [f"- steps: {', '.join(f'{n:,}' for n in steps) or '-'}"]
    lines += [f"- tokens: {', '.join(f'{n:,}' for n in tokens) or '-'}"]
    asked = sorted({tree["questions"] for tree in trees})
    lines += [f"- questions: {', '.join(map(str, asked)) or '-'}; torch {header['torch']}, "
              f"{header['threads']} threads"]  # fmt: skip
    return [*lines, "", _LEGEND]


def _write(
    out: Path,
    header: Mapping[str, Any],
    results: Sequence[Result],
    lines: Sequence[str],
    tables: Mapping[str, Any],
) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    text, tree = out / "results.md", out / "results.json"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    runs = [{"arm": r.arm, **r.tree} for r in results]
    whole = {**header, "tables": tables, "runs": runs}
    tree.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [text, tree]


# Pictures


def _figure(columns: int, *, rows: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (4.6 * columns, 3.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes.flatten()


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)
    return path


def _draw_arms(path: Path, study: str, arms: Mapping[str, Sequence[Result]]) -> Path:
    """Shares and nats by arm; dashed where arms were only asked."""
    figure, (shares, nats) = _figure(2)
    for number, way in enumerate(("memory_1", "memory_5")):
        _draw_means(shares, arms, lambda name, r, way=way: r.exact(way), f"C{number}", way)
    _draw_means(shares, arms, lambda name, r: r.also("rows_answers"), "C2", "rows")
    if all(r.exact(f"memory_{name}") is not None for name, found in arms.items() for r in found):
        _draw_means(
            shares, arms, lambda name, r: r.exact(f"memory_{name}"), "C3", "memory, as many"
        )
    for number, rows in ((2, "rows"), (4, "unread_rows")):
        key = f"{rows.removesuffix('_rows')}_answer_loss"
        _draw_means(nats, arms, lambda name, r, key=key: r.also(key), f"C{number}", rows)
    shares.set(ylabel="answered exactly", ylim=(0, 1))
    nats.set(ylabel="answers in rows, nats a token")
    for axes in (shares, nats):
        axes.set_xticks(range(len(arms)), [name.replace("_", "\n") for name in arms])
        axes.set(xlabel=study.replace("_", " "))
        axes.legend(frameon=False, fontsize=7)
    return _save(figure, path)


def _draw_means(
    axes: Any, arms: Mapping[str, Sequence[Result]], of: OfArm, color: str, label: str
) -> None:
    """Means of the runs of each arm, with a bar from the least to the most."""
    label = label.replace("_", " ")
    for trained in (True, False):
        places, means, below, above = [], [], [], []
        for place, (name, found) in enumerate(arms.items()):
            given = [of(name, r) for r in found if r.is_trained == trained]
            known = [value for value in given if value is not None]
            if known:
                mean = statistics.fmean(known)
                places.append(place)
                means.append(mean)
                below.append(mean - min(known))
                above.append(max(known) - mean)
        if places:
            axes.errorbar(
                places, means, yerr=(below, above), color=color, marker="o", markersize=4,
                capsize=3, linestyle="-" if trained else "--", linewidth=1,
                fillstyle="full" if trained else "none",
                label=label if trained else f"{label}, only asked",
            )  # fmt: skip


Looks = Mapping[str, Sequence[Sequence[Look]]]


def _draw_stages(path: Path, arms: Mapping[str, Sequence[Result]], looks: Looks) -> Path:
    """Losses and accuracy of all arms by tokens."""
    figure, (own, held, exact) = _figure(3)
    for number, (name, results) in enumerate(arms.items()):
        color, label = f"C{number}", name.replace("_", " ")
        _band(own, [_training(r) for r in results], color, label=label)
        for key, style, kind in (("text", "--", "text"), ("memory", "-", "memory")):
            points = [
                [(x.tokens, x.also[f"{key}_answer_loss"]) for x in run] for run in looks[name]
            ]
            _band(held, points, color, style, label=f"{label}, {kind} rows")
            way = f"{kind}_5"
            points = [
                [(x.tokens, x.exact[way]) for x in run if way in x.exact] for run in looks[name]
            ]
            _band(exact, points, color, style, label=f"{label}, {kind} 5")
    own.set(ylabel="training loss on its own text, nats a token")
    held.set(ylabel="answers in held-out rows, nats a token")
    exact.set(ylabel="answered exactly", ylim=(0, 1))
    for axes in (own, held, exact):
        axes.set(xlabel="tokens read, millions")
        axes.legend(frameon=False, fontsize=7)
    return _save(figure, path)


def _draw_ways(path: Path, looks: Looks) -> Path:
    """Accuracy by tokens, a panel for each way to ask."""
    ways = dict.fromkeys(
        way for runs in looks.values() for run in runs for x in run for way in x.exact
    )
    figure, axes = _figure(len(ways))
    for panel, way in zip(axes, ways, strict=True):
        for number, (name, runs) in enumerate(looks.items()):
            points = [[(x.tokens, x.exact[way]) for x in run if way in x.exact] for run in runs]
            _band(panel, points, f"C{number}", label=name.replace("_", " "))
        panel.set(xlabel="tokens read, millions", title=way.replace("_", " "), ylim=(0, 1))
    axes[0].set(ylabel="answered exactly")
    axes[0].legend(frameon=False, fontsize=7)
    return _save(figure, path)


def _training(result: Result) -> list[tuple[float, float]]:
    """(tokens, loss) of all records of an arm's stages."""
    points, before = [], 0
    for stage in result.stages:
        records = read_metrics(stage)
        points += [(before + record["tokens"], record["loss"]) for record in records]
        before += records[-1]["tokens"] if records else 0
    return points


def _band(
    axes: Any,
    runs: Sequence[Sequence[tuple[float, float]]],
    color: str,
    style: str = "-",
    *,
    label: str,
) -> None:
    """The mean of runs at places that all of them have, and from the least to the most."""
    by_place: dict[float, list[float]] = {}
    for run in runs:
        for place, value in run:
            by_place.setdefault(place, []).append(value)
    places = sorted(place for place, values in by_place.items() if len(values) == len(runs))
    if not places:
        return
    millions = [place / 1e6 for place in places]
    means = [statistics.fmean(by_place[place]) for place in places]
    axes.plot(millions, means, color=color, linestyle=style, label=label, linewidth=1)
    if len(runs) > 1:
        least, most = ([f(by_place[place]) for place in places] for f in (min, max))
        axes.fill_between(millions, least, most, color=color, alpha=0.2, linewidth=0)

"""Pictures of a page: as SVG in the page, in the colour of its text, and as PNG beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]

# Each is seen on white and on black; lines of more than eight are dashed, too.
_COLOURS = (
    "#2f7de1", "#d9661f", "#1f9d61", "#c2387e", "#8a63d2", "#0f94a8", "#a8800a", "#7b8794",
)  # fmt: skip
_DASHES = ("-", "--", ":", "-.")
_SIZE_INCHES = (4.8, 3.3)  # legible as wide as a phone
_INK = "#010203"  # nearly black; in a page the colour of its text stands for it
_MOST_SHAPES = 500  # more points than these are a picture within the picture
_STYLE: Any = {  # matplotlib types its keys one by one
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",  # no font of the reader's machine can clip a label
    "svg.hashsalt": "strata",
    **{f"{name}color": _INK for name in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")},
}


def curves(
    lines: Mapping[str, Points],
    *,
    x: str,
    y: str,
    share: bool = False,
    dashed: Sequence[str] = (),
) -> Any:
    """A line a name.

    Args:
        lines: points by name.
        x, y: what the axes show.
        share: from 0 to 1.
        dashed: names that are drawn dashed, in the colour of the line before, and not named.
    """
    with _styled() as plt:
        figure, axes = _axes(plt)
        number = -1
        for name, points in lines.items():
            number += name not in dashed
            style = "--" if name in dashed else _DASHES[number // len(_COLOURS) % len(_DASHES)]
            label = "_" if name in dashed else name  # matplotlib leaves it out of the legend
            marker = "o" if len(points) < 30 else None
            axes.plot(
                *zip(*points, strict=True), style, label=label, marker=marker, markersize=3,
                color=_COLOURS[max(number, 0) % len(_COLOURS)], linewidth=1.5,
            )  # fmt: skip
        axes.set(xlabel=x, ylabel=y)
        if share:
            axes.set(ylim=(-0.02, 1.02))
        _legend(figure, axes, len(lines) - len(dashed))
    return figure


def bars(groups: Mapping[str, Mapping[str, float]], *, y: str) -> Any:
    """Bars side by side: a group a name, in it a bar for each name below."""
    kinds = list(dict.fromkeys(kind for group in groups.values() for kind in group))
    with _styled() as plt:
        figure, axes = _axes(plt)
        width = 0.8 / len(kinds)
        for number, kind in enumerate(kinds):
            at = [place + (number - (len(kinds) - 1) / 2) * width for place in range(len(groups))]
            heights = [group.get(kind, 0.0) for group in groups.values()]
            drawn = axes.bar(at, heights, width, label=kind, color=_COLOURS[number % 8])
            if len(kinds) * len(groups) <= 10:
                axes.bar_label(drawn, [f"{height:.0%}" for height in heights], fontsize=9)
        axes.set(ylabel=y, ylim=(0, 1.05))
        axes.set_xticks(range(len(groups)), list(groups))
        longest = max(map(len, groups))
        if longest > 12 or (len(groups) > 5 and longest > 4):
            axes.tick_params(axis="x", rotation=40)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
        if len(kinds) > 1:
            _legend(figure, axes, len(kinds))
    return figure


def scatter(points: Points, *, x: str, y: str) -> Any:
    """Points of two shares."""
    with _styled() as plt:
        figure, axes = _axes(plt)
        axes.plot((0, 1), (0, 1), color=_INK, linewidth=0.8, alpha=0.5)
        many = len(points) > _MOST_SHAPES
        axes.scatter(
            *zip(*points, strict=True), s=9, alpha=0.35, color=_COLOURS[0], linewidths=0,
            rasterized=many,
        )  # fmt: skip
        axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return figure


def as_svg(figure: Any, name: str) -> str:
    """An `svg` element without size, colours or names of others: it fits any page and theme."""
    with _styled():
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, dpi=200, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = svg.replace(_INK, "currentColor")
    # Several pictures share a page: names must not meet.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return svg.strip()


def save_png(figure: Any, path: Path) -> None:
    """The same on white."""
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=150, format="png", facecolor="white")
    plt.close(figure)


def _styled() -> Any:
    """pyplot with our settings, while a block lasts."""
    import matplotlib

    matplotlib.use("Agg")
    from contextlib import contextmanager

    from matplotlib import pyplot as plt

    @contextmanager
    def styled() -> Any:
        with matplotlib.rc_context(_STYLE):
            yield plt

    return styled()


def _axes(plt: Any) -> Any:
    return plt.subplots(figsize=_SIZE_INCHES, layout="constrained")


def _legend(figure: Any, axes: Any, count: int) -> None:
    """Below the picture, where it covers nothing; for one line none is needed."""
    if count > 1:
        longest = max(len(text) for text in axes.get_legend_handles_labels()[1])
        columns = 1 if longest > 28 else 2 if longest > 12 else 3
        figure.legend(loc="outside lower center", ncols=columns)
        lines = -(-count // columns)
        figure.set_figheight(_SIZE_INCHES[1] + 0.2 * lines)

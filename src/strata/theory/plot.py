"""Number of uses against total cost, the cheapest format shaded."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from strata.theory.cost import FORMATS, Costs, Format

_COLOURS: dict[Format, str] = {
    "text": "tab:red", "explicit": "tab:green", "parameters": "tab:blue",
}  # fmt: skip
_LABELS: dict[Format, str] = {
    "text": "text (RAG)", "explicit": "explicit memory", "parameters": "parameters",
}  # fmt: skip


def save_plot(costs: Costs, path: Path, *, title: str = "") -> None:
    """Draw one reference's total cost by its number of uses, as a PNG.

    Args:
        costs: of one reference.
        path: of the PNG.
        title: above the picture.

    Source: "Memory3" (arXiv 2407.01178), the figure of costs by expected usage count.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, last = _range(costs)
    uses = np.geomspace(first, last, 1000)
    total = costs.total(uses)
    steps = [(at, name) for at, name in costs.envelope() if at < last]
    ends = [*(at for at, _ in steps[1:]), math.inf]
    top = 1.15 * float(total.min(axis=0).max()) or 1.0
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (at, name), end in zip(steps, ends, strict=True):
        inside = (uses >= at) & (uses <= end)
        line = total[FORMATS.index(name)]
        axes.fill_between(uses, 0, line, where=inside.tolist(), color=_COLOURS[name], alpha=0.25,
                          linewidth=0)  # fmt: skip
    for name in ("text", "explicit", "parameters"):
        line = total[FORMATS.index(name)]
        axes.plot(uses, line, color=_COLOURS[name], label=_LABELS[name])
    for at, _ in steps[1:]:
        axes.axvline(at, color="0.6", linewidth=1, linestyle=":")
        axes.annotate(f"{at:,.3g}" if at < 1000 else f"{at:,.0f}", (at, top), xytext=(-4, -12),
                      textcoords="offset points", fontsize=8, ha="right")  # fmt: skip
    axes.set(
        xlabel="times used", ylabel=f"written once and read, {costs.unit}",
        xscale="log", xlim=(first, last), ylim=(0, top),
    )  # fmt: skip
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left")
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def _range(costs: Costs) -> tuple[float, float]:
    """Uses to draw: a decade or two around the crossovers."""
    at = [x for x in costs.crossovers if 0 < x < math.inf] or [1.0]
    return 10.0 ** (math.floor(math.log10(min(at))) - 1), 10.0 ** (math.ceil(math.log10(max(at))))

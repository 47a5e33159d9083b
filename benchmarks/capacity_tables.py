"""Tables and pictures of `capacity_study.py`: bits by arm, what they cost, and what follows.

Intervals are those of Student's t at 95%, over seeds. A ratio is taken seed by seed, since all arms
of a seed are told of the same people; its mean is geometric, its interval that of its logarithm.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_arms import ARCHITECTURES, EXPOSURES, ROW_STEPS, STUDIES, exposed_name, rows_name
from scipy import stats

LEVEL = 0.95
BYTES = 4  # of a parameter: weights are fp32
WANTED_TIMES = 3.0  # the bits of dense that Memory+ is to learn at equal active FLOPs
MIN_SEEDS = 3
MIN_SIZES = 5

# What "Memory Layers at Scale" (arXiv 2412.09764) found at 373M, best first, by TriviaQA's loss:
# placement 7.20, 7.54, 7.73, 8.34; a gate on one layer 8.09 instead of 8.34.
PUBLISHED = {
    "placement": ("spread", "late", "all but the first", "one layer"),
    "gate": ("one layer, gate", "one layer, none"),
}
_LEGEND = (
    "Bits: of all facts, learned; share: of what there was to know. A parameter: of all, tables "
    "included. A FLOP: of the active ones, a token forward. A byte read: of the weights that a "
    "token uses, fp32, rows that it reads included. After ±: half of a 95% interval over seeds."
)


@dataclass(frozen=True)
class Result:
    """What came of a run."""

    arm: str
    seed: int
    exposures: int
    bits: float
    share: float
    params: int
    flops: int
    bytes_read: int
    num_rows: int
    tokens: int
    train_s: float
    tree: Mapping[str, Any]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Result:
        """From its `result.json`."""
        counts = tree["counts"]
        return cls(
            arm=tree["arm"],
            seed=tree["seed"],
            exposures=tree["exposures"],
            bits=tree["bits"],
            share=tree["share"],
            params=counts["params_total"],
            flops=counts["flops_per_token"],
            bytes_read=BYTES * counts["params_active"],
            num_rows=tree["num_rows"],
            tokens=tree["tokens"],
            train_s=tree["train_s"],
            tree=tree,
        )


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; without one where there is a single number.

    Attributes:
        mean: of the numbers.
        low, high: the interval's ends.
        count: how many numbers.
    """

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t over the numbers given."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, -math.inf, math.inf, len(values))
        quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, len(values))

    @classmethod
    def of_ratios(cls, values: Sequence[float]) -> Interval:
        """The same for ratios above 0, by their logarithms."""
        logs = cls.of([math.log(value) for value in values])
        low, high = (math.exp(x) if x < math.inf else x for x in (logs.low, logs.high))
        return cls(math.exp(logs.mean), low, high, logs.count)

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which knows no infinity."""
        ends = {"low": self.low, "high": self.high}
        finite = {name: x if math.isfinite(x) else None for name, x in ends.items()}
        return {"mean": self.mean, **finite, "seeds": self.count}


@dataclass(frozen=True)
class Fit:
    """A curve of bits by rows, fitted to all runs by least squares.

    Attributes:
        law: "power": bits = scale * rows ** slope; "log": bits = scale + slope * log2(rows).
        scale, slope: of that.
        slope_low, slope_high: the slope's 95% interval.
        r2: share of the variance that the curve explains, of bits in both laws.
        num_sizes: different numbers of rows.
    """

    law: str
    scale: float
    slope: float
    slope_low: float
    slope_high: float
    r2: float
    num_sizes: int

    def at(self, rows: float) -> float:
        """Bits for so many rows."""
        if self.law == "power":
            return self.scale * rows**self.slope
        return self.scale + self.slope * math.log2(rows)

    def __str__(self) -> str:
        ends = f"{self.slope_low:.3g} to {self.slope_high:.3g}"
        if self.law == "power":
            shown = f"bits = {self.scale:,.4g} * rows^{self.slope:.3f} (exponent {ends}"
        else:
            sign = "+" if self.slope >= 0 else "-"
            shown = f"bits = {self.scale:,.5g} {sign} {abs(self.slope):,.5g} * log2(rows) (slope "
            shown += ends
        return f"{shown}), R2 {self.r2:.3f}"


Runs = Mapping[str, Sequence[Result]]


def fit_rows(rows: Sequence[float], bits: Sequence[float]) -> list[Fit]:
    """Both laws through the same points, the better one first; none below `MIN_SIZES` sizes."""
    num_sizes = len(set(rows))
    if num_sizes < MIN_SIZES:
        return []
    logs = [math.log2(x) for x in rows]
    laws = {"log": list(bits)}
    if min(bits) > 0:
        laws["power"] = [math.log2(y) for y in bits]
    fits = []
    for law, heights in laws.items():
        line = stats.linregress(logs, heights)
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(logs) - 2)) * float(line.stderr)
        scale = 2.0 ** float(line.intercept) if law == "power" else float(line.intercept)
        slope = float(line.slope)
        fit = Fit(law, scale, slope, slope - half, slope + half, 0.0, num_sizes)
        fits.append(replace_r2(fit, rows, bits))
    return sorted(fits, key=lambda fit: -fit.r2)


def replace_r2(fit: Fit, rows: Sequence[float], bits: Sequence[float]) -> Fit:
    """The same curve with the variance of bits that it explains."""
    mean = statistics.fmean(bits)
    around = math.fsum((y - mean) ** 2 for y in bits)
    missed = math.fsum((y - fit.at(x)) ** 2 for x, y in zip(rows, bits, strict=True))
    r2 = 1 - missed / around if around else 1.0
    return Fit(
        fit.law, fit.scale, fit.slope, fit.slope_low, fit.slope_high, r2, fit.num_sizes
    )  # fmt: skip


def ratio(runs: Runs, above: str, below: str) -> Interval | None:
    """Bits of one arm in those of another, seed by seed; None without a seed that both have.

    Seeds in which one of them learned nothing have no ratio and are left out.
    """
    by_seed = {r.seed: r.bits for r in runs.get(below, ())}
    found = [
        r.bits / by_seed[r.seed]
        for r in runs.get(above, ())
        if r.bits > 0 and by_seed.get(r.seed, 0) > 0
    ]
    return Interval.of_ratios(found) if found else None


def judge(found: Interval | None, wanted: float) -> str:
    """Whether a ratio is at least so much: shown, on average only, or not."""
    if found is None:
        return "not measured"
    if found.count < MIN_SEEDS:
        verdict = f"{found.count} of {MIN_SEEDS} seeds"
        return f"{'so far' if found.mean >= wanted else 'not so far'} ({verdict})"
    if found.low >= wanted:
        return "shown"
    if found.mean >= wanted:
        return "on average, the interval reaches below"
    return "not shown, the interval reaches it" if found.high >= wanted else "refuted"


def claims(runs: Runs) -> list[dict[str, Any]]:
    """What was to be shown, and what the runs say."""
    listed = [
        ("Memory+ learns 3 times the bits of dense, equal active FLOPs, 30 exposures",
         "memory_plus", "dense", WANTED_TIMES),
        ("Memory+ learns at least what dense of 4 times its active FLOPs learns",
         "memory_plus", "dense_4x", 1.0),
        ("Memory+ learns at least what dense of equally many parameters learns",
         "memory_plus", "dense_params", 1.0),
    ]  # fmt: skip
    found = []
    for text, above, below, wanted in listed:
        times = ratio(runs, above, below)
        found.append(
            {
                "claim": text,
                "wanted": wanted,
                "ratio": None if times is None else times.as_dict(),
                "verdict": judge(times, wanted),
            }
        )
    return found


def rivals(runs: Runs) -> list[str]:
    """A line for each comparison of Memory+ with MoE, PEER and Memory, who wins it said first."""
    lines = []
    for other in ("moe", "peer", "memory"):
        for times in EXPOSURES:
            mine, theirs = exposed_name("memory_plus", times), exposed_name(other, times)
            found = ratio(runs, theirs, mine)
            if found is not None:
                winner = "Memory+" if found.mean < 1 else NAMES[other]
                sure = "" if found.count > 1 and not found.low < 1 < found.high else ", not surely"
                lines.append(
                    f"{times} exposures: **{winner}{sure}**; {NAMES[other]} learns "
                    f"{shown_ratio(found)} of Memory+'s bits"
                )
    return lines


NAMES = {
    "dense": "dense",
    "moe": "MoE",
    "peer": "PEER",
    "memory": "Memory",
    "memory_plus": "Memory+",
}


def orders(runs: Runs) -> list[dict[str, str]]:
    """Each pair of a published order, and whether it came out so here."""
    found = []
    for study, order in PUBLISHED.items():
        arms = STUDIES[study]
        for place, better in enumerate(order):
            for worse in order[place + 1 :]:
                times = ratio(runs, arms[better], arms[worse])
                if times is None:
                    continue
                verdict = "agrees" if times.mean > 1 else "disagrees"
                if times.count < 2 or times.low < 1 < times.high:
                    verdict += ", not surely"
                found.append(
                    {
                        "study": study,
                        "published": f"{better} > {worse}",
                        "here": f"{shown_ratio(times)} times the bits",
                        "verdict": verdict,
                    }
                )
    return found


def shown_ratio(found: Interval) -> str:
    """Mean and interval."""
    if found.count < 2:
        return f"{found.mean:.2f}"
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


Of = Callable[[Result], float]

_COLUMNS: tuple[tuple[str, Of, str], ...] = (
    ("bits", lambda r: r.bits, ",.0f"),
    ("share", lambda r: 100 * r.share, ".1f"),
    ("a parameter", lambda r: r.bits / r.params, ".4f"),
    ("a FLOP", lambda r: r.bits / r.flops, ".4f"),
    ("a byte read", lambda r: r.bits / r.bytes_read, ".4f"),
    ("train s", lambda r: r.train_s, ",.0f"),
)


def table(arms: Mapping[str, str], runs: Runs, *, corner: str) -> list[str]:
    """Lines of a markdown table, a row an arm that has a result."""
    titles = [title + (", %" if title == "share" else "") for title, _, _ in _COLUMNS]
    lines = [
        f"| {corner} | seeds | MFLOPs a token | parameters, million | {' | '.join(titles)} |",
        f"|---|---:|---:|---:|{'---:|' * len(titles)}",
    ]
    for label, arm in arms.items():
        found = runs.get(arm)
        if not found:
            continue
        sizes = f"{found[0].flops / 1e6:.2f} | {found[0].params / 1e6:.2f}"
        cells = [_cell(Interval.of([of(r) for r in found]), form) for _, of, form in _COLUMNS]
        lines.append(f"| {label} | {len(found)} | {sizes} | {' | '.join(cells)} |")
    return lines


def numbers(arms: Mapping[str, str], runs: Runs) -> dict[str, dict[str, Any]]:
    """The same, for JSON."""
    return {
        label: {title: Interval.of([of(r) for r in runs[arm]]).as_dict() for title, of, _ in
                _COLUMNS}
        for label, arm in arms.items()
        if runs.get(arm)
    }  # fmt: skip


def _cell(found: Interval, form: str) -> str:
    spread = f" ± {found.half:{form}}" if found.count > 1 else ""
    return f"{found.mean:{form}}{spread}"


def write_results(out: Path, header: Mapping[str, Any], results: Sequence[Result]) -> list[Path]:
    """OUT/results.md, OUT/results.json and a picture of each study with two arms or more.

    Returns:
        What was written.
    """
    runs: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.seed):
        runs.setdefault(result.arm, []).append(result)
    lines = ["# Knowledge capacity", "", "```", *header["commands"], "```", ""]
    lines += [f"- {key}: {value}" for key, value in header["settings"].items()]
    hours = sum(r.train_s for r in results) / 3600
    lines += [
        f"- runs: {len(results)}, {hours:.2f} hours of one thread in training; "
        f"torch {header['torch']}",
        "",
        _LEGEND,
        "",
        "## What was to be shown",
        "",
        "| claim | wanted | here | verdict |",
        "|---|---:|---:|---|",
    ]
    judged = claims(runs)
    for row in judged:
        times = ratio_of(row)
        shown = "-" if times is None else shown_ratio(times)
        lines.append(f"| {row['claim']} | {row['wanted']:g} | {shown} | {row['verdict']} |")
    told = rivals(runs)
    if told:
        lines += ["", "Against the others at equal active FLOPs:", ""]
        lines += [f"- {line}" for line in told]
    ordered = orders(runs)
    if ordered:
        lines += ["", "## The published order", "", "| ablation | published | here | |"]
        lines += ["|---|---|---:|---|"]
        lines += [
            f"| {row['study']} | {row['published']} | {row['here']} | {row['verdict']} |"
            for row in ordered
        ]
    tables, written = {}, []
    fits = _row_fits(runs)
    for study, arms in STUDIES.items():
        tables[study] = numbers(arms, runs)
        if len(tables[study]) < 2:
            continue
        lines += ["", f"## {study.capitalize()}", "", *table(arms, runs, corner=study)]
        if study == "rows":
            lines += ["", *(f"- {fit.law} law: {fit}" for fit in fits)]
        path = out / f"{study.replace(' ', '_')}.png"
        written.append(_draw(path, study, arms, runs, fits))
        lines += ["", f"![{study}]({path.name})"]
    tree = {
        **header,
        "claims": judged,
        "published_order": ordered,
        "fits": [vars(fit) for fit in fits],
        "tables": tables,
        "runs": [dict(r.tree) for r in results],
    }
    text, data = out / "results.md", out / "results.json"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return [text, data, *written]


def ratio_of(row: Mapping[str, Any]) -> Interval | None:
    """The ratio of a claim, from its JSON."""
    found = row["ratio"]
    if found is None:
        return None
    low, high = found["low"], found["high"]
    return Interval(
        found["mean"],
        -math.inf if low is None else low,
        math.inf if high is None else high,
        found["seeds"],
    )


def _row_fits(runs: Runs) -> list[Fit]:
    found = [r for n in ROW_STEPS for r in runs.get(rows_name(n), ())]
    return fit_rows([r.num_rows for r in found], [r.bits for r in found])


# Pictures


def _draw(
    path: Path, study: str, arms: Mapping[str, str], runs: Runs, fits: Sequence[Fit]
) -> Path:  # fmt: skip
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    if study == "exposures":
        _draw_exposures(axes, runs)
    elif study == "rows":
        _draw_rows(axes, runs, fits)
    else:
        _draw_bars(axes, arms, runs)
    axes.set(ylabel="bits learned")
    axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)
    return path


def _points(axes: Any, places: Sequence[float], found: Sequence[Interval], **style: Any) -> None:
    halves = [x.half if x.count > 1 else 0.0 for x in found]
    means = [x.mean for x in found]
    axes.errorbar(places, means, yerr=halves, marker="o", markersize=4, capsize=3, **style)


def _draw_exposures(axes: Any, runs: Runs) -> None:
    for arm in ARCHITECTURES:
        known = [n for n in EXPOSURES if runs.get(exposed_name(arm.name, n))]
        if known:
            found = [Interval.of([r.bits for r in runs[exposed_name(arm.name, n)]]) for n in known]
            _points(axes, known, found, label=NAMES[arm.name], linewidth=1)
    axes.set(xscale="log", xlabel="exposures")
    axes.set_xticks(EXPOSURES, [str(n) for n in EXPOSURES])
    axes.legend(frameon=False, fontsize=8)


def _draw_rows(axes: Any, runs: Runs, fits: Sequence[Fit]) -> None:
    known = [n for n in ROW_STEPS if runs.get(rows_name(n))]
    found = [Interval.of([r.bits for r in runs[rows_name(n)]]) for n in known]
    _points(axes, [n * n for n in known], found, linestyle="none", label="Memory+")
    for fit, style in zip(fits, ("-", "--"), strict=False):
        rows = [known[0] ** 2 * 2 ** (step / 8) for step in range(8 * 14)]
        rows = [x for x in rows if x <= known[-1] ** 2]
        axes.plot(rows, [fit.at(x) for x in rows], style, color="C1", linewidth=1, label=fit.law)
    if runs.get("dense"):
        mean = statistics.fmean(r.bits for r in runs["dense"])
        axes.axhline(mean, color="0.5", linewidth=1, linestyle=":", label="dense")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows")
    axes.legend(frameon=False, fontsize=8)


def _draw_bars(axes: Any, arms: Mapping[str, str], runs: Runs) -> None:
    known = [label for label, arm in arms.items() if runs.get(arm)]
    found = [Interval.of([r.bits for r in runs[arms[label]]]) for label in known]
    halves = [x.half if x.count > 1 else 0.0 for x in found]
    axes.bar(range(len(known)), [x.mean for x in found], yerr=halves, capsize=3, color="C0")
    labels = [label.replace(", ", ",\n").replace("_", "\n") for label in known]
    axes.set_xticks(range(len(known)), labels, fontsize=8)

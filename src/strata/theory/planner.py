"""Which references of a corpus go into parameters, explicit memory or text, under budgets.

What is minimised is the cost of the whole corpus over its life: of each reference, what its format
takes to write and, by its number of uses, to read. Budgets are of the disk (text of all references,
and explicit memories), RAM (parameters) and compute (what is written before the first answer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from strata.config import FrozenConfig
from strata.errors import ConfigError
from strata.theory.cost import FORMATS, Costs, Floats, Format, flops
from strata.theory.machine import HardwareProfile, money, seconds, weights
from strata.theory.place import Choice, place
from strata.theory.setting import CostSetting

MIXED = "planned"


class Budgets(FrozenConfig):
    """What a plan may use; None for no limit.

    Attributes:
        disk_bytes: text and explicit memories. The text of every reference stays on the disk,
            whatever its format.
        ram_bytes: parameters.
        compute_tflops: training and encoding.
    """

    disk_bytes: float | None = None
    ram_bytes: float | None = None
    compute_tflops: float | None = None


@dataclass(frozen=True)
class Row:
    """One way to hold the whole corpus.

    Attributes:
        name: a format, or "planned".
        references: in each format.
        write, read, total: in the plan's unit; reads are those of all uses.
        per_use: total by uses.
        disk_bytes, ram_bytes, compute_tflops: of the budgets.
        fits: all of these.
    """

    name: str
    references: dict[Format, int]
    write: float
    read: float
    total: float
    per_use: float
    disk_bytes: float
    ram_bytes: float
    compute_tflops: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """A format for each reference.

    Attributes:
        format_n: positions in `FORMATS`.
        unit: of costs.
        budgets: as given.
        rows: the plan, then the corpus in each single format.
        lower_bound: no plan within the budgets costs less, in total.
        exact: whether the plan is known to be optimal.
    """

    format_n: Choice
    unit: str
    budgets: Budgets
    rows: tuple[Row, ...]
    lower_bound: float
    exact: bool

    @property
    def gap(self) -> float:
        """Share of the optimum that the plan may cost above it."""
        total = self.rows[0].total
        return (total - self.lower_bound) / self.lower_bound if self.lower_bound > 0 else 0.0

    def formats(self) -> list[Format]:
        """The format of each reference, by name."""
        return [FORMATS[number] for number in self.format_n]

    def to_json(self) -> dict[str, Any]:
        """Everything but the references."""
        return {
            "unit": self.unit,
            "budgets": self.budgets.model_dump(),
            "lower_bound": self.lower_bound,
            "exact": self.exact,
            "rows": [vars(row) for row in self.rows],
        }


def costs_of(
    setting: CostSetting,
    tokens_n: ArrayLike,
    text_bytes_n: ArrayLike,
    *,
    profile: HardwareProfile | None = None,
    months: float | None = None,
    cached: float = 0.0,
) -> Costs:
    """The cost of each reference: money where months are given, else seconds, else TFLOPs.

    Args:
        setting: decoder and memory.
        tokens_n, text_bytes_n: of each reference.
        profile: of the machine; None for TFLOPs.
        months: that bytes are kept and paid.
        cached: share of reads that a cache in RAM serves.

    Raises:
        ConfigError: months without a profile that has prices.
    """
    if profile is None:
        if months is not None:
            raise ConfigError("months are paid for: give a profile with prices")
        return flops(setting, tokens_n)
    if months is None:
        return seconds(setting, profile, tokens_n, text_bytes_n, cached=cached)
    return money(setting, profile, tokens_n, text_bytes_n, months=months, cached=cached)


def make_plan(
    setting: CostSetting,
    tokens_n: ArrayLike,
    text_bytes_n: ArrayLike,
    uses_n: ArrayLike,
    budgets: Budgets,
    *,
    profile: HardwareProfile | None = None,
    months: float | None = None,
    cached: float = 0.0,
    costs: Costs | None = None,
) -> Plan:
    """Place references.

    Args:
        setting: decoder and memory.
        tokens_n, text_bytes_n: of each reference.
        uses_n: how often each is read over the corpus' life; at least 0.
        budgets: what may be used.
        profile, months, cached: see `costs_of`.
        costs: of each reference, (3, n), measured in some other way; they replace those.

    Raises:
        ConfigError: no references, uses below 0, a budget below 0, or a disk that does not hold
            the corpus as text.
    """
    tokens_n, uses_n = np.asarray(tokens_n, np.float64), np.asarray(uses_n, np.float64)
    if not len(tokens_n):
        raise ConfigError("no references: nothing to place")
    if not (uses_n >= 0).all() or not np.isfinite(uses_n).all():
        raise ConfigError("numbers of uses must be 0 or more")
    if costs is None:
        costs = costs_of(
            setting, tokens_n, text_bytes_n, profile=profile, months=months, cached=cached
        )
    weigh = weights(setting, tokens_n, text_bytes_n)
    need_dmn = np.stack([weigh.disk_m, weigh.ram_m, flops(setting, tokens_n).write_m])
    text = FORMATS.index("text")
    kept = float(need_dmn[0, text].sum())
    if budgets.disk_bytes is not None and budgets.disk_bytes < kept:
        raise ConfigError(
            f"a disk budget of {budgets.disk_bytes:,.0f} bytes does not hold the corpus as text "
            f"({kept:,.0f} bytes): raise it, or plan for less"
        )
    above_dmn = need_dmn - need_dmn[:, text : text + 1]
    limits = (
        None if budgets.disk_bytes is None else budgets.disk_bytes - kept,
        budgets.ram_bytes,
        budgets.compute_tflops,
    )
    total_mn = costs.total(uses_n)
    found = place(total_mn.T, above_dmn.transpose(0, 2, 1), limits, base=text)
    choices = {MIXED: found.choice_n}
    choices |= {name: np.full(len(tokens_n), m) for m, name in enumerate(FORMATS)}
    rows = tuple(
        _row(name, choice_n, costs, uses_n, need_dmn, budgets) for name, choice_n in choices.items()
    )
    return Plan(found.choice_n, costs.unit, budgets, rows, found.lower_bound, found.exact)


def _row(
    name: str, choice_n: Choice, costs: Costs, uses_n: Floats, need_dmn: Floats, budgets: Budgets
) -> Row:
    at = np.arange(len(choice_n))
    write = float(costs.write_m[choice_n, at].sum())
    read = float((costs.read_m[choice_n, at] * uses_n).sum())
    disk, ram, compute = (float(need_mn[choice_n, at].sum()) for need_mn in need_dmn)
    limits = (budgets.disk_bytes, budgets.ram_bytes, budgets.compute_tflops)
    uses = float(uses_n.sum())
    return Row(
        name=name,
        references={form: int((choice_n == m).sum()) for m, form in enumerate(FORMATS)},
        write=write,
        read=read,
        total=write + read,
        per_use=(write + read) / uses if uses else 0.0,
        disk_bytes=disk,
        ram_bytes=ram,
        compute_tflops=compute,
        fits=all(
            limit is None or used <= limit * (1 + 1e-9)
            for used, limit in zip((disk, ram, compute), limits, strict=True)
        ),
    )

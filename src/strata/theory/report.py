"""The cost of a reference as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from strata.theory.cost import FORMATS, Costs
from strata.theory.machine import HardwareProfile, room, weights
from strata.theory.setting import CostSetting


def costs_json(
    counted: Sequence[Costs],
    setting: CostSetting,
    rates: HardwareProfile | None,
    uses: Sequence[float],
) -> dict[str, Any]:
    """What `strata cost --json` prints.

    Args:
        counted: TFLOPs, then, of a profile, seconds and perhaps money.
        setting: of all.
        rates: the profile.
        uses: counts to give totals for.
    """
    tree = counted[0].to_json()
    if uses:
        tree["totals"] = _totals(counted[0], uses)
    if rates is not None:
        weigh = weights(setting)
        tree["seconds"] = counted[1].to_json()
        tree["bytes"] = {
            "disk": dict(zip(FORMATS, weigh.disk_m.tolist(), strict=True)),
            "ram": dict(zip(FORMATS, weigh.ram_m.tolist(), strict=True)),
        }
        tree["room"] = room(setting, rates)
        if uses:
            tree["seconds"]["totals"] = _totals(counted[1], uses)
        if len(counted) == 3:
            tree["money"] = {"currency": rates.currency, **counted[2].to_json()}
            if uses:
                tree["money"]["totals"] = _totals(counted[2], uses)
    return tree


def _totals(costs: Costs, uses: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {
            "uses": count,
            **dict(zip(FORMATS, costs.total(count).tolist(), strict=True)),
            "cheapest": costs.cheapest(count),
        }
        for count in uses
    ]


def costs_tables(
    counted: Sequence[Costs],
    setting: CostSetting,
    rates: HardwareProfile | None,
    uses: Sequence[float],
) -> Group:
    """The same for a terminal; of each total the cheapest format is bold."""

    parts: list[Any] = []
    for costs in counted:
        table = Table(
            title=f"a reference of {setting.memory.reference_tokens} tokens, {costs.unit}",
            title_justify="left",
            box=None,
            header_style="",
        )
        table.add_column("format", no_wrap=True)
        for column in ("write", "read", *(_times(count) for count in uses)):
            table.add_column(column, justify="right", no_wrap=True)
        cheapest = [costs.cheapest(count) for count in uses]
        total = costs.total(uses)
        for m, name in enumerate(FORMATS):
            cells = [
                f"[bold]{_number(total[m, at])}[/bold]" if cheapest[at] == name
                else _number(total[m, at])
                for at in range(len(uses))
            ]  # fmt: skip
            write, read = _number(costs.write_m[m]), _number(costs.read_m[m])
            table.add_row(name, write, read, *cells)
        parts += [table, _sentence(costs)]
    if rates is not None:
        weigh, holds = weights(setting), room(setting, rates)
        table = Table(
            title="bytes of a reference, and how many this machine holds",
            title_justify="left",
            box=None,
            header_style="",
        )
        for column in ("format", "disk", "memory", "room for"):
            table.add_column(column, justify="left" if column == "format" else "right")
        for m, name in enumerate(FORMATS):
            table.add_row(name, _bytes(weigh.disk_m[m]), _bytes(weigh.ram_m[m]),
                          f"{holds[name]:,.0f}")  # fmt: skip
        parts.append(table)
        if rates.disk_cached:
            parts.append("The profile's disk was read through the page cache: it may be slower.")
    return Group(*parts)


def _sentence(costs: Costs) -> str:
    """Up to how many uses each format is cheapest."""
    steps = costs.envelope()
    ends = [f"{at:,.0f}" if at >= 1000 else f"{at:,.3g}" for at, _ in steps[1:]]
    parts = [f"{name} up to {end} uses" for (_, name), end in zip(steps, ends, strict=False)]
    return "cheapest: " + ", ".join([*parts, f"{steps[-1][1]} {_rest(parts)}"])


def _rest(parts: Sequence[str]) -> str:
    return "above" if parts else "for any number of uses"


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _times(count: float) -> str:
    return f"x {count:,g}" if count < 1000 else f"x {count:,.0f}"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} B"

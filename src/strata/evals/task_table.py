"""Benchmarks with and without memory in one table: as markdown, as JSON, and for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from strata.evals.effective_size import EffectiveSize, EffectiveSizes
from strata.evals.task_runs import TaskResult


def leak_filter_line(threshold: float) -> str:
    """The setting of the leak filter, in words."""
    if threshold == 1:
        return "leak filter: off; references may repeat the question and its answers"
    return (
        f"leak filter: a reference of which more than {threshold:.3f} stands in the question and "
        "its answers is left out"
    )


def results_json(
    results: Sequence[TaskResult],
    *,
    leak_threshold: float,
    sizes: Mapping[str, EffectiveSizes] | None = None,
) -> dict[str, Any]:
    """All results as a mapping that the json module can write."""
    return {
        "leak_filter": {
            "threshold": leak_threshold,
            "off": leak_threshold == 1,
            "says": leak_filter_line(leak_threshold),
        },
        "results": [asdict(result) for result in results],
        "effective_size": {memory: one.to_json() for memory, one in (sizes or {}).items()},
    }


def results_markdown(
    results: Sequence[TaskResult],
    *,
    model: str,
    leak_threshold: float,
    sizes: Mapping[str, EffectiveSizes] | None = None,
) -> str:
    """All results as a markdown document."""
    parts = [f"# {model}", _markdown(*_figures(results)), _note(results, leak_threshold)]
    given = _given(results)
    if given[1]:
        parts += ["What questions were given:", _markdown(*given)]
    for memory, one in (sizes or {}).items():
        parts += [f"Effective size, memory {memory}:", _markdown(*_sizes(one)), size_line(one)]
    return "\n\n".join(parts)


def results_tables(
    results: Sequence[TaskResult], *, sizes: Mapping[str, EffectiveSizes] | None = None
) -> list[Table]:
    """The same tables for a terminal, figures to three places."""
    tables = [_rich_figures(results)]
    given = _given(results)
    if given[1]:
        tables.append(_rich("what questions were given", *given))
    for memory, one in (sizes or {}).items():
        tables.append(_rich(f"effective size, memory {memory}", *_sizes(one)))
    return tables


def size_line(sizes: EffectiveSizes) -> str:
    """What stands behind the numbers of an effective size, in words."""
    left = (
        f" No scores of the dense models for {', '.join(sizes.left_out)}." if sizes.left_out else ""
    )
    return (
        f"Effective size is the gain by memory over the gain from the smaller to the larger dense "
        f"model. {sizes.best} gains most.{left}"
    )


def percent_scores(results: Sequence[TaskResult], memory: str) -> dict[str, float]:
    """Shares of right answers in percent by task, for one memory; other figures are left out."""
    return {
        result.task: 100 * result.measure.value
        for result in results
        if result.memory == memory
        and result.measure.value is not None
        and "perplexity" not in result.measure.metric
    }


def _rich_figures(results: Sequence[TaskResult]) -> Table:
    memories = list(dict.fromkeys(result.memory for result in results))
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    for name in ("metric", "asked", *memories):
        table.add_column(name, justify="right", no_wrap=name != "metric", overflow="fold")
    group = None
    for task in dict.fromkeys(result.task for result in results):
        own = {result.memory: result for result in results if result.task == task}
        first = next(iter(own.values()))
        if group not in (None, first.group):
            table.add_section()
        group = first.group
        cells = [_cell(own[memory], places=3) if memory in own else "" for memory in memories]
        metric = first.measure.metric.partition(" (")[0]
        table.add_row(task, metric, f"{first.measure.num_samples:,}", *cells)
    return table


Cells = tuple[list[str], list[list[str]]]


def _figures(results: Sequence[TaskResult]) -> Cells:
    memories = list(dict.fromkeys(result.memory for result in results))
    rows: list[list[str]] = []
    for task in dict.fromkeys(result.task for result in results):
        own = {result.memory: result for result in results if result.task == task}
        first = next(iter(own.values()))
        shots = first.measure.num_fewshot
        rows.append(
            [
                first.group, task, first.measure.metric, "" if shots is None else str(shots),
                f"{first.measure.num_samples:,}",
                *(_cell(own[memory]) if memory in own else "" for memory in memories),
            ]
        )  # fmt: skip
    return ["group", "task", "metric", "shots", "questions", *memories], rows


def _cell(result: TaskResult, places: int = 4) -> str:
    value, stderr = result.measure.value, result.measure.stderr
    if value is None:
        return "n/a"
    return f"{value:.{places}f}" + ("" if stderr is None else f" ± {stderr:.{places}f}")


def _note(results: Sequence[TaskResult], leak_threshold: float) -> str:
    shown = "± is the standard error over questions."
    if all(result.memory == "none" for result in results):
        return shown
    return f"{shown} {leak_filter_line(leak_threshold).capitalize()}."


def _given(results: Sequence[TaskResult]) -> Cells:
    header = ["task", "memory", "references a question", "none given to", "leaks left out",
              "no room for"]  # fmt: skip
    rows = []
    for result in results:
        tally = result.tally
        if result.memory == "none" or not tally.questions:
            continue
        each = tally.references / tally.questions
        numbers = (tally.empty_handed, tally.leaks, tally.no_room)
        rows.append([result.task, result.memory, f"{each:.2f}", *(f"{n:,}" for n in numbers)])
    return header, rows


def _sizes(sizes: EffectiveSizes) -> Cells:
    header = ["tasks", "none", "memory", "gain", "small", "large", "effective size"]
    rows = [_size_row(name, one) for name, one in sizes.per_task.items()]
    rows.append(_size_row(f"all {len(sizes.all_tasks.tasks)}", sizes.all_tasks))
    if sizes.without_best is not None:
        rows.append(_size_row(f"without {sizes.best}", sizes.without_best))
    return header, rows


def _size_row(name: str, one: EffectiveSize) -> list[str]:
    numbers = (one.without, one.with_memory, one.gain, one.small, one.large)
    return [name, *(f"{number:.2f}" for number in numbers),
            "n/a" if one.share is None else f"{one.share:+.1%}"]  # fmt: skip


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rules = ["---" if place < 2 else "---:" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rules, *rows))


def _rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None, title_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < 2 else "right", no_wrap=place < 2)
    for row in rows:
        table.add_row(*row)
    return table

"""Benchmark results as tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Group
from rich.table import Table

from strata.bench.decode import DecodeResult
from strata.bench.memory import STAGES, MemoryResult
from strata.bench.ops import OpResult
from strata.bench.train import TrainResult


def ops_table(results: Sequence[OpResult], *, device: torch.device) -> Group:
    """Medians in milliseconds, each rival with its ratio to strata, and the floor with ours."""
    table = Table(title=f"operations on {device}, {torch.get_num_threads()} threads, medians in ms")
    for column in ("operation", "table", "contestant"):
        table.add_column(column, overflow="fold")
    for column in ("ms", "times strata"):
        table.add_column(column, justify="right")
    notes = []
    for result in results:
        lines = {"strata": result.ours_ms, **result.rivals}
        if result.floor_ms is not None:
            lines["floor (bytes / copy bandwidth)"] = result.floor_ms
        for number, (name, ms) in enumerate(lines.items()):
            where = f"{result.rows:,} x {result.width} {result.dtype}"
            table.add_row(
                result.op if number == 0 else "",
                where if number == 0 else "",
                name,
                f"{ms:,.2f}",
                f"{ms / result.ours_ms:.2f}",
                end_section=number == len(lines) - 1,
            )
        notes += [f"{result.op}: {name} not run: {why}" for name, why in result.skipped.items()]
    return Group(table, *sorted(set(notes)))


def train_table(result: TrainResult, *, device: torch.device) -> Group:
    """Tokens a second of each contestant, and of Memory+ in strata against the other two."""
    threads = torch.get_num_threads()
    table = Table(title=f"training the quickstart's models on {device}, {threads} threads, medians")
    table.add_column("model, loop")
    for column in ("tokens/s", "of dense", "of the bare loop"):
        table.add_column(column, justify="right")
    rates = result.tokens_per_s
    table.add_row(
        "Memory+, strata",
        f"{rates['memory']:,.0f}",
        f"{result.memory_over_dense:.2f}",
        f"{result.strata_over_bare:.2f}",
    )
    table.add_row("dense, strata", f"{rates['dense']:,.0f}", "1.00", "")
    table.add_row("Memory+, bare loop", f"{rates['bare']:,.0f}", "", "1.00")
    return Group(
        table,
        "of dense: tokens/s of Memory+ over those of its dense control, both in strata's loop.",
        "of the bare loop: tokens/s of strata's loop over those of plain torch around the same "
        "model, with transformers' own loss: logits at every position, in strata at labels only.",
    )


def decode_table(results: Sequence[DecodeResult], *, device: torch.device) -> Table:
    """Milliseconds of one decoding step for each storage of the table."""
    threads = torch.get_num_threads()
    table = Table(title=f"one token a sequence on {device}, {threads} threads, medians in ms")
    for column in ("sequences", "value table"):
        table.add_column(column)
    for column in ("step", "memory layers", "share", "times float32"):
        table.add_column(column, justify="right")
    before = None
    for result in results:
        if before not in (None, result.batch):
            table.add_section()
        table.add_row(
            str(result.batch) if before != result.batch else "",
            result.storage,
            f"{result.step_ms:,.2f}",
            f"{result.memory_ms:,.2f}",
            f"{result.memory_share:.0%}",
            f"{result.memory_over_float32:.2f}",
        )
        before = result.batch
    return table


def memory_table(results: Sequence[MemoryResult], *, device: torch.device) -> Group:
    """Time to the first token, rate after it, and bytes; then stages; by format and batch."""
    threads = torch.get_num_threads()
    answers = Table(title=f"one decoder on {device}, {threads} threads, medians")
    stages = Table(title="stages, p50 / p95 in ms")
    for table in (answers, stages):
        table.add_column("prompts", justify="right")
        table.add_column("format", no_wrap=True)
    for column in ("first token, ms", "text's over it", "tokens/s", "of none's", "KiB/reference"):
        answers.add_column(column, justify="right")
    for stage in STAGES:
        stages.add_column(stage, justify="right")
    by_name = {(result.batch, result.format): result for result in results}
    before = None
    for result in results:
        if before not in (None, result.batch):
            answers.add_section()
            stages.add_section()
        batch = str(result.batch) if before != result.batch else ""
        before = result.batch
        text, none = (by_name[result.batch, name] for name in ("text", "none"))
        answers.add_row(
            batch,
            result.format,
            f"{result.ttft_ms:,.0f}",
            f"{text.ttft_ms / result.ttft_ms:.2f}",
            f"{result.tokens_per_s:,.1f}",
            f"{result.tokens_per_s / none.tokens_per_s:.2f}",
            f"{result.kib_per_reference:,.1f}",
        )
        spreads = [result.stages.get(stage) for stage in STAGES]
        shown = ["" if s is None else f"{_ms(s.p50_ms)} / {_ms(s.p95_ms)}" for s in spreads]
        stages.add_row(batch, result.format, *shown)
    return Group(answers, stages)


def _ms(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"

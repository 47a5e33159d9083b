"""`strata eval tasks`: published benchmarks with and without memory, in one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strata.cli.bank import AsJson, DeviceOption
from strata.errors import ConfigError

if TYPE_CHECKING:
    from strata.evals.effective_size import EffectiveSizes
    from strata.evals.scoring import Progress
    from strata.evals.task_runs import GivenBank, TaskResult


def evaluate_tasks(
    tasks: Annotated[
        str,
        typer.Option(
            help="names with commas; general, medicine, law, hallucination or all; task .yaml files"
        ),
    ] = "all",
    model: Annotated[
        Path | None, typer.Option("--model", help="folder written by save_pretrained")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the benchmarks' files")] = None,
    memory: Annotated[
        list[str] | None, typer.Option(help="none, text, explicit (repeatable; default none)")
    ] = None,
    bank: Annotated[
        list[str] | None,
        typer.Option(help="BANK, or GROUP=BANK or TASK=BANK for some tasks only (repeatable)"),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="search by vector, text, hybrid or queries")
    ] = None,
    top_k: Annotated[int, typer.Option(help="references a question")] = 5,
    leak_threshold: Annotated[
        float,
        typer.Option(
            help="leave out references of which more than this share stands in the question and "
            "its answers; 1: leave out none"
        ),
    ] = 2 / 3,
    num_fewshot: Annotated[int | None, typer.Option(help="worked examples a question")] = None,
    limit: Annotated[int | None, typer.Option(help="first questions of each task only")] = None,
    batch_size: Annotated[int, typer.Option(help="sequences of one forward pass")] = 16,
    baselines: Annotated[
        Path | None,
        typer.Option(help="JSON of two dense models' scores, for the effective size"),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="let tasks run code that the model wrote")
    ] = False,
    device: DeviceOption = "auto",
    list_tasks: Annotated[bool, typer.Option("--list", help="show the tasks and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask one decoder published benchmarks, with and without memory. Run again, it goes on.

    A question's references are searched for with the question, leaks are left out, and what is left
    stands before the prompt as text, or is read as memories.
    """
    if list_tasks:
        _list(as_json=as_json)
        return
    if model is None or out is None:
        raise ConfigError(f"give {'--model' if model is None else '--out'} (or --list)")
    memories = tuple(dict.fromkeys(memory or ["none"]))
    _check(memories, bank, top_k, leak_threshold, num_fewshot, limit, batch_size)

    from rich.console import Console

    from strata.cli.device import open_model
    from strata.evals.benchmarks import choose
    from strata.evals.effective_size import read_baselines
    from strata.evals.lm_eval_adapter import check_installed
    from strata.evals.task_runs import TaskSettings, run_benchmarks, write_json, write_text
    from strata.evals.task_table import (
        leak_filter_line,
        results_json,
        results_markdown,
        results_tables,
    )

    check_installed()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    chosen = choose(names, data=data, allow_code=allow_code)
    dense = None if baselines is None else read_baselines(baselines)
    if allow_code:
        _allow_code()
    decoder, tokenizer = open_model(model, device=device)
    banks = _banks(bank or [], chosen, decoder, tokenizer, memories, by=by, device=device)
    if banks:
        Console(stderr=True).print(leak_filter_line(leak_threshold), highlight=False)

    def write(results: Sequence[TaskResult]) -> dict[str, EffectiveSizes]:
        sizes = {} if dense is None else _sizes(results, dense)
        tree = results_json(results, leak_threshold=leak_threshold, sizes=sizes)
        write_json(out / "table.json", {"model": str(model), **tree})
        shown = results_markdown(
            results, model=str(model), leak_threshold=leak_threshold, sizes=sizes
        )
        write_text(out / "table.md", shown)
        return sizes

    results = run_benchmarks(
        decoder,
        tokenizer,
        chosen,
        memories,
        banks=banks,
        settings=TaskSettings(
            data=data, num_fewshot=num_fewshot, limit=limit, top_k=top_k,
            leak_threshold=leak_threshold, batch_size=batch_size, allow_code=allow_code,
        ),
        out=out,
        progress=_progress,
        on_result=write,
    )  # fmt: skip
    sizes = write(results)
    if as_json:
        tree = results_json(results, leak_threshold=leak_threshold, sizes=sizes)
        print(json.dumps({"model": str(model), **tree}))
        return
    console = Console()
    for table in results_tables(results, sizes=sizes):
        console.print(table)
    if banks:
        console.print(leak_filter_line(leak_threshold), highlight=False)
    print(f"{out / 'table.md'}, {out / 'table.json'}: the same; results/: every figure")


def _check(
    memories: Sequence[str],
    bank: list[str] | None,
    top_k: int,
    leak_threshold: float,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> None:
    """Raise ConfigError for the first option out of its range."""
    for name in memories:
        if name not in ("none", "text", "explicit"):
            raise ConfigError(f"--memory {name!r}: give none, text or explicit")
    if set(memories) != {"none"} and not bank:
        raise ConfigError(f"--memory {memories[-1]} needs a bank: give --bank")
    for option, number in (
        ("--top-k", top_k), ("--limit", limit), ("--batch-size", batch_size),
    ):  # fmt: skip
        if number is not None and number < 1:
            raise ConfigError(f"{option} {number}: give 1 or more")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"--num-fewshot {num_fewshot}: give 0 or more")
    if not 0 <= leak_threshold <= 1:
        raise ConfigError(f"--leak-threshold {leak_threshold}: give 0 to 1")


def _banks(
    given: Sequence[str],
    chosen: Sequence[Any],
    model: Any,
    tokenizer: Any,
    memories: Sequence[str],
    *,
    by: str | None,
    device: str,
) -> dict[str, GivenBank]:
    """Banks by what they are for; nothing is opened where no memory is asked for."""
    from strata.evals.benchmarks import BENCHMARKS, GROUPS
    from strata.evals.task_runs import GivenBank
    from strata.explicit.bank import Bank
    from strata.explicit.source import open_retriever

    if set(memories) == {"none"}:
        return {}
    names = {*GROUPS, *(one.name for one in (*BENCHMARKS, *chosen))}
    banks: dict[str, GivenBank] = {}
    for text in given:
        target, separator, path = text.partition("=")
        if not separator or target not in names:
            target, path = "", text
        if target in banks:
            raise ConfigError(f"--bank {text!r}: {target or 'all tasks'} has a bank already")
        opened = Bank.open(path)
        kind: Any = by  # checked there
        encoder = None
        if "explicit" in memories or by == "queries":
            encoder = opened.use(model, tokenizer).encoder
        retriever = open_retriever(opened, kind, device=device, encoder=encoder)
        way = by or ("text" if opened.embedder_name is None else "hybrid")
        banks[target] = GivenBank(opened, retriever, f"{way}, {opened.embedder_name}")
    return banks


def _sizes(results: Sequence[TaskResult], dense: Any) -> dict[str, EffectiveSizes]:
    """The effective size for each memory, over the tasks that have both results so far."""
    from strata.evals.effective_size import effective_sizes
    from strata.evals.task_table import percent_scores

    without = percent_scores(results, "none")
    known = dense.small.scores.keys() & dense.large.scores.keys()
    sizes = {}
    for memory in dict.fromkeys(result.memory for result in results):
        scores = percent_scores(results, memory)
        if memory != "none" and without.keys() & scores.keys() & known:
            sizes[memory] = effective_sizes(without, scores, dense)
    return sizes


def _list(*, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from strata.evals.benchmarks import BENCHMARKS

    rows: list[Mapping[str, str]] = [
        {
            "task": one.name, "group": one.group, "metric": one.metric,
            "data": one.file or f"hub: {one.source}", "title": one.title,
        }
        for one in BENCHMARKS
    ]  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def _allow_code() -> None:
    """The package behind the harness's code figures asks for this word too."""
    import os

    os.environ["HF_ALLOW_CODE_EVAL"] = "1"


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    from strata.cli.eval import _progress as bar

    with bar(title) as progress:
        yield progress

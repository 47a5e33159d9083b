"""`strata eval`: benchmarks, closed-book recall and loss of one model, in one table."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from strata.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from strata.evals.lm_eval_adapter import TaskSet
    from strata.evals.questions import Question
    from strata.evals.recall import OpenRecallResult, RecallResult
    from strata.evals.report import Measure
    from strata.evals.scoring import Progress


class ModelOrVerb(TyperGroup):
    """`strata eval MODEL ...` is `strata eval model MODEL ...`; the other verbs are named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["model", *args]
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class EvalRequest:
    """What to measure, as the command line gave it.

    Attributes:
        tasks: task names and task files.
        num_fewshot: worked examples a question; None leaves it to each task.
        limit: first questions of each task or file only.
        recall: question files, scored under teacher forcing.
        open_recall: question files whose answers the model writes.
        template: prompt of rows with a `question`.
        end: text whose last token also ends an answer, besides eos.
        max_new_tokens: longest written answer.
        loss: prepared token folders and text files.
        text_field: of rows of text files.
        split: of prepared token folders.
        sequence_tokens: window of the loss; None is the model's context, at most 2,048.
        isolate: read every document of the loss alone.
        batch_size: sequences of one forward pass, at most.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None
    limit: int | None
    recall: tuple[Path, ...]
    open_recall: tuple[Path, ...]
    template: str
    end: str
    max_new_tokens: int
    loss: tuple[Path, ...]
    text_field: str
    split: str
    sequence_tokens: int | None
    isolate: bool
    batch_size: int

    def check(self) -> None:
        """Raise ConfigError for the first setting out of its range."""
        if not (self.tasks or self.recall or self.open_recall or self.loss):
            raise ConfigError("nothing to measure: give --tasks, --recall, --open-recall or --loss")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size}: give 1 or more")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: give 1 or more")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"--num-fewshot {self.num_fewshot}: give 0 or more")
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: give 1 or more")


def evaluate(
    model: Path = typer.Argument(help="Folder written by save_pretrained or strata train."),
    tasks: str = typer.Option(
        "", help="Comma-separated lm-eval task names and task .yaml files over local data."
    ),
    num_fewshot: int | None = typer.Option(None, help="Worked examples in front of a question."),
    recall: list[Path] = typer.Option(
        [], help="Question file (.jsonl, .jsonl.gz): exact answers and their likelihood."
    ),
    open_recall: list[Path] = typer.Option(
        [], help="Question file (.jsonl, .jsonl.gz): the model writes, its text is compared."
    ),
    template: str = typer.Option(
        r"Question: {question}\nAnswer:", help=r"Prompt of a question; \n is a line break."
    ),
    end: str = typer.Option("", help=r"Text that ends an answer besides eos, such as \n."),
    max_new_tokens: int = typer.Option(32, help="Longest written answer, in tokens."),
    loss: list[Path] = typer.Option(
        [], help="Folder written by strata data prepare, or a text file."
    ),
    text_field: str = typer.Option("text", help="Field or column of a text for the loss."),
    split: str = typer.Option("val", help="Split of a prepared folder: train or val."),
    sequence_tokens: int | None = typer.Option(
        None, help="Window of the loss, in tokens; default: the model's context, at most 2048."
    ),
    isolate: bool = typer.Option(
        False, "--isolate", help="Read every document of the loss alone, not in one stream."
    ),
    limit: int | None = typer.Option(None, help="First questions of each task or file only."),
    batch_size: int = typer.Option(16, help="Sequences of one forward pass."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    values: str | None = typer.Option(
        None, help="Value tables: int8, fp8 or mapped (left on disk); default: as saved."
    ),
    cache_gb: float = typer.Option(1.0, help="Memory for hot rows of mapped tables, GiB."),
    out: Path | None = typer.Option(None, help="JSON file for the figures and every answer."),
    as_json: bool = typer.Option(False, "--json", help="JSON instead of a table."),
) -> None:
    """Measure a model: benchmarks, closed-book recall, loss. Several at once are allowed."""
    request = EvalRequest(
        tasks=tuple(task.strip() for task in tasks.split(",") if task.strip()),
        num_fewshot=num_fewshot,
        limit=limit,
        recall=tuple(recall),
        open_recall=tuple(open_recall),
        template=_unescape(template),
        end=_unescape(end),
        max_new_tokens=max_new_tokens,
        loss=tuple(loss),
        text_field=text_field,
        split=split,
        sequence_tokens=sequence_tokens,
        isolate=isolate,
        batch_size=batch_size,
    )
    request.check()
    _check_out(out)

    from rich.console import Console

    from strata.cli.device import open_model
    from strata.evals.report import Report

    # All input is read before the model: a faulty file should not end hours of work.
    questions = _read_questions(request)
    texts = [path for path in request.loss if _must_exist(path)]
    task_set = _find_tasks(request)
    opened, tokenizer = open_model(model, device=device, values=values, cache_gb=cache_gb)

    measures: list[Measure] = []
    records: dict[str, list[dict[str, Any]]] = {}
    for path in texts:
        measures.extend(_loss(opened, tokenizer, path, request=request))
    for path in request.recall:
        scored = _recall(opened, tokenizer, path, questions=questions[path], request=request)
        measures.extend(scored.measures(str(path)))
        records[f"recall {path}"] = [asdict(question) for question in scored.questions]
    for path in request.open_recall:
        written = _open_recall(opened, tokenizer, path, questions=questions[path], request=request)
        measures.extend(written.measures(str(path)))
        records[f"open recall {path}"] = [asdict(answer) for answer in written.answers]
    if task_set is not None:
        measures.extend(_tasks(opened, tokenizer, task_set, request=request))

    report = Report(model=str(model), measures=tuple(measures), records=records)
    if out is not None:
        _save(out, json.dumps(report.to_json(records=True), ensure_ascii=False, indent=1))
    if as_json:
        print(json.dumps(report.to_json(records=False)))
    else:
        Console().print(report.table())


def _read_questions(request: EvalRequest) -> dict[Path, list[Question]]:
    from strata.evals.questions import read_questions

    return {
        path: read_questions(path, template=request.template)[: request.limit]
        for path in dict.fromkeys((*request.recall, *request.open_recall))
    }


def _must_exist(path: Path) -> bool:
    if not path.exists():
        raise DataError(f"--loss {path}: no such file or folder")
    return True


def _find_tasks(request: EvalRequest) -> TaskSet | None:
    if not request.tasks:
        return None
    from rich.console import Console

    from strata.evals.lm_eval_adapter import load_tasks

    # The harness reads thousands of task files to know its own names; that takes seconds.
    with Console(stderr=True).status("finding the tasks and their data"):
        return load_tasks(request.tasks, num_fewshot=request.num_fewshot)


def _recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    questions: list[Question],
    request: EvalRequest,
) -> RecallResult:
    from strata.evals.recall import recall

    with _progress(f"recall, {path.name}") as progress:
        return recall(
            model,
            questions,
            tokenizer=tokenizer,
            terminators=_terminators(tokenizer, request.end),
            batch_size=request.batch_size,
            progress=progress,
        )


def _open_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    questions: list[Question],
    request: EvalRequest,
) -> OpenRecallResult:
    from strata.evals.recall import open_recall

    with _progress(f"open recall, {path.name}") as progress:
        return open_recall(
            model,
            questions,
            tokenizer=tokenizer,
            max_new_tokens=request.max_new_tokens,
            batch_size=request.batch_size,
            progress=progress,
        )


def _loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    request: EvalRequest,
) -> tuple[Measure, ...]:
    from strata.evals.loss import folder_loss, is_token_folder, text_loss

    with _progress(f"loss, {path.name}") as progress:
        if is_token_folder(path):
            result = folder_loss(
                model,
                path,
                split=request.split,
                tokenizer=tokenizer,
                isolate=request.isolate,
                sequence_tokens=request.sequence_tokens,
                batch_size=request.batch_size,
                progress=progress,
            )
        else:
            result = text_loss(
                model,
                [path],
                tokenizer=tokenizer,
                text_field=request.text_field,
                isolate=request.isolate,
                sequence_tokens=request.sequence_tokens,
                batch_size=request.batch_size,
                progress=progress,
            )
    return result.measures(str(path))


def _tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task_set: TaskSet,
    *,
    request: EvalRequest,
) -> tuple[Measure, ...]:
    from strata.evals.lm_eval_adapter import run_tasks

    return run_tasks(
        model,
        task_set,
        tokenizer=tokenizer,
        limit=request.limit,
        batch_size=request.batch_size,
    )


def _terminators(tokenizer: PreTrainedTokenizerBase, end: str) -> tuple[int, ...]:
    """Token ids that end an answer: eos, and the one token of `end` if given."""
    ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if end:
        tokens = tokenizer(end, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1:
            raise ConfigError(f"--end {end!r} is {len(tokens)} tokens here: give a text of one")
        ids += tokens
    return tuple(ids)


@contextlib.contextmanager
def _progress(description: str) -> Iterator[Progress]:
    from strata.data.progress import ProgressBar

    with ProgressBar(description, total=1.0, enabled=True) as bar:
        yield lambda done, total: bar.update(done / total, note=f"{done:,} of {total:,}")


def _unescape(text: str) -> str:
    """A shell has no easy way to write a line break: a typed `\\n` or `\\t` stands for it."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def _check_out(out: Path | None) -> None:
    """Find out before hours of work, not after, that the result could not be written."""
    if out is None:
        return
    if out.exists() and not out.is_file():
        kind = "a folder" if out.is_dir() else "not a regular file"
        raise StorageError(f"--out {out} is {kind}: give the path of a JSON file")
    if not out.parent.is_dir():
        raise StorageError(f"--out {out}: there is no folder {out.parent}, create it first")


def _save(out: Path, text: str) -> None:
    """Write so that the file is either the old one or the whole new one."""
    partial = out.with_name(out.name + ".partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise  # the command line has its own line for a full disk
        raise StorageError(f"--out {out} cannot be written: {error.strerror}") from None
    print(f"wrote {out}", file=sys.stderr)

"""Benchmarks under every memory setting, each result written once and found again.

A folder holds

    results/TASK.MEMORY.json                 figures, what was given, and for which settings
    unfinished/TASK.MEMORY.SETTINGS.jsonl    answers of a task that was interrupted
    table.json, table.md                     what was asked for last, written after each task

A result under the same settings is not computed again; one under others is refused, not replaced.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from strata.errors import BankError, ConfigError, DataError
from strata.evals.bank_reading import BankReading
from strata.evals.benchmarks import Benchmark
from strata.evals.lm_eval_adapter import (
    TaskSet,
    check_installed,
    check_names,
    evaluate_tasks,
    load_tasks,
    task_file_data,
)
from strata.evals.question_references import QuestionReferences, Tally
from strata.evals.report import Measure
from strata.evals.response_log import ResponseLog
from strata.evals.scoring import Progress, encode_completion, evaluation_mode
from strata.explicit.bank import Bank
from strata.explicit.fingerprint import tokenizer_sha256, weights_sha256
from strata.explicit.retrieve import Retriever
from strata.explicit.source import BankSource
from strata.files import replace_text, sha256_of, storage_errors

MAX_RESULT_BYTES = 64 << 20
_BOOTSTRAP_ITERS = 1000  # for perplexity alone; the harness's 100,000 take minutes of all cores


@dataclass(frozen=True)
class GivenBank:
    """A bank that questions are searched in.

    Attributes:
        bank: any; that of the model where memories are read.
        retriever: over it.
        by: how it searches, for the record.
    """

    bank: Bank
    retriever: Retriever
    by: str


@dataclass(frozen=True)
class TaskSettings:
    """How benchmarks are run.

    Attributes:
        data: folder of the files; None where no benchmark has one.
        num_fewshot: worked examples; each task's own number when None.
        limit: first questions of each task only; all when None.
        top_k: references a question.
        leak_threshold: of the filter, see `QuestionReferences`.
        batch_size: sequences of one forward pass; changes no more than last bits.
        allow_code: let tasks run what the model wrote.
    """

    data: Path | None
    num_fewshot: int | None
    limit: int | None
    top_k: int
    leak_threshold: float
    batch_size: int
    allow_code: bool = False


@dataclass(frozen=True)
class TaskResult:
    """One benchmark under one memory setting.

    Attributes:
        task, group: of the benchmark.
        memory: none, text or explicit.
        measure: the figure of the table.
        measures: all figures.
        tally: what the questions were given.
        settings: what the figures hold for.
        seconds: the run that ended it took.
    """

    task: str
    group: str
    memory: str
    measure: Measure
    measures: tuple[Measure, ...]
    tally: Tally
    settings: Mapping[str, Any]
    seconds: float


def run_benchmarks(
    model: PreTrainedModel,
    tokenizer: Any,
    benchmarks: Sequence[Benchmark],
    memories: Sequence[str],
    *,
    banks: Mapping[str, GivenBank],
    settings: TaskSettings,
    out: Path,
    progress: Callable[[str], AbstractContextManager[Progress | None]] | None = None,
    on_result: Callable[[Sequence[TaskResult]], object] | None = None,
) -> list[TaskResult]:
    """Ask every benchmark with every memory; what `out` holds already is not asked again.

    Args:
        model, tokenizer: a causal language model.
        benchmarks: from `benchmarks.choose`.
        memories: some of none, text and explicit.
        banks: by benchmark name or group, or "" for all others; for text and explicit.
        settings: the same for all.
        out: folder; made where it is missing.
        progress: given a title, is told of the requests of one task meanwhile.
        on_result: told of all results so far, after each.

    Returns:
        A result for each benchmark and memory, benchmark by benchmark.

    Raises:
        ConfigError: no bank for a benchmark, an unknown memory, or results of other settings.
        DataError: a task's data cannot be read.
        BankError: another model's bank, for explicit memory.
        StorageError: `out` cannot be written.
    """
    check_installed()
    from strata.evals.memory_lm import MEMORIES

    for memory in memories:
        if memory not in MEMORIES:
            raise ConfigError(f"no memory {memory!r}: give some of {', '.join(MEMORIES)}")
    for one in benchmarks:
        if set(memories) != {"none"} and _bank_of(one, banks) is None:
            raise ConfigError(f"task {one.name} ({one.group}) has no bank: give one with --bank")
    check_names([one.source for one in benchmarks if not _has_file(one)])
    with storage_errors(out):
        for folder in (out / "results", out / "unfinished"):
            folder.mkdir(parents=True, exist_ok=True)
    runner = _Runner(model, tokenizer, banks, settings, out)
    wanted = {
        (one.name, memory): runner.settings_of(one, memory)
        for one in benchmarks
        for memory in memories
    }
    for key, own in wanted.items():  # before hours of work, not after
        read_result(_result_path(out, *key), own)
    results: list[TaskResult] = []
    for one in benchmarks:
        tasks: TaskSet | None = None
        for memory in memories:
            own = wanted[one.name, memory]
            result = read_result(_result_path(out, one.name, memory), own)
            if result is None:
                tasks = tasks or runner.load(one)
                with (progress or _silent)(f"{one.name}, {memory}") as told:
                    result = runner.run(one, tasks, memory, own, told)
            results.append(result)
            if on_result is not None:
                on_result(results)
    return results


@contextmanager
def _silent(_: str) -> Iterator[None]:
    yield None


class _Runner:
    """What all tasks of a run share."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        banks: Mapping[str, GivenBank],
        settings: TaskSettings,
        out: Path,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._banks, self._settings, self._out = banks, settings, out
        self._identity = {
            "weights": weights_sha256(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_sha256(tokenizer),
        }
        self._digests: dict[int, str] = {}
        self._readings: dict[int, BankReading] = {}
        self._sources: list[BankSource] = []

    def settings_of(self, one: Benchmark, memory: str) -> dict[str, Any]:
        """Everything that the figures of one benchmark and memory depend on."""
        own: dict[str, Any] = {
            "task": _task_identity(one, self._settings.data),
            "lm_eval": importlib.metadata.version("lm_eval"),
            "num_fewshot": self._settings.num_fewshot,
            "limit": self._settings.limit,
            "model": self._identity,
            "memory": memory,
        }
        given = _bank_of(one, self._banks)
        if memory != "none" and given is not None:
            own |= {
                "bank": self._digest(given.bank),
                "search": given.by,
                "top_k": self._settings.top_k,
                "leak_threshold": self._settings.leak_threshold,
            }
        if memory == "explicit" and given is not None:
            self._reading(given)  # another model's bank is refused before any work
            own["bank_memory"] = given.bank.settings.config.model_dump(mode="json")
        return own

    def load(self, one: Benchmark) -> TaskSet:
        """The benchmark's tasks with their data."""
        data, num_fewshot = self._settings.data, self._settings.num_fewshot
        return load_tasks([one.source], num_fewshot=num_fewshot, data=data)

    def run(
        self,
        one: Benchmark,
        tasks: TaskSet,
        memory: str,
        own: Mapping[str, Any],
        progress: Progress | None,
    ) -> TaskResult:
        """Ask one benchmark with one memory and write what comes out."""
        from strata.evals.memory_lm import MemoryLM

        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
        answered = self._out / "unfinished" / f"{one.name}.{memory}.{digest}.jsonl"
        references = reading = None
        given = _bank_of(one, self._banks)
        if memory != "none" and given is not None:
            references = QuestionReferences(
                given.retriever,
                lambda text: encode_completion(self._tokenizer, text),
                top_k=self._settings.top_k,
                leak_threshold=self._settings.leak_threshold,
            )
            reading = self._reading(given) if memory == "explicit" else None
        log = ResponseLog(answered)
        begin_s = time.perf_counter()
        with evaluation_mode(self._model):
            asked = MemoryLM(
                self._model,
                self._tokenizer,
                tasks=tasks.tasks,
                batch_size=self._settings.batch_size,
                references=references,
                reading=reading,
                log=log,
                progress=progress,
            )
            found = evaluate_tasks(
                asked,
                tasks,
                limit=self._settings.limit,
                bootstrap_iters=_BOOTSTRAP_ITERS,
                allow_code=self._settings.allow_code,
            )
        measures = tuple(map(_finite, found))
        self._save()
        result = TaskResult(
            task=one.name,
            group=one.group,
            memory=memory,
            measure=_main(one, tasks, measures),
            measures=measures,
            tally=asked.tally,
            settings=own,
            seconds=time.perf_counter() - begin_s,
        )
        write_json(_result_path(self._out, one.name, memory), asdict(result))
        answered.unlink(missing_ok=True)
        return result

    def _save(self) -> None:
        """Keep memories that were written for questions, so that the next run loads them."""
        for source in self._sources:
            try:
                source.save()
            except BankError as error:
                warnings.warn(f"memories made now were not stored: {error}", stacklevel=2)

    def _digest(self, bank: Bank) -> str:
        if id(bank) not in self._digests:
            self._digests[id(bank)] = bank.digest(memories=False)
        return self._digests[id(bank)]

    def _reading(self, given: GivenBank) -> BankReading:
        if id(given.bank) not in self._readings:
            source = BankSource.of(
                given.bank, self._model, self._tokenizer, retriever=given.retriever
            )
            self._sources.append(source)
            self._readings[id(given.bank)] = BankReading(self._model, self._tokenizer, source)
        return self._readings[id(given.bank)]


def read_result(path: Path, settings: Mapping[str, Any]) -> TaskResult | None:
    """A result that was written, or None.

    Raises:
        ConfigError: it holds for other settings.
        DataError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        if path.stat().st_size > MAX_RESULT_BYTES:
            raise ValueError
        tree = json.loads(path.read_bytes())
        result = TaskResult(
            task=tree["task"],
            group=tree["group"],
            memory=tree["memory"],
            measure=Measure(**tree["measure"]),
            measures=tuple(Measure(**measure) for measure in tree["measures"]),
            tally=Tally.read(tree["tally"]),
            settings=dict(tree["settings"]),
            seconds=float(tree["seconds"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged: delete it, and it is computed again") from None
    wanted = json.loads(json.dumps(settings))
    if result.settings != wanted:
        names = {*result.settings, *wanted}
        other = [n for n in sorted(names) if result.settings.get(n) != wanted.get(n)]
        raise ConfigError(
            f"{path} holds for another {', '.join(other)} than now: give another --out, or delete "
            "it"
        )
    return result


def _bank_of(one: Benchmark, banks: Mapping[str, GivenBank]) -> GivenBank | None:
    return banks.get(one.name) or banks.get(one.group) or banks.get("")


def _has_file(one: Benchmark) -> bool:
    return one.source.endswith((".yaml", ".yml"))


def _task_identity(one: Benchmark, data: Path | None) -> dict[str, Any]:
    if not _has_file(one):
        return {"hub": one.source}
    path = Path(one.source)
    if not path.is_file():
        raise ConfigError(f"no task file at {path}: give a task .yaml or a task name")
    files = {file.name: sha256_of(file) for file in task_file_data(path, data)}
    return {"file": path.name, "sha256": sha256_of(path), "data": files}


def _main(one: Benchmark, tasks: TaskSet, measures: Sequence[Measure]) -> Measure:
    """The figure of the table: of the group, where the benchmark is one, and of its metric."""
    whole = next(iter(tasks.groups or tasks.tasks))
    own = [measure for measure in measures if measure.source == whole] or list(measures)
    named = [measure for measure in own if measure.metric.partition(" (")[0] == one.metric]
    if not (named or own):
        raise ConfigError(f"task {one.name} gives no figure: it has no metric that can be averaged")
    return (named or own)[0]


def _finite(measure: Measure) -> Measure:
    """JSON has no NaN: such a figure is none."""
    value, stderr = (
        number if number is not None and math.isfinite(number) else None
        for number in (measure.value, measure.stderr)
    )
    return replace(measure, value=value, stderr=stderr)


def _result_path(out: Path, task: str, memory: str) -> Path:
    return out / "results" / f"{task}.{memory}.json"


def write_json(path: Path, tree: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(tree, ensure_ascii=False, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write so that the file is either the old one or the whole new one."""
    with storage_errors(path):
        replace_text(path, text + "\n")

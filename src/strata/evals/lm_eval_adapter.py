"""Published benchmarks through lm-eval-harness, by task name or by a task file over local data.

The harness (`pip install 'strata-lm[eval]'`) is imported only when a task is run. A name such as
`arc_easy` is a task of the harness and reads its data from the Hugging Face hub; a path ending in
`.yaml` is a task of one's own, whose data may lie beside it and needs no network.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.errors import ConfigError, DataError
from strata.evals.report import Measure
from strata.evals.scoring import check_batch_size

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")
SEED = 1234  # the harness's own default: the same worked examples as its command line picks


@dataclass(frozen=True)
class TaskSet:
    """Tasks of the harness with their data, ready to be run.

    Attributes:
        tasks: the harness's task objects by name.
        groups: the harness's group objects by name; their figures are means over tasks.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]


def load_tasks(
    names: Sequence[str], *, num_fewshot: int | None = None, data: Path | None = None
) -> TaskSet:
    """Find tasks and read their data.

    Args:
        names: tasks, groups or tags of the harness, and paths of task files (`.yaml`). Relative
            `data_files` of a task file are looked for beside the file, then in `data`, then in
            the working folder.
        num_fewshot: worked examples in front of each question; each task's own number when None.
            A task that fixes the number at 0 keeps it.
        data: a folder of data files.

    Raises:
        ConfigError: the harness is not installed, a task is unknown or cannot be built.
        DataError: the data of a task is on the hub and the hub cannot be reached.
    """
    if not names:
        raise ConfigError("no task: give a task name or the path of a task .yaml")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num-fewshot {num_fewshot} is not allowed: give 0 or more")
    check_installed()
    files = [name for name in names if _is_task_file(name)]
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"no task file at {file}: give a task .yaml or a task name")
    manager = _manager(include_defaults=len(files) < len(names))
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        part = _load_file(Path(name), manager, data) if name in files else _load(name, manager)
        tasks.update(part["tasks"])
        groups.update(part.get("groups", {}))
    for task in tasks.values():
        _set_fewshot(task, num_fewshot)
    return TaskSet(tasks=tasks, groups=groups)


def run_tasks(
    model: PreTrainedModel,
    tasks: TaskSet,
    *,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    batch_size: int = 8,
) -> tuple[Measure, ...]:
    """Evaluate a model on tasks of lm-eval-harness.

    Args:
        model: a causal language model on any device.
        tasks: made by `load_tasks`.
        tokenizer: the model's tokenizer.
        limit: first questions of each task only, for a trial; all when None.
        batch_size: sequences of one forward pass.

    Returns:
        The figures of every task and group.

    Raises:
        ConfigError: limit or batch size is below one, or a task asks for what its data lacks.
    """
    check_batch_size(batch_size)
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    try:
        with known_warnings_off():
            harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        return evaluate_tasks(harness_model, tasks, limit=limit)
    finally:
        model.train(was_training)


def evaluate_tasks(
    harness_model: HFLM,
    tasks: TaskSet,
    *,
    limit: int | None = None,
    bootstrap_iters: int = 100_000,
    allow_code: bool = False,
) -> tuple[Measure, ...]:
    """Run the harness over tasks with a model of its own kind; the same tasks may be run again.

    Args:
        harness_model: answers the requests.
        tasks: made by `load_tasks`.
        limit: first questions of each task only; all when None.
        bootstrap_iters: resamples for the standard errors of figures that are no mean.
        allow_code: let tasks run what the model wrote.

    Raises:
        ConfigError: limit is below one, a task runs code and may not, or asks for what its data
            or the model's context lacks.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} is not allowed: give 1 or more questions a task")
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate

    for name, task in tasks.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not allow_code:
            raise ConfigError(f"task {name} runs code that the model writes, which is not allowed")
        # Samplers go on where the run before left them: worked examples would differ.
        task.set_fewshot_seed(seed=SEED)
    try:
        with _resampling_here():
            found = evaluate(
                lm=harness_model,
                task_dict={"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)},
                limit=limit,
                log_samples=False,
                bootstrap_iters=bootstrap_iters,
                confirm_run_unsafe_code=allow_code,
            )
    except TemplateError as error:
        raise ConfigError(f"a task's template does not fit its data: {_cause(error)}") from error
    except AssertionError as error:
        # The harness asserts what it cannot run; an assertion of ours or the model's stays one.
        if "lm_eval" not in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts:
            raise
        reason = _one_line(error) or "an answer alone is longer than it"
        context = harness_model.max_length
        raise ConfigError(f"a task exceeds the model's context of {context}: {reason}") from error
    assert found is not None, "one process evaluates: the harness answers on rank 0"
    return tuple(_measures(found))


@functools.cache
def _manager(*, include_defaults: bool) -> TaskManager:
    """The index of the harness's own tasks takes seconds to read; task files do not need it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def task_file_data(path: Path, data: Path | None) -> list[Path]:
    """The local files that a task file reads, as `load_tasks` finds them, in order."""
    config = _read_task_file(path)
    kwargs = _beside(config, (path.parent, *([data] if data else []))).get("dataset_kwargs") or {}
    return [Path(file) for file in _flat(kwargs.get("data_files")) if Path(file).is_file()]


def _flat(files: Any) -> Iterator[str]:
    if isinstance(files, str):
        yield files
    elif isinstance(files, dict | list):
        for part in files.values() if isinstance(files, dict) else files:
            yield from _flat(part)


def check_installed() -> None:
    """Raise ConfigError unless lm-eval-harness can be imported."""
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tasks need lm-eval-harness ({error.name} is missing): pip install 'strata-lm[eval]'"
        ) from None


def _is_task_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for the first name that is no task of the harness; takes seconds."""
    for name in names:
        _check_name(name, _manager(include_defaults=True))


def _check_name(name: str, manager: TaskManager) -> None:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=5)
        hint = f"near to it: {', '.join(near)}" if near else "see `lm_eval ls tasks`"
        raise ConfigError(f"no task {name!r} in lm-eval-harness ({hint}); a file ends in .yaml")


def _load(name: str, manager: TaskManager) -> Mapping[str, Any]:
    """Build a task of the harness by its name."""
    _check_name(name, manager)
    try:
        return manager.load([name])
    except ConnectionError as error:
        raise DataError(
            f"task {name!r} reads its data from the Hugging Face hub, which cannot be reached "
            f"({_one_line(error)}): connect, or give a task .yaml over local files"
        ) from None
    except Exception as error:
        raise ConfigError(f"task {name!r} cannot be built: {_cause(error)}") from error


def _read_task_file(path: Path) -> dict[str, Any]:
    """A task file's content, its functions found.

    Raises:
        ConfigError: not a task file.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {_one_line(error)}") from None
    except Exception as error:  # a faulty !function or include, or not a mapping
        raise ConfigError(f"{path} cannot be read: {_cause(error)}") from error
    if "group" in config:
        raise ConfigError(f"{path} is a group: give the task files it is made of")
    if not isinstance(config.get("task"), str):
        raise ConfigError(f"{path} has no 'task' key: an lm-eval task file names its task")
    kwargs = config.get("dataset_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ConfigError(f"{path}: dataset_kwargs must be a mapping, not {kwargs!r:.40}")
    if config.get("dataset_path") in FILE_FORMATS and not {"data_files", "data_dir"} & set(kwargs):
        # datasets would take every such file under the working folder, after minutes of walking it
        raise ConfigError(
            f"{path}: dataset_path {config['dataset_path']} needs dataset_kwargs.data_files"
        )
    return config


def _load_file(path: Path, manager: TaskManager, data: Path | None) -> Mapping[str, Any]:
    """Build the task of a task file, its data looked for beside it and in a data folder."""
    config = _read_task_file(path)
    folders = (path.parent, *([data] if data else []))
    try:
        with _download_counts_off():
            return manager.load([_beside(config, folders)])
    except ConnectionError as error:
        raise DataError(f"{path}: the hub cannot be reached ({_one_line(error)})") from None
    # A task file is the user's program for the harness, and may fail there in any way.
    except Exception as error:
        raise ConfigError(f"{path}: the task cannot be built: {_cause(error)}") from error


def _beside(config: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """The configuration with relative data files found in the first folder that has them."""
    kwargs = config.get("dataset_kwargs") or {}
    if "data_files" not in kwargs:
        return config

    def resolve(given: Any) -> Any:
        if isinstance(given, dict):
            return {split: resolve(files) for split, files in given.items()}
        if isinstance(given, list):
            return [resolve(file) for file in given]
        if isinstance(given, str):
            there = [folder / given for folder in folders if (folder / given).exists()]
            return str(there[0].resolve()) if there else given
        return given

    return {**config, "dataset_kwargs": {**kwargs, "data_files": resolve(kwargs["data_files"])}}


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Give a built task its number of worked examples, by the rules of the harness."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


def _measures(found: Mapping[str, Any]) -> Iterator[Measure]:
    """The harness's results, one figure at a time: keys are `metric,filter` pairs."""
    for name, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, separator, filter_name = key.partition(",")
            if not separator or metric.endswith("_stderr"):
                continue
            yield Measure(
                source=name,
                metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                value=_number(value),
                stderr=_number(metrics.get(f"{metric}_stderr,{filter_name}")),
                num_samples=metrics.get("sample_len", 0),
                num_fewshot=found["n-shot"].get(name),
            )


def _number(value: Any) -> float | None:
    """A figure of the harness, which says "N/A" where it has none."""
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def _download_counts_off() -> Iterator[None]:
    """Local files are nobody's business: datasets would report their format to its makers."""
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


@contextmanager
def _resampling_here() -> Iterator[None]:
    """Standard errors by resampling without a pool of forks, which banks do not survive.

    The harness gives the same errors either way, and says on stdout that it is at it: a place for
    results only.
    """
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def known_warnings_off() -> Iterator[None]:
    """Leave out two warnings about handing the harness a loaded model, which is meant here."""
    logger = logging.getLogger("lm_eval.models.huggingface")

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not text.startswith(("`pretrained` model kwarg", "Passed an already-initialized"))

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _cause(error: BaseException) -> str:
    """The first line of the error at the root of a chain, with its kind."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{_one_line(error)} ({type(error).__name__})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

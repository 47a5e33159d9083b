"""What the folders and files given hold, and the sections that tell of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from strata.errors import ConfigError, DataError
from strata.report.evaluation import evaluation_section
from strata.report.knowledge import SUMMARY_NAME, knowledge_section
from strata.report.memory import memory_section
from strata.report.parts import Section
from strata.report.quickstart import REPORT_NAME, quickstart_sections
from strata.report.reader import PROBES_NAME, STAGES_NAME, exam_sections, reader_sections
from strata.report.source import Node, Run
from strata.report.training import METRICS_NAME, RECIPE_NAME, training_section

_KNOWN = (
    "give a folder of strata train, reader train, quickstart or knowledge probe, or a JSON file of "
    "strata eval"
)


@dataclass(frozen=True)
class Found:
    """Something to tell of.

    Attributes:
        kind: "training", or what else it is.
        run: its folder.
        sections: makes its sections, given a name for its pictures; None for training, of which
            several are told of together.
    """

    kind: str
    run: Run
    sections: Callable[[str], list[Section]] | None = None


def find(paths: Sequence[Path], *, answers: int) -> list[Found]:
    """All there is in the folders and files given, in their order.

    Args:
        paths: at least one.
        answers: how many answers are shown of each evaluation.

    Raises:
        ConfigError: a path does not exist, or holds nothing that a page can tell of.
        DataError: a file is damaged.
    """
    for path in paths:
        if not path.exists():
            raise ConfigError(f"no run at {path}: {_KNOWN}")
    found = []
    for path, label in zip(paths, labels(paths), strict=True):
        here = list(_in(path, label, answers))
        if not here:
            empty = path.is_dir() and not any(path.iterdir())
            what = "is empty" if empty else "holds nothing that strata report knows"
            raise ConfigError(f"{path} {what}: {_KNOWN}")
        found += here
    return found


def sections(found: Sequence[Found]) -> list[Section]:
    """Sections of everything found; training runs that were given are compared in one."""
    made: list[Section] = []
    names: Counter[str] = Counter()
    for one in found:
        if one.sections is not None:
            name = re.sub(r"[^a-z0-9]+", "-", one.run.label.lower()).strip("-") or "run"
            names[name] += 1
            made += one.sections(name if names[name] == 1 else f"{name}-{names[name]}")
    trained = [one.run for one in found if one.kind == "training"]
    if trained:
        title = f"Training of {trained[0].label}" if len(trained) == 1 else "Training, compared"
        made.append(training_section(trained, name="training", title=title))
    return made


def _in(path: Path, label: str, answers: int) -> Iterator[Found]:
    if path.is_file():
        yield from _file(path, Run(path.parent, _parent(label)), answers)
        return
    run = Run(path, label)
    packed = (path / "reader.json").is_file()  # a reader to give away has stages.yaml, too
    if (path / PROBES_NAME).is_file() or ((path / STAGES_NAME).is_file() and not packed):
        yield Found("reader", run, lambda name: reader_sections(run, name=name, answers=answers))
    elif (path / METRICS_NAME).is_file() or (path / RECIPE_NAME).is_file():
        if not any((path / kind / METRICS_NAME).is_file() for kind in ("memory", "dense")):
            yield Found("training", run)
        elif not (path / REPORT_NAME).is_file():
            for kind in ("memory", "dense"):  # a quickstart under way
                if (path / kind / METRICS_NAME).is_file():
                    yield Found("training", run.below(kind))
    for name in sorted(file.name for file in path.glob("*.json")):
        yield from _file(path / name, run, answers, named=False)
    for summary in sorted(path.glob(f"*/{SUMMARY_NAME}")):
        yield from _file(summary, run.below(summary.parent.name), answers)


def _file(path: Path, run: Run, answers: int, *, named: bool = True) -> Iterator[Found]:
    """What a JSON file is; a folder may also hold others, which are no concern of ours.

    Raises:
        DataError: a file that was named is no JSON.
    """
    if path.name == METRICS_NAME:
        yield Found("training", run)
        return
    try:
        tree: Any = run.json(path.name)
    except DataError:
        if named:
            raise
        return
    told = f"{run.label}/{path.name}" if named else run.label
    if path.name == SUMMARY_NAME:
        make = partial(knowledge_section, run, title=f"Knowledge probe {run.label}")
    elif _has(tree, "scores", "found"):
        make = partial(memory_section, tree, title=f"Formats of knowledge: {run.label}/{path.name}")
    elif _has(tree, "stage", "oracle", "search"):
        title = f"Exam {run.label}/{path.name}"
        exam = partial(exam_sections, tree, title=title, answers=answers)
        yield Found("evaluation", Run(path, told), lambda name: exam(name=name))
        return
    elif _has(tree, "measures", "model"):
        section = partial(evaluation_section, tree, title=f"Evaluation {run.label}/{path.name}")
        yield Found("evaluation", Run(path, told), lambda name: [section()])
        return
    elif _has(tree, "closed_book", "curve"):
        yield Found("quickstart", run, lambda name: quickstart_sections(run, name=name))
        return
    else:
        return
    yield Found("evaluation", Run(path, told), lambda name: [make(name=name, answers=answers)])


def _has(tree: Node, *keys: str) -> bool:
    return isinstance(tree.value, dict) and all(key in tree.value for key in keys)


def labels(paths: Sequence[Path]) -> list[str]:
    """Last parts of the paths, as many as tell them apart; of a file its folder, too.

    Raises:
        ConfigError: a path is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for parts in range(1, 1 + max(len(path.parts) for path in resolved)):
        found = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(found)) == len(found) and all(
            "/" in label or path.is_dir() for label, path in zip(found, resolved, strict=True)
        ):
            return found
    raise ConfigError("a run is given twice: give each once")


def _parent(label: str) -> str:
    return label.rpartition("/")[0] or label

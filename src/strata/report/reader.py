"""A reader that was taught: what it could at every look, where it looks answers up, its exam."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from strata.report import pictures
from strata.report.memory import memory_section
from strata.report.parts import Cell, Picture, Section, Table, count, number, share
from strata.report.source import Node, Run
from strata.report.training import METRICS_NAME, training_section

PROBES_NAME = "probes.jsonl"
LAYER_NAME = "layer.json"
STAGES_NAME = "stages.yaml"
_FOUND_BY = {"oracle": "given what answers", "search": "given what its bank's search finds"}


def reader_sections(run: Run, *, name: str, answers: int) -> list[Section]:
    """Sections of a folder of `strata reader train`.

    Args:
        run: the folder.
        name: of its pictures.
        answers: questions whose answers are shown, of each part of an exam.
    """
    looks = run.lines(PROBES_NAME)
    parts: list[Table | Picture] = []
    if looks:
        parts += [_curves(looks, name), _looks(looks)]
    if (run.path / LAYER_NAME).is_file():
        parts += _layers(run.json(LAYER_NAME), name)
    about = "" if looks else f"It was not asked yet: there is no {PROBES_NAME}."
    sections = [Section(f"What {run.label} has learned", about, parts)]
    for report in sorted(run.path.glob("exam/*/report.json")):
        stage = report.parent.name
        sections += exam_sections(
            run.json(f"exam/{stage}/report.json"),
            name=f"{name}-{stage}",
            title=f"Exam of {run.label}, {stage}",
            answers=answers,
        )
    stages = [run.below(path.parent.name) for path in sorted(run.path.glob(f"*/{METRICS_NAME}"))]
    if stages:
        title = f"Training of {run.label}, stage by stage"
        sections.append(training_section(stages, name=f"{name}-stages", title=title))
    return sections


def exam_sections(tree: Node, *, name: str, title: str, answers: int) -> list[Section]:
    """Sections of a report of `strata reader eval`; arguments as of `memory_section`."""
    return [
        memory_section(tree[by], name=f"{name}-{by}", title=f"{title}: {says}", answers=answers)
        for by, says in _FOUND_BY.items()
        if tree[by].value is not None
    ]


def _curves(looks: Sequence[Node], name: str) -> Picture:
    lines: dict[str, list[tuple[float, float]]] = {}
    places = []
    for look in looks:
        for way, exact in look["exact"].items():
            at = (look["tokens"].number or 0.0) / 1e6
            lines.setdefault(way.replace("_", " "), []).append((at, exact.number or 0.0))
            places += [look["tokens"].place, exact.place]
    last = ", ".join(f"{way} {points[-1][1]:.1%}" for way, points in lines.items())
    return Picture(
        f"{name}-looks",
        "Answered exactly, while it was taught",
        partial(
            pictures.curves, lines, x="tokens read, millions", y="share of questions", share=True
        ),
        places,
        f"Answered exactly in the end: {last}.",
    )


def _looks(looks: Sequence[Node]) -> Table:
    ways = list(dict.fromkeys(way for look in looks for way, _ in look["exact"].items()))
    rows = [
        (
            Cell(str(look["stage"].value), look["stage"].place),
            count(look["step"]),
            count(look["tokens"]),
            number(look["loss"]),
            count(look["kept"]),
            *(share(look["exact"][way]) for way in ways),
        )
        for look in looks
    ]
    asked = {f"{look['num_questions'].number or 0:,.0f}" for look in looks}
    return Table(
        "Every look",
        ("stage", "step", "tokens", "loss", "tokens kept", *(w.replace("_", " ") for w in ways)),
        rows,
        f"Held-out questions answered exactly, {' or '.join(sorted(asked))} in each way. The "
        "number of a way is that of the references given; known asks for what was taught.",
    )


def _layers(tree: Node, name: str) -> list[Table | Picture]:
    """What memories in one layer alone answer."""
    layers = dict(tree["exact"].items())
    ways = list(dict.fromkeys(way for layer in layers.values() for way, _ in layer.items()))
    if not ways:
        return []
    groups = {
        f"{layer}": {way.replace("_", " "): of[way].number or 0.0 for way in ways}
        for layer, of in layers.items()
    }
    rows = [(Cell(layer), *(share(of[way]) for way in ways)) for layer, of in layers.items()]
    chosen = count(tree["layer"])
    return [
        Picture(
            f"{name}-layers",
            "Answered exactly from memories in one layer alone",
            partial(pictures.bars, groups, y="share of questions"),
            [of[way].place for of in layers.values() for way in ways],
            f"Layer {chosen.text} answers most.",
        ),
        Table(
            "Which layer looks answers up",
            ("layer", *(way.replace("_", " ") for way in ways)),
            rows,
            f"Chosen: layer {chosen.text}.",
        ),
    ]

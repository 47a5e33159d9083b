"""One HTML page with everything in it, and its pictures as PNG beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from strata.files import replace_text, storage_errors
from strata.report.find import find, labels, sections
from strata.report.parts import Picture, Section, Table
from strata.report.pictures import as_svg, save_png

PAGE_NAME = "report.html"
ANSWERS = 40  # questions whose answers are shown


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        pictures: PNGs beside it.
        sections: titles.
    """

    page: Path
    pictures: tuple[Path, ...]
    sections: tuple[str, ...]


def write_report(paths: Sequence[Path], *, out: Path, answers: int = ANSWERS) -> Report:
    """Write OUT/report.html and its pictures.

    Args:
        paths: runs of any kind; training runs are compared.
        out: the folder; it is made, and what stands there under these names is replaced.
        answers: questions whose answers are shown, of each evaluation.

    Raises:
        ConfigError: a path does not exist, or holds nothing that a page can tell of.
        DataError: a file is damaged.
        StorageError: the folder cannot be written.
    """
    made = sections(find(paths, answers=answers))
    drawn: dict[str, Markup] = {}
    pictures = []
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for part in (part for section in made for part in section.parts):
            if isinstance(part, Picture):
                figure = part.draw()
                drawn[part.name] = Markup(as_svg(figure, part.name))
                pictures.append(out / f"{part.name}.png")
                save_png(figure, pictures[-1])
        page = out / PAGE_NAME
        replace_text(page, _html(paths, made, drawn))
    return Report(page, tuple(pictures), tuple(section.title for section in made))


def _html(paths: Sequence[Path], made: Sequence[Section], drawn: dict[str, Markup]) -> str:
    environment = Environment(
        loader=PackageLoader("strata.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["table"] = lambda part: isinstance(part, Table)
    return environment.get_template("page.html.j2").render(
        title=", ".join(path.resolve().name for path in paths),
        runs=dict(zip(labels(paths), map(str, paths), strict=True)),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        sections=made,
        drawn=drawn,
    )

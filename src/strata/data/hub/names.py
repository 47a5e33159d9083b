"""What a user means by a SOURCE: a path, or a data set by its name."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from strata.data.hub.mirror import is_mirror
from strata.data.sources import suffix_of
from strata.errors import DataError

ALIASES = {
    "fineweb_edu": "HuggingFaceFW/fineweb-edu",
    "fineweb_edu_10bt": "HuggingFaceFW/fineweb-edu:sample-10BT",
    "dclm": "mlfoundations/dclm-baseline-1.0",
}

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]*\w)(:(?P<config>[^:@\s]+))?(@(?P<revision>[^@\s]+))?"
)


@dataclass(frozen=True)
class DatasetName:
    """A data set of the hub, or a folder that mirrors one.

    Attributes:
        repo: `owner/name`, or the folder.
        config: the configuration; None means the default one.
        split: which of its splits.
        revision: a branch, a tag or a commit; None means the main branch. A mirror has none.
        folder: of a mirror.
    """

    repo: str
    config: str | None
    split: str
    revision: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.repo}{config}" + (f"@{self.revision}" if self.revision else "")


def parse_source(given: str | Path, *, config: str | None, split: str) -> Path | DatasetName:
    """Tell a path from the name of a data set.

    A `Path`, and whatever exists as one, is a path. A folder whose README.md lists configurations
    mirrors a data set.

    Args:
        given: a path, an alias, `owner/name[:config][@revision]`, or `folder[:config]`.
        config: the configuration where `given` names none.
        split: the split of a data set.

    Raises:
        DataError: it is neither.
    """
    path = Path(given)
    if path.exists():
        if path.is_dir() and is_mirror(path):
            return DatasetName(str(path), config, split, folder=path)
        return path
    text = str(given)
    before, colon, after = text.rpartition(":")
    if colon and Path(before).is_dir():
        return DatasetName(before, after or config, split, folder=Path(before))
    if isinstance(given, Path):
        return path
    alias, at, revision = text.partition("@")
    text = ALIASES.get(alias, alias) + at + revision
    match = _NAME.fullmatch(text)
    if match and suffix_of(match["repo"]) is None:
        return DatasetName(match["repo"], match["config"] or config, split, match["revision"])
    if "/" not in text and "." not in text:
        raise DataError(
            f"no source at {given}: give a file, a folder, a data set of the hub as "
            f"owner/name[:config][@revision], or one of {', '.join(ALIASES)}"
        )
    return path


def pinned(name: DatasetName, revision: str) -> DatasetName:
    """The same data set at a commit."""
    return replace(name, revision=revision)

"""Files and folders to documents, as a stream; what cannot be read is said, never half-read.

What is wrong with a path that was named is an error. What is wrong with a file that was found in a
folder is a line in the report, and reading goes on with the next file: of a table whose tenth row
is damaged, nine documents were given by then.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from strata.errors import DataError, StrataError
from strata.explicit.document_rows import RowFields, read_rows
from strata.explicit.document_text import FileText, read_docx, read_html, read_pdf, read_plain

_TABLES = (".jsonl", ".jsonl.gz", ".parquet")
_TEXTS: dict[str, Callable[[Path], FileText]] = {
    ".txt": read_plain,
    ".md": read_plain,
    ".markdown": read_plain,
    ".rst": read_plain,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
}
SUFFIXES = (*_TEXTS, *_TABLES)


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    Attributes:
        text: never blank.
        source: its file as the path was given, "file#row" in a table, or its id there.
        metadata: flat, JSON values without null.
    """

    text: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A file or folder that was left out, wholly or from some row on."""

    path: Path
    reason: str


@dataclass
class ReadReport:
    """What a reading came to; filled while it goes on.

    Attributes:
        files: opened and read to their end.
        documents: given.
        blank: documents without a word, not given.
        skipped: what was left out; hidden files and folders are not listed.
    """

    files: int = 0
    documents: int = 0
    blank: int = 0
    skipped: list[Skipped] = field(default_factory=list)


def read_documents(
    paths: Sequence[str | Path],
    *,
    text_field: str = "text",
    id_field: str | None = None,
    metadata_fields: Sequence[str] | None = None,
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Stream the documents behind files and folders.

    Folders are read recursively, in the order of their files' names, without hidden files; linked
    folders once. A file named directly may have any suffix: an unknown one is read as text. Text
    is UTF-8, or what a byte-order mark or a page's own charset says.

    Args:
        paths: files (txt, md, rst, html, pdf, docx: one document each; jsonl, jsonl.gz, parquet:
            one document a row) and folders.
        text_field: field or column of a row that holds its text.
        id_field: field or column that becomes the document's source.
        metadata_fields: those that become metadata; None for every string of up to 1,000
            characters, number and truth value. Nested values and nulls are left out.
        report: filled while the documents are taken; without one, skipped files are warned of.

    Raises:
        DataError: at once: a path is missing, is no file or folder, or a folder holds nothing to
            read. While reading: a file that was named directly is damaged, binary, too long (64
            MiB of text or row, 32 of html, 256 of pdf or docx) or cannot be read.
        MissingPackageError: a named file needs the extra [documents].
    """
    notes = _Notes(report)
    wanted = None if metadata_fields is None else frozenset(metadata_fields)
    if isinstance(paths, str | Path):  # a string is a sequence, too
        raise DataError(f"paths must be a list of paths, given one: [{str(paths)!r}]")
    files = _find_files([Path(path) for path in paths], notes)
    return _read_files(files, RowFields(text_field, id_field, wanted), notes)


class _Notes:
    """Counts, and what is said of a skipped file: in the report or as a warning."""

    def __init__(self, report: ReadReport | None) -> None:
        self.warns = report is None
        self.report = ReadReport() if report is None else report

    def skip(self, path: Path, reason: str) -> None:
        self.report.skipped.append(Skipped(path, reason))
        if self.warns:
            warnings.warn(f"{path} skipped: {reason}", UserWarning, stacklevel=3)


class _File(NamedTuple):
    path: Path
    was_named: bool


# Reading


def _read_files(files: Sequence[_File], fields: RowFields, notes: _Notes) -> Iterator[Document]:
    for file in files:
        try:
            for document in _read_file(file.path, fields):
                if document.text.strip():
                    notes.report.documents += 1
                    yield document
                else:
                    notes.report.blank += 1
                    if _suffix_of(file.path) not in _TABLES:
                        notes.skip(file.path, "no text in it")
            notes.report.files += 1
        except StrataError as error:
            if file.was_named:
                raise
            notes.skip(file.path, _reason(file.path, str(error)))
        except OSError as error:
            if file.was_named:
                raise DataError(f"{file.path} cannot be read: {error.strerror}") from None
            notes.skip(file.path, f"cannot be read: {error.strerror}")


def _read_file(path: Path, fields: RowFields) -> Iterator[Document]:
    source = _source(path)
    suffix = _suffix_of(path)
    if suffix in _TABLES:
        for row in read_rows(path, fields):
            yield Document(row.text, row.id or f"{source}#{row.number}", row.metadata)
    else:
        found = _TEXTS.get(suffix, read_plain)(path)
        yield Document(found.text, source, {"title": found.title} if found.title else {})


def _source(path: Path) -> str:
    """A path as text that any file can hold, whatever bytes its name is made of."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _suffix_of(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _reason(path: Path, line: str) -> str:
    """What an error says, without the path that stands beside it."""
    return (
        line.removeprefix(str(path)).removeprefix(",").removeprefix(":").removeprefix(" is").strip()
    )


# Finding


def _find_files(paths: Sequence[Path], notes: _Notes) -> list[_File]:
    if not paths:
        raise DataError("no path given: name files or folders of " + ", ".join(SUFFIXES))
    files: list[_File] = []
    first_names: dict[str, Path] = {}
    for given in paths:
        try:
            mode = given.stat().st_mode
        except FileNotFoundError:
            raise DataError(f"nothing at {given}: give the path of a file or a folder") from None
        except (OSError, ValueError) as error:  # a loop of links; a NUL in the name
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise DataError(f"{given} cannot be read: {reason}") from None
        if stat.S_ISDIR(mode):
            found = [_File(path, False) for path in _walk(given, notes)]
            if not found:
                raise DataError(f"nothing to read in {given}: expected {', '.join(SUFFIXES)}")
        elif stat.S_ISREG(mode):
            found = [_File(given, True)]
        else:
            raise DataError(f"{given} is neither a file nor a folder")
        for file in found:
            real = os.path.realpath(file.path)
            if real in first_names:
                notes.skip(file.path, f"the same file as {first_names[real]}")
            else:
                first_names[real] = file.path
                files.append(file)
    return files


def _walk(top: Path, notes: _Notes) -> list[Path]:
    """Readable kinds of files below a folder, sorted by name.

    Files and folders come under their own names: links are followed last, each target once.
    """
    own: list[Path] = []
    linked: list[Path] = []
    folders = deque([top])
    linked_folders: deque[Path] = deque()
    seen: set[str] = set()
    while folders or linked_folders:
        is_link = not folders
        folder = linked_folders.popleft() if is_link else folders.popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            notes.skip(folder, f"cannot be read: {error.strerror}")
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                what = "a link to nothing" if entry.is_symlink() else "cannot be read"
                notes.skip(path, f"{what}: {error.strerror}")
                continue
            if stat.S_ISDIR(mode):
                (linked_folders if entry.is_symlink() else folders).append(path)
            elif not stat.S_ISREG(mode):
                notes.skip(path, "neither a file nor a folder")
            elif not _suffix_of(path):
                notes.skip(path, f"of no known kind ({', '.join(SUFFIXES)})")
            else:
                (linked if entry.is_symlink() or is_link else own).append(path)
    taken = {os.path.realpath(path) for path in own}
    for path in sorted(linked):
        real = os.path.realpath(path)
        if real not in taken:
            taken.add(real)
            own.append(path)
    return sorted(own, key=lambda path: path.as_posix())

"""The text of one file that is one document: plain text, HTML, PDF, Word."""

from __future__ import annotations

import codecs
import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from strata.errors import DataError
from strata.explicit.extras import MissingPackageError, require

MAX_TEXT_BYTES = 64 * 2**20
MAX_HTML_BYTES = 32 * 2**20  # the parsed page takes 10 to 20 times as much
MAX_OFFICE_BYTES = 256 * 2**20  # of a pdf file; of a docx file before and after unpacking

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class FileText(NamedTuple):
    """What a file says, and what it is called, where it says so itself."""

    text: str
    title: str = ""


def read_plain(path: Path) -> FileText:
    """A text file.

    Raises:
        DataError: too long, binary, or not UTF-8.
    """
    return FileText(decode(_read(path, MAX_TEXT_BYTES), path))


def read_html(path: Path) -> FileText:
    """The main text of a page, blocks on lines of their own, without scripts and navigation.

    Raises:
        DataError: too long, binary, or in an encoding that neither UTF-8 nor the page names.
        MissingPackageError: beautifulsoup4 is not installed.
    """
    require("bs4", extra="documents", purpose=f"reading {path.suffix} files")
    return _page_text(_decode_page(_read(path, MAX_HTML_BYTES), path))


def read_pdf(path: Path) -> FileText:
    """The text of a PDF file; none of what is only a picture of text.

    Raises:
        DataError: too long, damaged, or locked with a password.
        MissingPackageError: markitdown is not installed.
    """
    return _convert(path, "PdfConverter")


def read_docx(path: Path) -> FileText:
    """The text of a Word file as Markdown, without its pictures.

    Raises:
        DataError: too long, packed or unpacked, or damaged.
        MissingPackageError: markitdown is not installed.
    """
    require("markitdown.converters", extra="documents", purpose="reading .docx files")
    try:
        with zipfile.ZipFile(path) as archive:
            # zipfile never unpacks more of a member than its header announces.
            unpacked_bytes = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from None
    if unpacked_bytes > MAX_OFFICE_BYTES:
        raise _too_long(path, MAX_OFFICE_BYTES, " unpacked")
    found = _convert(path, "DocxConverter")
    return found._replace(text=_PICTURE.sub(r"\1", found.text))


def decode(content: bytes, path: Path) -> str:
    """Text of a file's bytes: UTF-8, or what its byte-order mark says.

    Raises:
        DataError: binary, or in another encoding.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            try:
                return content.decode(encoding)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: not {encoding.removesuffix('-sig').upper()}, as its first bytes say "
                    f"(byte {error.start}): convert it to UTF-8"
                ) from None
    if b"\0" in content:
        raise DataError(f"{path} is binary, not text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte {error.start} of the file is "
            f"0x{content[error.start]:02x}): convert it to UTF-8"
        ) from None


def _read(path: Path, limit: int) -> bytes:
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _too_long(path, limit)
    return content


def _too_long(path: Path, limit: int, state: str = "") -> DataError:
    return DataError(
        f"{path} is longer than {limit / 2**20:.0f} MiB{state}".rstrip() + ": split it"
    )


def _damaged(path: Path, error: BaseException) -> DataError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(f"{path} is damaged or not {path.suffix[1:].lower()}: {reason}")


# HTML

_DROPPED = {
    *("script", "style", "noscript", "template", "svg", "canvas", "iframe", "object", "audio"),
    *("video", "nav", "footer", "button", "select", "textarea", "head", "title"),
}
_PARAGRAPHS = {
    *("p", "div", "section", "article", "main", "aside", "header", "blockquote", "pre", "hr"),
    *("ul", "ol", "dl", "table", "figure", "form", "fieldset", "details", "address"),
    *("h1", "h2", "h3", "h4", "h5", "h6"),
}
_LINES = {"br", "li", "tr", "dt", "dd", "caption", "figcaption", "summary", "legend", "option"}
_CELLS = {"td", "th"}
_BLANKS = re.compile(r"\s+")
_TRAILING = re.compile(r"[^\S\n]+\n")


def _decode_page(content: bytes, path: Path) -> str:
    try:
        return decode(content, path)
    except DataError:
        from bs4.dammit import EncodingDetector

        named = EncodingDetector.find_declared_encoding(content, is_html=True)
        if named is None or b"\0" in content:
            raise
        try:
            return content.decode(named)
        except (LookupError, UnicodeDecodeError):
            raise DataError(
                f"{path}: neither UTF-8 nor {named!r}, as it says itself: convert it to UTF-8"
            ) from None


def _page_text(page: str) -> FileText:
    from bs4 import BeautifulSoup

    # Python's own parser: lxml drops what is nested deeper than 256 levels.
    soup = BeautifulSoup(page, "html.parser")
    title = "" if soup.title is None else _BLANKS.sub(" ", soup.title.get_text()).strip()
    mains = soup.find_all("main") or soup.find_all(None, {"role": "main"})
    articles = soup.find_all("article")
    if mains:
        root: Any = mains[0]
    else:
        root = articles[0] if len(articles) == 1 else soup.body or soup
    return FileText(_TRAILING.sub("\n", _flatten(root)).strip(), title)


def _flatten(root: Any) -> str:
    """Text of an element, its blocks apart; a stack, for pages nest without bound."""
    from bs4.element import CData, NavigableString, Tag

    pieces: list[str] = []
    newlines = 2  # that the text ends with so far; its beginning counts as a paragraph's
    preformatted = 0
    at_blank = True
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, _Break):
            preformatted += node.preformatted
            if node.newlines > newlines:
                pieces.append("\n" * (node.newlines - newlines))
                newlines = node.newlines
            at_blank = at_blank or node.newlines > 0
        elif isinstance(node, Tag):
            if node.name in _DROPPED or node.has_attr("hidden"):
                continue
            apart = 2 if node.name in _PARAGRAPHS else int(node.name in _LINES)
            is_pre = int(node.name == "pre")
            stack.append(_Break(apart, -is_pre))
            stack.extend(reversed(node.contents))
            stack.append(_Break(apart, is_pre))
            if node.name in _CELLS and not at_blank:
                pieces.append(" ")
                at_blank = True
        elif type(node) in (NavigableString, CData):  # neither a comment nor a script
            text = str(node) if preformatted else _BLANKS.sub(" ", node)
            if at_blank and not preformatted:
                text = text.lstrip(" ")
            if text:
                pieces.append(text)
                newlines = len(text) - len(text.rstrip("\n"))
                at_blank = text[-1].isspace()
    return "".join(pieces)


class _Break(NamedTuple):
    """The border of an element, on the stack before and behind its contents."""

    newlines: int
    preformatted: int


# PDF and Word, through markitdown

_PICTURE = re.compile(r"!\[([^\]]*)\]\(data:[^)]*\)")


def _convert(path: Path, converter: str) -> FileText:
    purpose = f"reading {path.suffix.lower()} files"
    markitdown = require("markitdown", extra="documents", purpose=purpose)
    converters = require("markitdown.converters", extra="documents", purpose=purpose)
    if path.stat().st_size > MAX_OFFICE_BYTES:
        raise _too_long(path, MAX_OFFICE_BYTES)
    info = markitdown.StreamInfo(extension=path.suffix.lower())
    # The one converter, not MarkItDown(): that tries others on a damaged file, and reads its bytes
    # as text in the end.
    with open(path, "rb") as stream, _quiet("pdfminer"):
        try:
            result = getattr(converters, converter)().convert(stream, info)
        except markitdown.MissingDependencyException:
            raise MissingPackageError(
                f"{purpose} needs more of markitdown than is installed: "
                'pip install "strata-lm[documents]"'
            ) from None
        except OSError:
            raise
        except (
            Exception
        ) as error:  # the parsers raise whatever a damaged file makes them stumble on
            if "password" in type(error).__name__.lower():
                raise DataError(f"{path} is locked with a password: save it without") from None
            raise _damaged(path, error) from error
    # A form feed is the end of a page; half a surrogate pair is a glyph without a meaning.
    text = result.markdown.replace("\f", "\n\n").encode("utf-8", "replace").decode("utf-8")
    return FileText(text.strip(), (result.title or "").strip())


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Errors only from a library that logs every oddity of a file."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

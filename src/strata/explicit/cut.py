"""Documents cut into references: as many whole sentences as the limit holds.

Where sentences end is a regular expression's opinion, for every language at once: a full stop,
question or exclamation mark of any script, or a blank line. It is wrong now and then (an unknown
abbreviation before a capital), which costs a reference a shorter end and never a character.
"""
# ruff: noqa: RUF001 - the punctuation of many scripts is meant as it stands

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from strata.errors import DataError
from strata.explicit.memories import Reference
from strata.explicit.settings import ExplicitMemoryConfig


class Document(Protocol):
    """What is cut: a text, and what is known of it."""

    @property
    def text(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


def cut(document: Document, tokenizer: Any, config: ExplicitMemoryConfig) -> list[Reference]:
    """Cut a document into references of at most `reference_tokens` tokens.

    A reference ends at a paragraph's end where one lies in the second half of what fits, else at
    the last sentence that fits; a sentence that does not fit is cut at a line, else at a word, else
    at a token. White space around references belongs to none; nothing else is lost. Time is linear
    in the text, whatever stands in it.

    Args:
        document: `text`, `source` and `metadata`.
        tokenizer: the model's own, a fast one: tokens are counted by it, without special ones.
        config: `reference_tokens`, and `overlap_tokens`: a reference begins with as many whole
            sentences of the one before it as fit into these, unless its next sentence would then
            no longer fit.

    Returns:
        References in order; `document.text[r.start:r.end] == r.text`. None for a blank document.

    Raises:
        DataError: a slow tokenizer, a text that is not Unicode, or a single character of more
            tokens than a reference may have.
    """
    return _Cutter(document, Tokens(tokenizer), config).references()


class Tokens:
    """A tokenizer as far as references go: no special tokens, nothing truncated or padded."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Characters of each token.

        Raises:
            DataError: a slow tokenizer, which does not know.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            raise DataError(
                f"{type(self._tokenizer).__name__} cannot say where its tokens stand in a text: "
                "open the fast one, AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        return list(self._call(text, return_offsets_mapping=True)["offset_mapping"])

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._call(text)["input_ids"])

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return list(self._call(list(texts))["input_ids"]) if texts else []

    def _call(self, text: str | list[str], **options: Any) -> Any:
        return self._tokenizer(
            text,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )


def _check(text: str, source: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: character {error.start} is half of a surrogate pair, no Unicode text: "
            "decode the file again, or replace it"
        ) from None


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _strip_space(text: str, start: int, end: int) -> int:
    """Where text[start:end] ends without the white space at its end."""
    while end > start and text[end - 1].isspace():
        end -= 1
    return end


class _Cutter:
    def __init__(self, document: Document, tokens: Tokens, config: ExplicitMemoryConfig) -> None:
        _check(document.text, document.source)
        self._text = document.text
        self._source = document.source
        self._metadata = dict(document.metadata)
        self._tokens = tokens
        self._borders = Borders(document.text)
        self._limit = config.reference_tokens
        self._overlap_tokens = config.overlap_tokens
        self._window = 4 * config.reference_tokens  # characters

    def references(self) -> list[Reference]:
        text = self._text
        references: list[Reference] = []
        start = covered = _skip_space(text, 0)
        while covered < len(text):
            spans = self._read_ahead(start)
            end = self._end(start, spans, after=covered)
            if end <= covered and start < covered:  # the overlap left no room for more
                start = covered
                continue
            if spans:  # else a text that the tokenizer drops: control characters, for some
                references.append(
                    Reference(text[start:end], self._source, start, end, self._metadata)
                )
            covered = _skip_space(text, end)
            if self._overlap_tokens and covered < len(text):
                start = self._overlap(start, end, covered, spans)
            else:
                start = covered
        return references

    def _read_ahead(self, start: int) -> list[tuple[int, int]]:
        """Tokens from `start` on: more than the limit, or all up to the text's end.

        The next window is half again as long as what fitted here; doubling from there keeps the
        tokens that are read in vain below a fixed share.
        """
        while True:
            spans = self._tokens.spans(self._text[start : start + self._window])
            if len(spans) > self._limit or start + self._window >= len(self._text):
                break
            self._window *= 2
        fits = spans[min(self._limit, len(spans)) - 1][1] if spans else self._window
        self._window = max(64, fits + fits // 2)
        return spans

    def _end(self, start: int, spans: list[tuple[int, int]], *, after: int) -> int:
        """Where what begins at `start` ends; at most at `after` where nothing beyond fits."""
        allowed = self._limit
        while allowed > 0:
            if len(spans) <= allowed:
                end = _strip_space(self._text, start, len(self._text))
            else:
                reach = start + spans[allowed - 1][1]
                end = self._borders.last(start, reach, after=after)
            # Cut off, a text may have more tokens than it had in its place: the end may lie within
            # a token, and the last character's bytes may be more tokens than were allowed.
            excess = self._tokens.count(self._text[start:end]) - self._limit
            if excess <= 0:
                return end
            allowed = min(allowed, len(spans)) - excess
        return self._one_character(start)

    def _one_character(self, start: int) -> int:
        count = self._tokens.count(self._text[start])
        if count > self._limit:
            raise DataError(
                f"{self._source}: character {start}, {self._text[start]!r}, alone has {count} "
                f"tokens, above reference_tokens {self._limit}: raise reference_tokens"
            )
        return start + 1

    def _overlap(self, start: int, end: int, covered: int, spans: list[tuple[int, int]]) -> int:
        """Where the next reference begins, so that it repeats sentences of text[start:end]."""
        borders = self._borders
        until = borders.sentence_end(covered)
        if until - covered > 64 * self._limit:
            return covered  # no sentence that fits, and counting it would not end soon
        room = min(
            self._limit - self._tokens.count(self._text[covered:until]), self._overlap_tokens
        )
        begins = [span[0] for span in spans]
        used = bisect_left(begins, end - start)
        first = borders.sentence_after(start)
        while first < covered and used - bisect_left(begins, first - start) > room:
            first = borders.sentence_after(first)
        return min(first, covered)


_SPACE = re.compile(r"\s+")
_CLOSERS = "\"'”’»)\\]}›」』）】》〉］"
# No alternative can fail after it has begun to repeat, so the search is linear.
_BORDER = re.compile(
    rf"""
    (?P<blank>\n[^\S\n]*\n\s*)                      # a blank line: the paragraph's end
    | (?P<wide>[。！？｡．]+[{_CLOSERS}。！？…]*)         # scripts without spaces
    | (?P<stop>[.!?…।॥؟۔։።፧။។‼⁇⁈⁉]+[{_CLOSERS}]*)    # those that need white space behind them
    | (?P<line>\n)
    """,
    re.VERBOSE,
)
_ABBREVIATION = re.compile(
    r"""(?:^|[\s("'“‘\[—–-])(?:
    [A-Z]                                           # initials: J. Smith
    | (?:[A-Za-z]\.)+[A-Za-z]                       # e.g. U.S. z.B.
    | Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Rev|Hon|Gen|Col|Lt|Capt|Sgt|Gov|Sen|Rep|Mt|Mme|Mlle|Sra?|Hrn?|Fr
    | No|Nos|Nr|Fig|Figs|Eq|Eqs|Sec|Ch|Vol|Bd|Abb|p|pp|ed|eds|cf|vs|viz|al|approx|ca|bzw|[Vv]gl
    | Jan|Feb|Apr|Aug|Sept?|Oct|Nov|Dec
    )\.$""",
    re.VERBOSE,
)
_LIST_ITEM = re.compile(r"(?:[-*+•–#>|]|\d{1,3}[.)]|\w[.)])\s")
_WORD_ENDS = frozenset("，、；：")  # where there are no spaces


class Borders:
    """Where a text may be cut: ends of paragraphs, sentences and lines, ascending."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._paragraphs = array("q")
        self._sentences = array("q")
        self._lines = array("q")
        for match in _BORDER.finditer(text):
            kind, begin, end = match.lastgroup, match.start(), match.end()
            if kind == "blank":
                self._paragraphs.append(begin)
                self._sentences.append(begin)
            elif kind == "line":
                self._lines.append(begin)
                if _LIST_ITEM.match(text, end):
                    self._sentences.append(begin)
            elif kind == "wide" or self._ends_sentence(match):
                self._sentences.append(end)

    def _ends_sentence(self, match: re.Match[str]) -> bool:
        text, end = self._text, match.end()
        if end == len(text):
            return True
        if not text[end].isspace():
            return False
        following = _skip_space(text, end)
        if following < len(text) and text[following].islower():
            return False
        return match.group() != "." or not _ABBREVIATION.search(text[max(0, end - 16) : end])

    def last(self, start: int, reach: int, *, after: int) -> int:
        """The best end in (after, reach] for what begins at `start`, at most `after` if none."""
        text = self._text
        for ends, least in (
            (self._paragraphs, max(after, start + (reach - start) // 2)),
            (self._sentences, after),
            (self._lines, after),
        ):
            at = bisect_right(ends, reach) - 1
            if at >= 0 and ends[at] > least:
                end = _strip_space(text, start, ends[at])
                if end > after:
                    return end
        for end in range(reach, start, -1):
            if end == len(text) or text[end].isspace() or text[end - 1] in _WORD_ENDS:
                return _strip_space(text, start, end)
        return reach

    def sentence_after(self, start: int) -> int:
        """Where the first sentence after the one at `start` begins; the text's end if none."""
        at = bisect_right(self._sentences, start)
        if at == len(self._sentences):
            return len(self._text)
        return _skip_space(self._text, self._sentences[at])

    def sentence_end(self, start: int) -> int:
        """Where the sentence that begins at `start` ends."""
        at = bisect_right(self._sentences, start)
        return self._sentences[at] if at < len(self._sentences) else len(self._text)

"""Which documents are left out for what they are: too short, too long, or not prose.

The rules are those that *Scaling Language Models: Methods, Analysis & Insights from Training
Gopher* (Rae et al., arXiv 2112.11446, A.1.1) applies to web pages, without its n-gram ones. Each
is a number that has to lie within limits; theirs are the default limits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from strata.config import FrozenConfig
from strata.errors import ConfigError

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("\u2022", "\u2023", "\u25cf", "\u25e6", "-", "*")
_ELLIPSES = ("...", "\u2026")


class _Text:
    """A text with its words and lines, split once for all rules."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.split()
        self.lines = [line.strip() for line in text.split("\n") if line.strip()]
        self.paragraphs = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _symbols(text: _Text) -> float:
    count = text.text.count("#") + sum(text.text.count(mark) for mark in _ELLIPSES)
    return _share(count, len(text.words))


def _bullet_lines(text: _Text) -> float:
    return _share(sum(line.startswith(_BULLETS) for line in text.lines), len(text.lines))


def _ellipsis_lines(text: _Text) -> float:
    return _share(sum(line.endswith(_ELLIPSES) for line in text.lines), len(text.lines))


def _alphabetic_words(text: _Text) -> float:
    return _share(sum(any(map(str.isalpha, word)) for word in text.words), len(text.words))


def _stop_words(text: _Text) -> float:
    return len(_STOP_WORDS & {word.strip(".,;:!?\"'()").lower() for word in text.words})


def _repeated(parts: Sequence[str]) -> float:
    """The share of parts that stood earlier in the text already."""
    return _share(len(parts) - len(set(parts)), len(parts))


def _repeated_characters(parts: Sequence[str]) -> float:
    """The same, each part weighed by its characters."""
    return 1.0 - _share(sum(map(len, set(parts))), sum(map(len, parts))) if parts else 0.0


class _Rule(NamedTuple):
    """A number that a text has, and the limits of Gopher; None means there is none."""

    measure: Callable[[_Text], float]
    least: float | None
    most: float | None


RULES: dict[str, _Rule] = {
    "words": _Rule(lambda text: len(text.words), 50, 100_000),
    "mean_word_length": _Rule(
        lambda text: _share(sum(map(len, text.words)), len(text.words)), 3, 10
    ),
    "symbols_per_word": _Rule(_symbols, None, 0.1),
    "bullet_lines": _Rule(_bullet_lines, None, 0.9),
    "ellipsis_lines": _Rule(_ellipsis_lines, None, 0.3),
    "alphabetic_words": _Rule(_alphabetic_words, 0.8, None),
    "stop_words": _Rule(_stop_words, 2, None),
    "repeated_lines": _Rule(lambda text: _repeated(text.lines), None, 0.3),
    "repeated_paragraphs": _Rule(lambda text: _repeated(text.paragraphs), None, 0.3),
    "repeated_line_characters": _Rule(lambda text: _repeated_characters(text.lines), None, 0.2),
    "repeated_paragraph_characters": _Rule(
        lambda text: _repeated_characters(text.paragraphs), None, 0.2
    ),
}

Bound = Annotated[int | None, Field(ge=0)]
Limits = tuple[float | None, float | None]


class FilterConfig(FrozenConfig):
    """What a document must be to stay; everything is off by default.

    Attributes:
        min_chars, max_chars: characters of prompt and completion together.
        min_tokens, max_tokens: the same in tokens, without those put around a document.
        rules: names out of `RULES` -> the least and the most that stay; None is no limit.
    """

    min_chars: Bound = None
    max_chars: Bound = None
    min_tokens: Bound = None
    max_tokens: Bound = None
    rules: dict[str, Limits] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> FilterConfig:
        for name, (least, most) in self.rules.items():
            _known(name)
            if least is not None and most is not None and not least <= most:
                raise ValueError(f"rule {name}: {least:g} to {most:g} leaves nothing")
        for unit in ("chars", "tokens"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{unit} is {least} and max_{unit} {most}: nothing is left")
        return self

    def dropped_by(self, text: str) -> str | None:
        """The first filter that drops a text, by what it says before it is tokens; else None."""
        if self.min_chars is not None and len(text) < self.min_chars:
            return "min_chars"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "max_chars"
        if self.rules:
            split = _Text(text)
            for name, rule in RULES.items():  # in this order, however they were named
                if name in self.rules and not _within(rule.measure(split), self.rules[name]):
                    return name
        return None

    def dropped_by_tokens(self, num_tokens: int) -> str | None:
        """The first filter that drops a text of so many tokens; else None."""
        if self.min_tokens is not None and num_tokens < self.min_tokens:
            return "min_tokens"
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            return "max_tokens"
        return None


def _within(value: float, limits: Limits) -> bool:
    least, most = limits
    return (least is None or value >= least) and (most is None or value <= most)


def parse_rules(given: Sequence[str]) -> dict[str, Limits]:
    """Read rules as the command line names them.

    Args:
        given: `NAME`, with Gopher's limits; `NAME=LEAST..MOST`, where either may be missing; or
            `gopher`, all of them.

    Raises:
        ConfigError: a rule is unknown or its limits are no numbers.
    """
    rules: dict[str, Limits] = {}
    for text in given:
        name, equals, limits = text.partition("=")
        if name == "gopher" and not equals:
            rules |= {known: (rule.least, rule.most) for known, rule in RULES.items()}
            continue
        try:
            rule = _known(name)
        except ValueError as error:
            raise ConfigError(f"--rule {text}: {error}") from None
        rules[name] = _parse_limits(text, limits) if equals else (rule.least, rule.most)
    return rules


def _known(name: str) -> _Rule:
    if name not in RULES:
        raise ValueError(f"no rule {name!r}: known are gopher (all of them), {', '.join(RULES)}")
    return RULES[name]


def _parse_limits(text: str, limits: str) -> Limits:
    least, dots, most = limits.partition("..")
    try:
        if not dots or not (least or most):
            raise ValueError
        parsed = float(least) if least else None, float(most) if most else None
        if any(number is not None and not math.isfinite(number) for number in parsed):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--rule {text}: limits are LEAST..MOST, LEAST.. or ..MOST, as in words=50..100000"
        ) from None
    return parsed

"""Each rule drops what it says, nothing is dropped by default, and everything is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_documents import Prepare, folder_bytes, make_texts, write_jsonl

from strata.data.dataset import TokenDataset
from strata.data.filters import RULES, FilterConfig, parse_rules
from strata.errors import ConfigError, DataError

PROSE = "The river runs to the sea, and of the hill that we have seen it keeps the stones.\n" * 4


@pytest.mark.parametrize(
    ("rule", "value", "text"),
    [
        ("words", 3, "one two\nthree"),
        ("words", 0, " \n"),
        ("mean_word_length", 2.5, "abc de"),
        ("symbols_per_word", 0.5, "a # b ... c… d"),
        ("bullet_lines", 0.5, "- one\n\n• two\nthree\nfour - five"),
        ("ellipsis_lines", 2 / 3, "one...\ntwo… \nthree.. ."),
        ("alphabetic_words", 0.5, "a1 23 é! --"),
        ("stop_words", 2, "The cat, with THE hat."),
        ("repeated_lines", 0.4, "a\nb\na\n\n a \nc"),
        ("repeated_paragraphs", 1 / 3, "a\nb\n\nc\n \na\nb"),
        ("repeated_line_characters", 0.25, "aa\naa\nbbbb"),
        ("repeated_paragraph_characters", 0.5, "aa\n\naa"),
    ],
)
def test_what_a_rule_measures(rule: str, value: float, text: str) -> None:
    """A text stays at its own value, and goes just above and below it."""
    for limits, drops in (
        ((value, value), False),
        ((value + 1e-6, None), True),
        ((None, value - 1e-6), True),
        ((None, None), False),
    ):
        filters = FilterConfig(rules={rule: limits})
        assert (filters.dropped_by(text) == rule) is drops, limits


def test_every_rule_was_measured_above() -> None:
    measured = {case[0] for case in test_what_a_rule_measures.pytestmark[0].args[1]}
    assert measured == set(RULES)


def test_gopher_keeps_prose_and_drops_what_is_none() -> None:
    gopher = FilterConfig(rules=parse_rules(["gopher"]))
    lines = [f"Line {number}: {PROSE.splitlines()[0]}" for number in range(6)]
    prose = "\n".join(lines)
    assert gopher.dropped_by(prose) is None
    for text, rule in (
        ("The river runs.", "words"),
        (" ".join(["a" * 11] * 60), "mean_word_length"),
        (prose.replace(",", " #" * 4), "symbols_per_word"),
        ("\n".join(f"- {line}" for line in lines), "bullet_lines"),
        ("\n".join(f"{line}..." for line in lines), "ellipsis_lines"),
        (prose + " 1,234" * 40, "alphabetic_words"),
        ("Der Fluss rinnt bergab durch Wiesen. " * 10, "stop_words"),
        (PROSE, "repeated_lines"),
    ):
        assert gopher.dropped_by(text) == rule


def test_lengths_are_inclusive() -> None:
    filters = FilterConfig(min_chars=2, max_chars=3, min_tokens=5, max_tokens=6)
    assert [filters.dropped_by("x" * count) for count in range(1, 5)] == [
        *("min_chars", None, None, "max_chars"),
    ]
    assert [filters.dropped_by_tokens(count) for count in range(4, 8)] == [
        *("min_tokens", None, None, "max_tokens"),
    ]


def test_rules_of_the_command_line() -> None:
    assert parse_rules(["words=5..", "words=..9", "stop_words"]) == {
        "words": (None, 9.0),
        "stop_words": (2, None),
    }
    assert set(parse_rules(["gopher", "words=1..2"])) == set(RULES)
    assert parse_rules(["gopher", "words=1..2"])["words"] == (1.0, 2.0)
    for text in ("words=5", "words=..", "words=a..b", "words=nan..", "words=", "words=1..2..3"):
        with pytest.raises(ConfigError, match=f"--rule {text}: limits are LEAST..MOST"):
            parse_rules([text])
    for text in ("sense", "gopher=1..2"):
        with pytest.raises(ConfigError, match=r"known are gopher \(all of them\), words, "):
            parse_rules([text])
    for wrong in (
        {"rules": {"words": (3, 2)}},
        {"min_chars": 3, "max_chars": 2},
        {"min_chars": -1},
    ):
        with pytest.raises(ValueError):
            FilterConfig.model_validate(wrong)


def test_what_is_dropped_is_counted(
    tmp_path: Path, prepare_to: Prepare, tight_memory: None
) -> None:
    texts = make_texts(300)
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, ""])
    filters = {"min_chars": 40, "max_tokens": 25, "rules": {"words": (None, 25)}}
    manifest = prepare_to(tmp_path / "out", source, filters=filters, shuffle=False)
    counts = manifest.num_dropped
    assert set(counts) == {"min_chars", "max_tokens", "words"} and min(counts.values()) > 5
    assert sum(counts.values()) + manifest.num_documents == 300
    assert manifest.num_empty == 1
    assert manifest.prepared_from.filters == FilterConfig.model_validate(filters)
    dataset = TokenDataset.open(tmp_path / "out")
    lengths = [len(dataset.document(index)) for index in range(dataset.num_documents)]
    assert max(lengths) == 26  # with <eos>
    # As if nothing else had been there.
    passing = [t for t in texts if len(t) >= 40 and len(t.split()) <= 25]
    rest = write_jsonl(tmp_path / "b.jsonl", passing)
    prepare_to(tmp_path / "rest", rest, filters={"max_tokens": 25}, shuffle=False)
    for name in ("00000.tokens.npy", "00000.documents.npy"):
        paths = [tmp_path / folder / "train" / name for folder in ("out", "rest")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(DataError, match=r'filters were {"min_chars":40.*, now {}'):
        prepare_to(tmp_path / "out", source, shuffle=False)


def test_nothing_left_is_said(tmp_path: Path, prepare_to: Prepare) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    with pytest.raises(
        DataError, match=r"no document of .* is left: the filters dropped 20 by min"
    ):
        prepare_to(tmp_path / "out", source, filters={"min_chars": 10_000})
    # What was refused leaves nothing that other filters could not go on from.
    prepare_to(tmp_path / "out", source, filters={"min_chars": 1})
    prepare_to(tmp_path / "plain", source)
    left, plain = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "plain")
    assert left.pop("manifest.json") != plain.pop("manifest.json")
    assert left == plain

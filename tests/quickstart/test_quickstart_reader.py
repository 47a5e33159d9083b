"""The quickstart's second part with a packed reader: what it makes, measures and cites."""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from strata.cli.main import main
from strata.data.facts.factbook import Fact, held_out_countries, load_articles, load_facts
from strata.errors import BankError
from strata.evals.memory import Asked
from strata.evals.questions import normalise_answer
from strata.explicit.bank import Bank
from strata.explicit.hits import Hit
from strata.models import load
from strata.quickstart import bank as bank_module
from strata.quickstart import decoder
from strata.quickstart.bank import FORMATS, BankOutcome, answer_from_bank, questions
from strata.quickstart.report import print_bank

ROOT = Path(__file__).parents[2]


def make_reader(folder: Path, tokenizer: Path, *, seed: int = 0) -> Path:
    """A random decoder in bf16, as a reader is packed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024,
        initializer_range=0.5, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    card = {"memory": {"tokens_per_head": 5, "reference_tokens": 96}}
    (folder / "reader.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, _tiny_model_master: Path) -> Path:
    return make_reader(tmp_path_factory.mktemp("reader") / "packed", _tiny_model_master)


@pytest.fixture(scope="module", autouse=True)
def _few() -> object:
    """Few articles and questions, for seconds."""
    chosen = sorted(held_out_countries())[:12]
    told = {country: text for country, text in load_articles().items() if country in chosen}
    facts = [fact for fact in load_facts() if fact.country in chosen]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank_module, "load_articles", lambda: told)
        patch.setattr(bank_module, "load_facts", lambda: facts)
        patch.setattr(bank_module, "NUM_QUESTIONS", 6)
        yield


@pytest.fixture(scope="module")
def asked(
    tmp_path_factory: pytest.TempPathFactory, reader: Path, _few: object
) -> tuple[Path, BankOutcome, str]:
    pytest.importorskip("lance")
    out, said = tmp_path_factory.mktemp("asked"), io.StringIO()
    console = Console(file=said, width=160)
    outcome = answer_from_bank(out, reader, console)
    assert outcome is not None
    print_bank(outcome, console)
    return out, outcome, said.getvalue()


def test_four_ways_are_measured(asked: tuple[Path, BankOutcome, str]) -> None:
    out, outcome, printed = asked
    assert outcome.learned and outcome.documents == 12 and outcome.top_k == 5
    assert outcome.num_questions == 6 == len(questions())
    for figures in (outcome.accuracy, outcome.ttft_ms, outcome.tokens_per_s):
        assert tuple(figures) == FORMATS
    assert all(0 <= share <= 1 for share in outcome.accuracy.values())
    assert all(ms > 0 for ms in outcome.ttft_ms.values())
    kib = outcome.kib_per_reference
    assert set(kib) == {"text", "explicit", "explicit_vq"}
    # Two heads of width 16 in one layer, five tokens, keys and values: bf16, or 16 bytes each.
    vectors, places = 2 * 2 * 5, 2 * 2 * 5 + 2
    assert kib["explicit"] == (vectors * 32 + places) / 1024
    assert kib["explicit_vq"] == (vectors * 16 + places) / 1024
    assert outcome.found > 0.5
    bank, coded = Bank.open(out / "bank"), Bank.open(out / "bank-vq")
    assert len(bank) == len(coded) == outcome.references and not bank.cold() and not coded.cold()
    assert bank.settings.config.tokens_per_head == 5
    assert sorted(r.source for r in bank.ls()) == sorted(r.source for r in coded.ls())
    for name in ("nothing", "memories, VQ", "first token, ms", "it was never taught about"):
        assert name in printed


def test_the_reader_of_strata_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text and as memories, of countries that it was taught nothing of."""
    pytest.importorskip("lance")
    monkeypatch.setattr(bank_module, "NUM_QUESTIONS", 24)
    outcome = answer_from_bank(tmp_path, decoder.PACKED, Console(file=io.StringIO()))
    assert outcome is not None and outcome.learned and outcome.num_questions == 24
    nothing = outcome.accuracy["none"]
    for way in ("text", "explicit", "explicit_vq"):
        assert outcome.accuracy[way] >= nothing + 0.2, outcome.accuracy


def test_what_it_says_to_do_next_works(
    asked: tuple[Path, BankOutcome, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The bank belongs to the widened reader, which lies beside it."""
    out, outcome, _ = asked
    assert outcome.reader == str(out / "reader")
    assert load(out / "reader")[0].dtype == torch.float32
    command = ["strata", "ask", outcome.bank, "Question: Who?\nAnswer:", "--model", outcome.reader,
               "--max-new-tokens", "3", "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    assert json.loads(printed.out)["injected"] > 0


def test_again_it_goes_on_with_its_banks(
    asked: tuple[Path, BankOutcome, str], reader: Path, tmp_path: Path, _tiny_model_master: Path
) -> None:
    out, outcome, _ = asked
    again = Path(shutil.copytree(out, tmp_path / "again"))
    version = Bank.open(again / "bank").version
    console = Console(file=io.StringIO())
    second = answer_from_bank(again, reader, console)
    assert second is not None and second.accuracy == outcome.accuracy
    assert Bank.open(again / "bank").version == version
    with pytest.raises(BankError, match="other weights"):
        answer_from_bank(again, make_reader(tmp_path / "o", _tiny_model_master, seed=1), console)


def test_questions_are_on_facts_that_the_articles_state() -> None:
    """Of countries that no reader is taught about, in words as one asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank_module, "load_facts", load_facts)
        patch.setattr(bank_module, "NUM_QUESTIONS", 10**6)
        every = questions()
    articles = load_articles()
    assert {fact.country for fact, _ in every} <= held_out_countries()
    assert 300 < len(every) < 600
    stated = [
        normalise_answer(fact.answer) in normalise_answer(articles[fact.country])
        for fact, _ in every
    ]
    assert all(stated)
    for fact, question in every:
        assert question.prompt.startswith("Question: W") and question.prompt.endswith("?\nAnswer:")
        assert fact.country in question.prompt and question.answers == (fact.answer,)
    assert len({question.prompt for _, question in every}) == len(every)
    assert 0.2 < len(held_out_countries()) / len(articles) < 0.5


def test_questions_are_spread_over_all_facts() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank_module, "load_facts", load_facts)
        patch.setattr(bank_module, "NUM_QUESTIONS", 64)
        chosen = [fact.relation for fact, _ in questions()]
    every = [fact.relation for fact in load_facts() if fact.country in held_out_countries()]
    assert len(chosen) == 64
    for relation in set(every):
        assert abs(chosen.count(relation) - 64 * every.count(relation) / len(every)) <= 1
    assert bank_module._spread(range(3), 10) == [0, 1, 2]


@dataclass
class _Said:
    """What the model is made to have written."""

    explicit: str
    source: str | None
    text: str


@pytest.mark.parametrize(
    "said",
    [
        _Said("YA", "Afar.txt:50-90", "Afar, prefix: YA"),  # not in "Libya"
        _Said("ya", "Afar.txt:50-90", "Afar, prefix: YA"),
        _Said("north of it", "Libya.txt:0-40", "Libya lies north of it"),
        _Said("Kabul", None, ""),
        _Said("", None, ""),
    ],
)
def test_the_first_reference_that_says_it_is_cited(said: _Said) -> None:
    ((fact, question),) = questions()[:1]
    hits = [
        Hit("a", 2.0, "Libya lies north of it\n\nLibya is dry", "x/Libya.txt", 0, 40),
        Hit("b", 1.0, "Afar is hot\n\nAfar, prefix: YA\n\nAfar is far", "x/Afar.txt", 50, 90),
        Hit("c", 0.5, "Elsewhere, prefix: YA", "x/Elsewhere.txt", 0, 21),
    ]
    records = [
        Asked(
            question.id, question.prompt, question.answers, name,
            said.explicit if name == "explicit" else "other", False, False, None, True, 1.0, None,
            (),
        )
        for name in FORMATS
    ]  # fmt: skip
    (example,) = bank_module._examples([(fact, question)], {question.prompt: hits}, records)
    assert (example.source, example.text) == (said.source, said.text)
    assert example.written["text"] == "other" and example.answer == fact.answer


def test_found_means_in_the_countrys_own_words() -> None:
    fact = Fact("Afar", "aircraft prefix", "YA")
    own = Hit("a", 1.0, "Afar, prefix: YA", "x/Afar.txt", 0, 9)
    other = Hit("b", 1.0, "Libya, prefix: YA", "x/Libya.txt", 0, 9)
    lacking = Hit("c", 1.0, "Afar is near Libya", "x/Afar.txt", 0, 9)
    assert bank_module._tells([other, own], fact)
    assert not bank_module._tells([other, lacking], fact)


def test_a_packed_reader_is_in_the_wheel(tmp_path: Path) -> None:
    """An installed strata has the reader that stands in the repository."""
    from hatchling.builders.wheel import WheelBuilder

    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "src" / "strata"
    place = decoder.PACKED.relative_to(Path(decoder.__file__).parents[1])
    (package / place).mkdir(parents=True)
    (package / "__init__.py").touch()
    names = ("config.json", "model.safetensors", "tokenizer.json", "reader.json", "stages.yaml",
             "curves.png", "README.md")  # fmt: skip
    for name in names:
        (package / place / name).write_bytes(b"x")
    (wheel,) = WheelBuilder(str(tmp_path)).build(directory=str(tmp_path / "dist"))
    held = zipfile.ZipFile(wheel).namelist()
    assert {f"strata/{place.as_posix()}/{name}" for name in names} <= set(held)

"""`strata eval memory`: the same references in every format, scored alike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import strata
from strata.errors import BankError, ConfigError, DataError
from strata.evals.memory import FORMATS, eval_memory
from strata.evals.questions import Question, read_questions
from strata.evals.recall import recall
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.source import open_retriever

pytest.importorskip("lance")

TOWNS = {
    "aral": "Aral sells salt.",
    "bryn": "Bryn sells wool.",
    "cairn": "Cairn sells peat. It is old.",
}
ROWS = [
    {"id": name, "prompt": f"{name.title()} sells", "answers": [f" {thing}."], "source": name}
    for name, thing in (("aral", "salt"), ("bryn", "wool"), ("cairn", "peat"))
]
ABSENT = [{"prompt": "Dunn sells", "answer": " tin."}]


@pytest.fixture
def bank(tmp_path: Path, model: Any, tokenizer: Any) -> strata.Bank:
    config = ExplicitMemoryConfig(reference_tokens=24, tokens_per_head=4)
    bank = strata.Bank.create(tmp_path / "bank", model=model, tokenizer=tokenizer, config=config)
    bank.add([strata.Document(text, name) for name, text in TOWNS.items()])
    return bank


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "questions.jsonl", tmp_path / "absent.jsonl"
    for path, rows in zip(paths, (ROWS, ABSENT), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def test_formats_differ_in_what_is_given_and_in_nothing_else(
    bank: strata.Bank, model: Any, tokenizer: Any, files: tuple[Path, Path]
) -> None:
    questions = read_questions(files[0])
    assert [question.source for question in questions] == list(TOWNS)
    result = eval_memory(
        model, tokenizer, bank, questions, retriever=open_retriever(bank, "text"), top_k=1,
        codecs=("bf16", "int4"), max_new_tokens=4,
    )  # fmt: skip
    assert [score.format for score in result.scores] == [*FORMATS, "explicit:bf16", "explicit:int4"]
    assert result.found == 1.0
    by_format = {score.format: score for score in result.scores}
    plain = recall(model, questions, tokenizer=tokenizer)
    assert by_format["none"].nats_per_answer == pytest.approx(plain.nats_per_answer, rel=1e-5)
    nats = {name: score.nats_per_answer for name, score in by_format.items()}
    # The bank's own code is bf16: made anew it is the same memory.
    assert nats["explicit:bf16"] == pytest.approx(nats["explicit"], rel=1e-4)
    assert nats["cached"] == nats["text"]
    assert len({round(value, 6) for value in nats.values()}) == 5
    kib = {name: score.kib_per_reference for name, score in by_format.items()}
    assert kib["none"] == 0 < kib["text"] < kib["explicit:int4"] < kib["explicit"] < kib["dense"]
    assert kib["explicit"] == kib["explicit:bf16"] and kib["cached"] == kib["dense"]
    said = {(record.id, record.format): record.text for record in result.records}
    assert all(said[name, "cached"] == said[name, "text"] for name in TOWNS)
    for record in result.records:
        source = f"{record.id}:0-{len(TOWNS[record.id])}"
        assert record.sources == (() if record.format == "none" else (source,))
        assert record.ttft_ms > 0 and record.nats > 0
    assert by_format["none"].retrieval == "none" and by_format["text"].retrieval == "search"


def test_a_further_bank_gives_what_it_stores(
    bank: strata.Bank, model: Any, tokenizer: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same references in another code, from files; searching counts wherever it is used."""
    config = bank.settings.config.model_copy(update={"codec": "int4"})
    other = strata.Bank.create(tmp_path / "int4", model=model, tokenizer=tokenizer, config=config)
    other.add([strata.Document(text, name) for name, text in TOWNS.items()])

    class Slow:
        runs_model = False
        by_words = open_retriever(bank, "text")

        def search(self, queries: Sequence[str], top_k: int) -> Any:
            time.sleep(0.3)
            return self.by_words.search(queries, top_k)

    asked: dict[str, Any] = dict(retriever=Slow(), top_k=2, max_new_tokens=4)
    questions = read_questions(files[0])
    result = eval_memory(
        model, tokenizer, bank, questions, formats=("none", "text", "explicit"), codecs=("int4",),
        banks={"coded": other}, **asked,
    )  # fmt: skip
    none, text, explicit, made_anew, coded = result.scores
    assert coded.format == "coded" and coded.nats_per_answer != explicit.nats_per_answer
    assert coded.nats_per_answer == pytest.approx(made_anew.nats_per_answer, rel=1e-4)
    assert coded.kib_per_reference == made_anew.kib_per_reference < explicit.kib_per_reference
    assert min(text.ttft_ms, explicit.ttft_ms, coded.ttft_ms) > 300 > none.ttft_ms
    for question in questions:
        given = {r.sources for r in result.records if r.id == question.id and r.format != "none"}
        assert len(given) == 1
    bare = eval_memory(model, tokenizer, bank, questions, formats=("none",), nats=False, **asked)
    assert bare.scores[0].nats_per_answer is None
    assert [r.text for r in bare.records] == [r.text for r in result.records if r.format == "none"]
    with pytest.raises(ConfigError, match="'text' is the name of a format"):
        eval_memory(model, tokenizer, bank, questions, banks={"text": other}, **asked)
    other.remove(["bryn"])
    with pytest.raises(BankError, match="not in"):
        eval_memory(model, tokenizer, bank, questions, banks={"coded": other}, **asked)


def test_an_answer_ends_with_its_first_line(
    bank: strata.Bank, model: Any, tokenizer: Any, files: tuple[Path, Path]
) -> None:
    """A break in front is no end; what stands behind the end is not written."""
    script = tokenizer("\n Rome\nParis Paris", add_special_tokens=False)["input_ids"]
    shown: list[int] = []

    def told(module: Any, args: Any, out: Any) -> Any:
        out.logits[:] = -10.0
        out.logits[..., script[len(shown)]] = 10.0
        shown.append(script[len(shown)])
        return out

    question = read_questions(files[0])[:1]
    with model.register_forward_hook(told):
        result = eval_memory(
            model, tokenizer, bank, question, retriever=None, formats=("none",), nats=False,
            max_new_tokens=len(script),
        )  # fmt: skip
    assert result.records[0].text == "Rome"
    assert tokenizer.decode(shown) == "\n Rome\n"


def test_text_is_the_prompt_with_its_references(
    bank: strata.Bank, model: Any, tokenizer: Any, files: tuple[Path, Path]
) -> None:
    questions = read_questions(files[0])
    result = eval_memory(
        model, tokenizer, bank, questions, retriever=None, formats=("text",), top_k=1,
        max_new_tokens=4,
    )  # fmt: skip
    told = [
        Question(q.id, f"{TOWNS[q.id]}\n\n{q.prompt}", q.answers, q.completions) for q in questions
    ]
    want = recall(model, told, tokenizer=tokenizer).nats_per_answer
    assert result.scores[0].nats_per_answer == pytest.approx(want, rel=1e-5)
    assert result.scores[0].retrieval == "oracle" and result.found == 1.0


def test_a_cached_beginning_is_not_computed_again(
    bank: strata.Bank, model: Any, tokenizer: Any, files: tuple[Path, Path]
) -> None:
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((*args, kwargs.get("input_ids"))[0].shape[1]),
        with_kwargs=True,
    )
    question = read_questions(files[0])[0]
    eval_memory(
        model, tokenizer, bank, [question], retriever=None, formats=("cached",), top_k=1,
        max_new_tokens=1,
    )  # fmt: skip
    whole = len(tokenizer(f"{TOWNS[question.id]}\n\n{question.prompt}")["input_ids"])
    filled, first = lengths[:2]
    assert first > 0 and filled > first and filled + first == whole


def test_what_counts_as_hallucinated(
    bank: strata.Bank, model: Any, tokenizer: Any, files: tuple[Path, Path]
) -> None:
    questions, absent = (read_questions(path) for path in files)

    def hallucinated(*refusals: str) -> float | None:
        result = eval_memory(
            model, tokenizer, bank, questions[:1], absent=absent, refusals=refusals,
            retriever=open_retriever(bank, "text"), formats=("none",), max_new_tokens=4,
        )  # fmt: skip
        return result.scores[0].hallucinated

    assert hallucinated("never said") == 1.0
    ids = tokenizer("Dunn sells", return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert hallucinated(tokenizer.decode(said, skip_special_tokens=True)) == 0.0


def test_the_command_line(
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    bank: strata.Bank,
    tiny_model: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    asked = ("eval", "memory", bank.path, files[0], "--model", tiny_model, "--top-k", 1,
             "--max-new-tokens", 4)  # fmt: skip
    monkeypatch.setenv("COLUMNS", "140")
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    code, shown, err = run(*asked, "--absent", files[1], "--out", out, "--plot", plot)
    assert code == 0, err
    assert all(name in shown for name in (*FORMATS, "hallucinated"))
    assert plot.read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    assert len(report["records"]) == 3 * len(FORMATS)
    code, shown, _ = run(*asked, "--by", "oracle", "--format", "text", "--json", "--limit", 2)
    scores = json.loads(shown)["scores"]
    assert code == 0 and [s["num_questions"] for s in scores] == [2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "words"), "give some of none, text, cached, dense, explicit"),
        (("--top-k", "0"), "--top-k 0: give 1 or more"),
        (("--max-new-tokens", "60"), "do not fit the model's context of 64"),
        (("--by", "luck"), "no way to search 'luck'"),
        (("--by", "oracle", "--absent", "{absent}"), "an oracle knows no references"),
        (("--limit", "0"), "--limit 0"),
        (("--codec", "zip"), "zip"),
    ],
)
def test_wrong_input_is_one_line(
    run: Callable[..., tuple[int, str, str]],
    bank: strata.Bank,
    tiny_model: Path,
    files: tuple[Path, Path],
    options: tuple[str, ...],
    says: str,
) -> None:
    given = [option.format(absent=files[1]) for option in options]
    code, out, err = run("eval", "memory", bank.path, files[0], "--model", tiny_model, *given)
    lines = [line for line in err.splitlines() if line.startswith("strata: error: ")]
    assert code != 0 and out == "" and len(lines) == 1 and says in lines[0], err


def test_an_oracle_needs_sources_that_hold_answers(
    bank: strata.Bank, model: Any, tokenizer: Any
) -> None:
    lost = Question("q", "Aral sells", ("salt",), (" salt.",))
    with pytest.raises(DataError, match="names no source"):
        eval_memory(model, tokenizer, bank, [lost], retriever=None)
    wrong = Question("q", "Aral sells", ("tin",), (" tin.",), "aral")
    with pytest.raises(DataError, match="no reference of 'aral' in the bank holds"):
        eval_memory(model, tokenizer, bank, [wrong], retriever=None)
    with pytest.raises(ConfigError, match="no questions"):
        eval_memory(model, tokenizer, bank, [], retriever=None)


def test_references_of_a_source_and_a_sample(bank: strata.Bank) -> None:
    assert [hit.text for hit in bank.of_source("cairn")] == [TOWNS["cairn"]]
    assert bank.of_source("nowhere") == []
    assert sorted(bank.sample_texts(10)) == sorted(TOWNS.values())
    assert len(bank.sample_texts(2)) == 2 and len(bank.sample_texts(1)) == 1

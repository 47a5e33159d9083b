"""`strata knowledge probe`: what a model knows alone, behind texts, and with their memories."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from strata.errors import ConfigError, DataError
from strata.evals import knowledge_run
from strata.evals.facts import Fact, read_facts
from strata.evals.knowledge import KnowledgeProbe, ProbedFact, summarise
from strata.evals.knowledge_run import run_probe
from strata.evals.scoring import encode_completion, encode_prompt
from strata.explicit.attach import attach
from strata.explicit.encode import Encoder
from strata.explicit.hits import Hit
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig

pytest.importorskip("lance")

CONFIG = ExplicitMemoryConfig(reference_tokens=32, tokens_per_head=4)
FACTS = [
    Fact("aral", "Aral sells", " salt.", {"a": "Aral sells salt.", "b": "Salt is sold in Aral."}),
    Fact("bryn", "Bryn sells", " wool.", {"a": "Bryn sells wool.", "c": "In Bryn wool is sold."}),
    Fact("again", "Aral sells", " salt.", {"a": "It is salt that Aral sells."}),
    Fact("cairn", "The town of Cairn sells", " peat and rope.", {"a": "Cairn: peat and rope."}),
]


def by_hand(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, ...]:
    """Probabilities of an answer's tokens by one plain call."""
    before, after = encode_prompt(tokenizer, prompt), encode_completion(tokenizer, answer)
    ids = torch.tensor([[*before, *after]])
    with torch.no_grad():
        shares = model(input_ids=ids).logits[0].double().softmax(-1)
    first = len(before) - 1
    return tuple(shares[first + n, token].item() for n, token in enumerate(after))


class One:
    """A source that always finds one memory."""

    def __init__(self, memory: Any) -> None:
        self.load = lambda ids: memory

    def find(self, queries: Any, top_k: int) -> list[list[Hit]]:
        return [[Hit("m", 0.0, "m", "m", 0, 0)] for _ in queries]


def test_each_way_is_what_it_says(model: Any, tokenizer: Any) -> None:
    """All facts in batches, against each alone by hand."""
    probed = KnowledgeProbe(model, tokenizer, FACTS, config=CONFIG, batch_size=3).probe(FACTS)
    encoder = Encoder(Host(model), tokenizer, CONFIG)
    for fact, found in zip(FACTS, probed, strict=True):
        asked = fact.prompt, fact.answer
        assert found.id == fact.id and list(found.text) == list(fact.texts) == list(found.explicit)
        assert found.alone == pytest.approx(by_hand(model, tokenizer, *asked), rel=1e-4)
        for name, text in fact.texts.items():
            behind = by_hand(model, tokenizer, f"{text}\n\n{fact.prompt}", fact.answer)
            assert found.text[name] == pytest.approx(behind, rel=1e-4)
            memory = encoder.encode([text]).to(torch.bfloat16)  # the code that CONFIG stores in
            with attach(model, One(memory), tokenizer=tokenizer, config=CONFIG, top_k=1):
                reading = by_hand(model, tokenizer, *asked)
            assert found.explicit[name] == pytest.approx(reading, rel=1e-4)
            assert found.explicit[name] != pytest.approx(found.alone, rel=1e-4)
    assert probed[0].explicit["a"] != pytest.approx(probed[2].explicit["a"], rel=1e-5)


def test_figures_are_those_of_the_facts() -> None:
    facts = [
        ProbedFact(
            "known", "p", " a", "known", "known", (0.8, 0.5001),
            {"a": (0.1, 1.0)}, {"a": (0.1, 1.0)},
        ),
        ProbedFact(
            "one", "p", " a", "imitable", "separable", (0.5, 0.4),
            {"a": (0.9, 1.0), "b": (1.0, 1.0)}, {"a": (0.9, 1.0), "b": (0.5, 1.0)},
        ),
        ProbedFact("two", "p", " a", "not", "imitable", (0.0,), {"a": (0.8,)}, {"a": (0.95,)}),
    ]  # fmt: skip
    found = summarise(facts)
    assert (found.num_facts, found.num_lacking, found.num_pairs) == (3, 2, 4)
    third = pytest.approx(1 / 3)
    assert found.shares == {"known": third, "imitable": third, "separable": 0.0, "not": third}
    assert found.shares_explicit["separable"] == third and found.shares_explicit["not"] == 0
    alone, text, explicit, *by_wording = found.ways
    assert alone.answer == pytest.approx((0.8 * 0.5001 + 0.2 + 0.0) / 3) and alone.supplied is None
    assert alone.least == pytest.approx((0.5001 + 0.4 + 0.0) / 3)
    assert text.answer == pytest.approx((0.1 + 0.9 + 1.0 + 0.8) / 4)
    assert text.supplied == pytest.approx(2 / 3) and explicit.supplied == pytest.approx(2 / 3)
    assert [(way.way, way.wording) for way in by_wording] == [
        ("text", "a"), ("explicit", "a"), ("text", "b"), ("explicit", "b"),
    ]  # fmt: skip
    assert by_wording[0].supplied == 0.5 and by_wording[3].supplied == 0.0
    recovery = found.recovery
    assert recovery.supplied is not None and recovery.both is not None
    assert recovery.supplied.value == 1.0 and recovery.both.value == 0.5
    gained = ((0.9 - 0.2) + (0.5 - 0.2) + 0.95) / ((0.9 - 0.2) + (1.0 - 0.2) + 0.8)
    assert recovery.gain is not None and recovery.gain.value == pytest.approx(gained)
    assert recovery.gain.low <= gained <= recovery.gain.high
    nothing = summarise(facts[:1]).recovery
    assert nothing.supplied is None and nothing.gain is None


def test_the_interval_narrows_with_more_facts() -> None:
    def one(number: int) -> ProbedFact:
        good = (0.95,) if number % 4 else (0.2,)
        return ProbedFact(
            str(number), "p", " a", "imitable", "not", (0.1,), {"a": (0.95,)}, {"a": good}
        )

    few, many = (summarise([one(n) for n in range(count)]).recovery.supplied for count in (20, 500))
    assert few is not None and many is not None
    assert few.value == many.value == 0.75
    assert many.high - many.low < 0.1 < few.high - few.low
    # That of 500 draws with a share of 3/4 is about 4 standard errors wide.
    assert many.high - many.low == pytest.approx(3.92 * math.sqrt(0.75 * 0.25 / 500), rel=0.1)


def test_a_killed_probe_goes_on(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knowledge_run, "_TOGETHER", 2)
    given: dict[str, Any] = dict(config=CONFIG, named="tiny")
    whole = run_probe(model, tokenizer, FACTS, out=tmp_path / "whole", **given)
    lines = (tmp_path / "whole" / "facts.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [fact.id for fact in FACTS]
    cut = tmp_path / "whole" / "facts.jsonl"
    cut.write_text("\n".join(lines[:3])[:-5])
    asked: list[int] = []
    original = KnowledgeProbe.probe

    def noting(self: KnowledgeProbe, facts: list[Fact]) -> list[ProbedFact]:
        asked.append(len(facts))
        return original(self, facts)

    monkeypatch.setattr(KnowledgeProbe, "probe", noting)
    again = run_probe(model, tokenizer, FACTS, out=tmp_path / "whole", **given)
    assert asked == [2]  # two whole lines stood there
    assert [way.answer for way in again.ways] == pytest.approx([way.answer for way in whole.ways])
    assert json.loads((tmp_path / "whole" / "knowledge.json").read_text())["num_facts"] == 4
    with pytest.raises(ConfigError, match="a probe with other facts"):
        run_probe(model, tokenizer, FACTS[:2], out=tmp_path / "whole", **given)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    with pytest.raises(ConfigError, match="a probe with other model"):
        run_probe(model, tokenizer, FACTS, out=tmp_path / "whole", **given)
    cut.write_text('{"id": "aral"}\n')
    with torch.no_grad():
        model.get_input_embeddings().weight.sub_(0.01)
    with pytest.raises((DataError, ConfigError)):
        run_probe(model, tokenizer, FACTS, out=tmp_path / "whole", **given)


def test_facts_of_files(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    rows = [
        {"id": "a", "prompt": "Aral sells", "answer": " salt", "texts": ["Aral: salt.", "Salt!"]},
        {"id": "b", "question": "Where was Bryn born?", "answers": ["Fez", "Fes"], "source": "d",
         "relation": "place of birth", "texts": {"mine": "Bryn, of Fez."}},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = read_facts(path)
    assert plain[0] == Fact(
        "a", "Aral sells", " salt", {"text 1": "Aral: salt.", "text 2": "Salt!"}
    )
    assert (
        plain[1].answer == " Fez" and plain[1].prompt == "Question: Where was Bryn born?\nAnswer:"
    )
    more = read_facts(path, documents={"d": "In Fez was born Bryn."}, wordings=True)
    assert dict(more[0].texts) == dict(plain[0].texts)
    assert list(more[1].texts) == ["mine", "source", *(f"statement {n}" for n in range(1, 6))]
    assert more[1].texts["source"] == "In Fez was born Bryn."
    assert more[1].texts["statement 1"] == "Bryn was born in Fez."
    assert all("Bryn" in text and "Fez" in text for text in more[1].texts.values())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p", "answer": " a"}, "line 2: nothing states it"),
        ({"prompt": "p", "answer": " a", "texts": []}, "nothing states it"),
        ({"prompt": "p", "answer": " a", "texts": "one"}, "'texts' must be a list"),
        ({"prompt": "p", "answer": " a", "texts": [" "]}, "'texts' must be a list"),
        ({"prompt": "p", "answer": " a", "texts": {"x": 3}}, "'texts' must be a list"),
        ({"prompt": "p", "answer": " a", "texts": ["t"] * 101}, "at most 100 texts"),
        ({"prompt": "p", "answer": " a", "texts": ["t"], "id": "1"}, "a second row has the id '1'"),
        ({"prompt": "p", "answer": " a", "source": "far"}, "'far' is none of the 1 documents"),
        ({"texts": ["t"], "answer": "a"}, "no 'question' or 'prompt'"),
    ],
)
def test_wrong_facts_are_one_line(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    path = tmp_path / "facts.jsonl"
    good = {"id": "1", "prompt": "p", "answer": " a", "texts": ["t"]}
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, row)))
    with pytest.raises(DataError, match=says) as caught:
        read_facts(path, documents={"near": "x"})
    assert "\n" not in str(caught.value)


def test_what_is_too_long_is_refused_before_work(model: Any, tokenizer: Any) -> None:
    long = Fact("long", "p", " a", {"t": "word " * 30})
    with pytest.raises(DataError, match=r"fact long: 't' has .* tokens, a reference 32 at most"):
        KnowledgeProbe(model, tokenizer, [*FACTS, long], config=CONFIG)
    prompt = Fact("far", "word " * 40, " a", {"t": "word"})
    with pytest.raises(DataError, match=r"fact far: .* the model reads 64"):
        KnowledgeProbe(model, tokenizer, [prompt], config=CONFIG)
    with pytest.raises(DataError, match="no facts"):
        KnowledgeProbe(model, tokenizer, [], config=CONFIG)


def test_the_command_line(
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    facts, documents, out = (tmp_path / name for name in ("f.jsonl", "d.jsonl", "out"))
    rows = [
        {"id": n, "question": "Where was Bo born?", "answer": place, "source": "s",
         "relation": "place of birth"}
        for n, place in enumerate(("Fez", "Oslo"))
    ]  # fmt: skip
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents.write_text(json.dumps({"id": "s", "text": "Bo of Fez."}) + "\n")
    asked = (
        "knowledge", "probe", facts, "--documents", documents, "--wordings", "--model", tiny_model,
        "--set", "reference_tokens=40", "--template", "{question}", "--out", out,
    )  # fmt: skip
    code, shown, err = run(*asked)
    assert code == 0, err
    assert all(word in shown for word in ("known", "imitable", "statement 5", "recovered"))
    kept = (out / "facts.jsonl").read_bytes()
    code, shown, err = run(*asked, "--json")
    assert code == 0, err
    summary = json.loads(shown)
    assert summary == json.loads((out / "knowledge.json").read_text())
    assert summary["num_pairs"] == 12 and (out / "facts.jsonl").read_bytes() == kept
    for wrong, says in (
        (("--set", "tokens=3"), "unknown key tokens"),
        (("--limit", "0"), "--limit 0: give 1 or more"),
        (("--limit", "1"), "a probe with other facts"),
        (("--set", "reference_tokens=32"), "a probe with other memory settings"),
        (("--documents", tmp_path / "none.jsonl"), "none.jsonl"),
    ):
        code, shown, err = run(*asked, *wrong)
        lines = [line for line in err.splitlines() if line.startswith("strata: error: ")]
        assert code == 2 and shown == "" and len(lines) == 1 and says in lines[0], err

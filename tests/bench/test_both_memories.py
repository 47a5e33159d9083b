"""Both memories in one model: what is counted, and that changes of a bank are real."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import strata
from strata.errors import DataError, ModelError
from strata.explicit.source import open_retriever
from strata.models import load

pytest.importorskip("lance")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "both_memories.py"
TOWNS = ("Aral", "Bryn", "Cairn", "Dunn", "Esk")
WARES = ("salt", "wool", "peat", "tin", "rope")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("both_memories", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["both_memories"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """References that sell something, one of a relation of its own, and questions on them."""
    folder = tmp_path / "data"
    told = [
        {"id": f"t-{n}", "text": f"Here {town} sells {ware}."}
        for n, (town, ware) in enumerate(zip(TOWNS, WARES, strict=True))
    ]
    told.append({"id": "t-9", "text": "Here Fair is red."})
    write(folder / "eval" / "test" / "bank" / "references.jsonl", told)
    asked = [
        {
            "id": n, "question": f"What does {town} sell?", "answers": [ware, "goods"],
            "source": f"t-{n}", "relation": "sells",
        }
        for n, (town, ware) in enumerate(zip(TOWNS, WARES, strict=True))
    ]  # fmt: skip
    red = {"question": "What is Fair?", "answers": ["red"], "source": "t-9", "relation": "is"}
    write(folder / "eval" / "test" / "questions.jsonl", [*asked, red])
    write(
        folder / "eval" / "know" / "questions.jsonl",
        [{"question": "What does Gorm sell?", "answers": ["Ada"]}],
    )
    return folder


@pytest.fixture
def reader(tmp_path: Path, _tiny_model_master: Path) -> Path:
    """A decoder with memory layers that has room for references."""
    torch.manual_seed(0)
    options: Any = {"max_position_embeddings": 512}
    model = AutoModelForCausalLM.from_pretrained(_tiny_model_master, **options)
    layers = strata.MemoryLayerConfig(
        layers=(1,), num_half_keys=8, top_k=4, num_heads=2, placement="beside"
    )
    strata.install(model, layers)
    table = model.get_decoder().memory_values[0]
    torch.nn.init.normal_(table.weight, std=20.0)
    model.save_pretrained(tmp_path / "reader")
    AutoTokenizer.from_pretrained(_tiny_model_master).save_pretrained(tmp_path / "reader")
    card = {"memory": {"layers": [1], "tokens_per_head": 3}}
    (tmp_path / "reader" / "reader.json").write_text(json.dumps(card), encoding="utf-8")
    return tmp_path / "reader"


def test_it_runs_and_goes_on(
    script: ModuleType, data: Path, reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(reader), str(data), "--out", str(out), "--embedder", "none", "--top-k", "1",
               "--changes", "4", "--limit", "3"]  # fmt: skip
    script.main(command)
    report = json.loads((out / "both_memories.json").read_text())
    rows = [(r["questions"], r["memory_layers"], r["num_questions"]) for r in report["knowledge"]]
    assert rows == [("know", "on", 1), ("know", "off", 1), ("test", "on", 3), ("test", "off", 3)]
    nats = [row["nats"][name] for row in report["knowledge"] for name in ("none", "explicit")]
    assert len({round(value, 4) for value in nats}) == 8  # layers and bank both change every answer
    assert report["knowledge"][2]["found"] == 1.0
    changes = report["changes"]
    assert changes["num_records"] == 4 and len(changes["records"]) == 4
    assert changes["all"]["removed: the record is read no more"] == 1.0
    assert changes["change_ms"]["remove"] > 0
    for record in changes["records"]:
        assert record["ids"][0] in record["before"]["given"]
        assert record["ids"][1] in record["edited"]["given"]
        assert record["ids"][0] not in record["edited"]["given"]
        assert record["restored"] == record["before"]  # text, memories and citation
    page = (out / "both_memories.md").read_text()
    assert "| 3 of test | off |" in page and page in capsys.readouterr().out
    bank = strata.Bank.open(out / "bank")
    assert bank.settings.config.layers == (1,) and bank.settings.config.tokens_per_head == 3
    bank.remove(["t-2"])  # as if a run had been killed
    script.main(command)
    assert json.loads((out / "both_memories.json").read_text())["references"] == 6


def test_a_perfect_reader_follows_every_change(
    script: ModuleType, data: Path, reader: Path, tmp_path: Path
) -> None:
    """It says what follows "sells" in the first reference found of the town asked for."""
    test = data / "eval" / "test"
    cases = script.read_cases(test / "questions.jsonl", test / "bank" / "references.jsonl")
    assert [case.source for case in cases] == [f"t-{n}" for n in range(5)]  # "red" has no other
    model, tokenizer = load(reader)
    bank = strata.Bank.create(tmp_path / "bank", model=model, tokenizer=tokenizer)
    bank.add([strata.Document(case.text, case.source) for case in cases])
    retriever = open_retriever(bank)

    def ask(prompt: str) -> Any:
        town = prompt.split("does ")[1].split(" sell")[0]
        hits = [hit for hit in retriever.search([prompt], 3)[0] if town in hit.text]
        if not hits:
            return script.Told("unknown", (), None)
        said = hits[0].text.split("sells ")[1].rstrip(".")
        return script.Told(said, (hits[0].id,), hits[0].id)

    changed = script.change_records(bank, cases, ask)
    counts = script.tally(changed)
    for name in ("all", "right"):
        old = counts[name].pop("edited: the old answer is still given")
        assert old == 0.0 and set(counts[name].values()) == {1.0}, counts
    for case, one in zip(cases, changed, strict=True):
        assert one.edited.text == case.new != case.old[0] and one.edited.cited == one.ids[1]
    # One that knows by heart and never looks changes nothing.
    blind = [replace(one, removed=one.before, edited=one.before) for one in changed]
    counts = script.tally(blind)["all"]
    assert counts["edited: the old answer is still given"] == 1.0
    followed = (
        "removed: the old answer is gone",
        "removed: the record is read no more",
        "edited: the new answer is given",
        "edited: the edited record is cited",
    )
    assert [counts[name] for name in followed] == [0.0] * 4
    assert script.tally([])["all"]["edited: the new answer is given"] is None


def test_layers_are_off_and_on_again(script: ModuleType, reader: Path, tiny_model: Path) -> None:
    model, _ = load(reader)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    with script.layers_off(model):
        off = model(ids).logits
    assert torch.equal(model(ids).logits, before) and not torch.allclose(off, before)
    plain, _ = load(tiny_model)  # memory was put beside its layers
    torch.testing.assert_close(off, plain(ids).logits)
    with pytest.raises(ModelError, match="no memory layers"), script.layers_off(plain):
        pass


@pytest.mark.parametrize("lost", ["eval/test/bank/references.jsonl", "eval/know/questions.jsonl"])
def test_wrong_input_is_one_line(
    script: ModuleType, data: Path, reader: Path, tmp_path: Path, lost: str
) -> None:
    (data / lost).unlink()
    with pytest.raises(SystemExit) as ended:
        script.main([str(reader), str(data), "--out", str(tmp_path / "out")])
    said = str(ended.value)
    assert said.startswith("error: ") and Path(lost).name in said and "\n" not in said
    assert not (tmp_path / "out" / "bank").exists()


def test_a_decoder_that_does_not_say_how_it_reads_is_refused(
    script: ModuleType, data: Path, reader: Path, tmp_path: Path
) -> None:
    (reader / "reader.json").unlink()
    with pytest.raises(SystemExit, match="is no packed reader: make one with strata reader pack"):
        script.main([str(reader), str(data), "--out", str(tmp_path / "out")])


def test_a_record_that_is_not_there_is_said(
    script: ModuleType, reader: Path, tmp_path: Path
) -> None:
    model, tokenizer = load(reader)
    bank = strata.Bank.create(tmp_path / "bank", model=model, tokenizer=tokenizer)
    bank.add([strata.Document("Aral sells salt.", "t-0")])
    with pytest.raises(DataError, match=r"no record of 't-0' in bank .* holds 'wool'"):
        script.record(bank, "t-0", ("wool",))

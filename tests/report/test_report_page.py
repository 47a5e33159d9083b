"""`strata report`: every kind of run as one page, whose numbers are those of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from strata.evals.knowledge import ProbedFact, summarise
from strata.evals.memory import Asked, FormatScore, MemoryEvaluation
from strata.evals.recall import QuestionScore, RecallResult
from strata.evals.report import Measure
from strata.evals.report import Report as Evaluation
from strata.models import Counts
from strata.quickstart.bank import BankOutcome, Sourced
from strata.quickstart.report import Contestant, Example, Outcome, Point, write_json
from strata.reader.curves import Look, add_look
from strata.reader.exam import Exam
from strata.reader.layers import write_layer
from strata.report.page import write_report
from strata.train import train

RECIPE = """
model:
  host: {model_type: llama, hidden_size: 16, num_hidden_layers: 3, num_attention_heads: 2,
         intermediate_size: 16, vocab_size: 320, max_position_embeddings: 64}
memory: {layers: [1, 2], num_heads: 1, top_k: 4, num_half_keys: 8, key_dim: 8}
data: {batch_size: 2, sequence_tokens: 32}
schedule: {warmup_steps: 3}
run: {steps: 12, device: cpu, log_every: 1, health_every: 5, validate_every: 6, validate_batches: 1}
"""
HOSTILE = "<script>alert('Café')</script> & <b>"
VOID = ("meta", "br", "link", "img", "input", "hr")


@dataclass
class Page(HTMLParser):
    """What a browser would find in a page."""

    text: str
    titles: list[str] = field(default_factory=list)
    cells: list[tuple[str, str]] = field(default_factory=list)  # place, text
    origins: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    within: list[str] = field(default_factory=list)
    words: str = ""
    unboxed: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._classes: list[str] = []
        self.feed(self.text)
        self.close()
        assert not self.within, f"left open: {self.within}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.names += [given["id"]] if "id" in given else []
        self.links += [v for k, v in given.items() if k.split(":")[-1] in ("src", "href", "srcset")]
        if tag in VOID or self.get_starttag_text().endswith("/>"):
            return
        self.within.append(tag)
        self._classes.append(given.get("class", ""))
        if tag == "table" and "scroll" not in self._classes:
            self.unboxed += 1
        if tag == "td" and "data-from" in given:
            self.cells.append((given["data-from"], ""))
        elif tag == "td":
            self.cells.append(("", ""))
        if tag == "h2":
            self.titles.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)  # which leaves nothing open

    def handle_endtag(self, tag: str) -> None:
        assert self.within.pop() == tag
        self._classes.pop()

    def handle_data(self, data: str) -> None:
        self.words += data
        if "td" in self.within and "span" not in self.within:
            place, text = self.cells[-1]
            self.cells[-1] = (place, text + data)
        if "h2" in self.within:
            self.titles[-1] += data


def look_up(place: str, above: Path) -> Any:
    """What stands in the file and under the key that a place names."""
    file, _, pointer = place.partition("#")
    text = (above / file).read_text(encoding="utf-8")
    if file.endswith(".yaml"):
        value = yaml.safe_load(text)
        for key in pointer.split("."):
            value = value[key]
        return value
    keys = pointer.split("/")
    if keys[0].startswith("L"):
        value = json.loads(text.split("\n")[int(keys[0][1:]) - 1])
    else:
        value = json.loads(text)
    for key in keys[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def agrees(text: str, value: Any) -> bool:
    """Whether a cell shows a value, to as many digits as it shows."""
    if isinstance(value, list):
        return text in ("\n".join(map(str, value)), str(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text.strip() == str(value).strip()
    if text == str(value):
        return True
    shown = re.fullmatch(r"(-?[\d,]+(?:\.(\d+))?)(?:e([+-]\d+))?(%?)", text)
    assert shown is not None, text
    scale = 10.0 ** int(shown[3] or 0) / (100 if shown[4] else 1)
    step = scale * 10.0 ** -len(shown[2] or "")
    return abs(float(shown[1].replace(",", "")) * scale - value) <= 0.5001 * step


def read(out: Path, above: Path) -> Page:
    """A page, checked for all that holds of any: whole, alone, boxed, and true to its files."""
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.text.startswith("<!DOCTYPE html>") and 'name="viewport"' in page.text
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    inside = ("#", "data:image/png;base64,")
    assert all(link.startswith(inside) for link in page.links), page.links
    assert "http" not in page.text and "@import" not in page.text
    assert not re.findall(r"url\((?!#)", page.text)
    assert len(page.names) == len(set(page.names))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.names)
    assert page.unboxed == 0 and page.tags.count("h1") == 1
    numbers = 0
    for place, text in page.cells:
        if not place:
            assert not re.fullmatch(r"-?[\d,.]+(e[+-]\d+)?%?", text) or text.isdigit(), text
            continue
        value = look_up(place, above)
        if isinstance(value, list) and value and isinstance(value[0], float):
            continue  # a wording, whose place is that of its probabilities
        assert agrees(text, value), (place, text, value)
        numbers += isinstance(value, int | float)
        assert place.partition("#")[0] in page.words, "the file is named in the page, too"
    assert numbers > 3
    pngs = sorted(out.glob("*.png"))
    assert page.tags.count("svg") == page.tags.count("figure") == len(pngs)
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in pngs)
    return page


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A folder of two training runs, one without memory, that logged a few steps."""
    from strata.config import load_config
    from strata.train import Recipe

    above = tmp_path_factory.mktemp("trained")
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    recipe.write_text(RECIPE)
    for name, changes in (("memory", []), ("dense", ["memory=null", "optim.lr=0.001"])):
        given = [f"data.dir={tiny_data}", f"run.dir={above / name}", f"name={name}", *changes]
        train(load_config(Recipe, recipe, given), progress=False)
    return above


def evaluation(*, found: float = 0.75) -> MemoryEvaluation:
    scores = tuple(
        FormatScore(name, by, 2, accuracy, accuracy, nats, None, 12.345, 99.0, kib)
        for name, by, accuracy, nats, kib in (
            ("none", "none", 0.0, 25.5, 0.0),
            ("explicit", "search", 0.5, None, 65.0),
        )
    )
    records = tuple(
        Asked(
            f"q{n}", f"Question: {n}\nAnswer:", ("Fez", "Fès"), name, HOSTILE if n else "Fez",
            n == 0, n == 0, 1.25, True, 11.0, None, ("a.txt:0-10", "b.txt:5-99"),
        )
        for n in range(2) for name in ("none", "explicit")
    )  # fmt: skip
    return MemoryEvaluation(found, scores, records)


def save(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    return path


def test_training_runs_are_compared(trained: Path, tmp_path: Path) -> None:
    runs = [trained / "memory", trained / "dense"]
    written = write_report(runs, out=tmp_path / "page")
    page = read(tmp_path / "page", trained)
    assert written.sections == ("Training, compared",) == tuple(page.titles)
    names = {picture.name for picture in written.pictures}
    assert names == {f"training-{name}.png" for name in
                     ("loss", "speed", "rows-used", "entropy", "hottest")}  # fmt: skip
    records = [json.loads(line) for line in (runs[0] / "metrics.jsonl").open()]
    assert ("memory/metrics.jsonl#L12/loss", f"{records[-1]['loss']:.4f}") in page.cells
    last = max(n for n, record in enumerate(records) if "health" in record)
    (layer, health), *others = records[last]["health"].items()
    key = f"memory/metrics.jsonl#L{last + 1}/health/{layer}/rows_used"
    assert others and (key, f"{health['rows_used']:.1%}") in page.cells
    assert "Where the recipes differ" in page.words
    assert ("dense/recipe.yaml#optim.lr", "0.001") in page.cells
    assert not any(place == "dense/recipe.yaml#optim.value_lr" for place, _ in page.cells)


def test_one_training_run_that_has_only_begun(trained: Path, tmp_path: Path) -> None:
    whole = write_report([trained / "dense"], out=tmp_path / "whole")
    assert whole.sections == ("Training of dense",)
    page = read(tmp_path / "whole", trained)
    assert "No record of memory health" in page.words and "Recipe" in page.words
    begun = tmp_path / "runs" / "begun"
    begun.mkdir(parents=True)
    (begun / "recipe.yaml").write_text((trained / "dense" / "recipe.yaml").read_text())
    written = write_report([begun], out=tmp_path / "out")
    assert not written.pictures
    assert "Nothing was logged yet by begun" in (tmp_path / "out" / "report.html").read_text()


def test_an_evaluation_of_memory_and_its_answers(tmp_path: Path) -> None:
    file = save(tmp_path / "runs" / "formats.json", asdict(evaluation()))
    write_report([file], out=tmp_path / "page")
    page = read(tmp_path / "page", tmp_path)
    assert page.titles == ["Formats of knowledge: runs/formats.json"]
    assert ("runs/formats.json#/scores/1/kib_per_reference", "65.0") in page.cells
    assert ("runs/formats.json#/scores/0/accuracy", "0.0%") in page.cells
    sources = [text for place, text in page.cells if place.endswith("/sources")]
    assert sources == ["a.txt:0-10\nb.txt:5-99"] * 4
    assert [text.strip() for place, text in page.cells if place.endswith("/text")] == [
        "Fez", "Fez", HOSTILE, HOSTILE,
    ]  # fmt: skip
    assert page.words.count("✓") == page.words.count("✗") == 2
    assert "75.0% of the questions" in page.words
    write_report([file], out=tmp_path / "page", answers=1)
    fewer = read(tmp_path / "page", tmp_path)
    assert "The first 1 of 2 questions" in fewer.words and HOSTILE not in fewer.words
    write_report([file], out=tmp_path / "page", answers=0)
    assert "Answers and their sources" not in read(tmp_path / "page", tmp_path).words


def test_a_knowledge_probe(tmp_path: Path) -> None:
    facts = [
        ProbedFact("a", "Aral sells", " salt", "imitable", "separable", (0.25, 0.5),
                   {"x": (0.9, 1.0), "y": (0.95,)}, {"x": (0.9, 0.9), "y": (0.85,)}),
        ProbedFact("b", HOSTILE, " wool", "known", "known", (0.75,), {"x": (1.0,)}, {"x": (1.0,)}),
    ]  # fmt: skip
    run = tmp_path / "probe"
    save(run / "knowledge.json", asdict(summarise(facts)))
    lines = [json.dumps(asdict(fact)) + "\n" for fact in facts]
    (run / "facts.jsonl").write_text("".join(lines) + lines[0][:30])  # a kill cut the last one off
    save(run / "probe.json", {"model": "m"})
    written = write_report([run], out=run / "report")
    page = read(run / "report", tmp_path)
    assert page.titles == ["Knowledge probe probe"] and len(written.pictures) == 2
    assert ("probe/knowledge.json#/shares/imitable", "50.0%") in page.cells
    assert ("probe/knowledge.json#/recovery/supplied/value", "0.500") in page.cells
    assert ("probe/facts.jsonl#L1/alone/0", "0.250") in page.cells
    assert ("probe/facts.jsonl#L1/explicit/y/0", "0.850") in page.cells
    assert "2 facts, of which the model alone lacks 1" in page.words


def test_many_points_are_a_picture_in_the_picture(tmp_path: Path) -> None:
    one = ProbedFact("a", "p", " a", "not", "not", (0.1,), {"x": (0.5,)}, {"x": (0.25,)})
    save(tmp_path / "knowledge.json", asdict(summarise([one])))
    (tmp_path / "facts.jsonl").write_text(600 * (json.dumps(asdict(one)) + "\n"))
    write_report([tmp_path], out=tmp_path / "page")
    page = read(tmp_path / "page", tmp_path.parent)
    assert any(link.startswith("data:image/png") for link in page.links)
    assert len(page.text) < 200_000


def test_a_reader_with_its_stages_and_exam(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "reader"
    look = Look(
        number=1, stage="text1", step=5, tokens=1000, loss=2.5, kept=None,
        exact={"none": 0.0, "text_1": 0.25}, contains={}, num_questions=8, wall_s=1.0,
    )  # fmt: skip
    run.mkdir()
    add_look(run, look)
    later = replace(
        look, step=9, tokens=2000, kept=64, exact={"none": 0.125, "text_1": 0.75, "memory_1": 0.5}
    )
    add_look(run, later)
    write_layer(run, {0: {"memory_1": 0.0}, 1: {"memory_1": 0.5}})
    exam = Exam("01-text1", evaluation(found=1.0), evaluation(found=0.5))
    save(run / "exam" / "01-text1" / "report.json", asdict(exam))
    stage = run / "01-text1"
    stage.mkdir()
    for name in ("metrics.jsonl", "recipe.yaml"):
        (stage / name).write_bytes((trained / "memory" / name).read_bytes())
    written = write_report([run], out=tmp_path / "page")
    page = read(tmp_path / "page", tmp_path)
    assert page.titles == [
        "What reader has learned",
        "Exam of reader, 01-text1: given what answers",
        "Exam of reader, 01-text1: given what its bank's search finds",
        "Training of reader, stage by stage",
    ]
    assert ("reader/probes.jsonl#L2/exact/memory_1", "50.0%") in page.cells
    assert ("reader/layer.json#/exact/1/memory_1", "50.0%") in page.cells
    assert ("reader/exam/01-text1/report.json#/search/scores/1/accuracy", "50.0%") in page.cells
    assert any(place.startswith("reader/01-text1/metrics.jsonl#L12/") for place, _ in page.cells)
    assert len(written.pictures) == 2 + 2 + 5 and "Chosen: layer 1." in page.words
    alone = run / "exam" / "01-text1"
    write_report([alone], out=tmp_path / "exam")
    assert read(tmp_path / "exam", alone.parent).titles == [
        "Exam 01-text1/report.json: given what answers",
        "Exam 01-text1/report.json: given what its bank's search finds",
    ]


def test_a_quickstart(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "quick"
    recall = RecallResult((QuestionScore("q", True, "Fez", 1.5, 2),))
    counts = Counts(10, 6, 4, 7, 1000)
    points = [Point(1, 3.0, 0.0), Point(2, 2.0, 0.5)]
    two = [Contestant(kind, 2, 123.4, counts, recall, points) for kind in ("dense", "memory")]
    ways = ("none", "text", "explicit", "explicit_vq")
    bank = BankOutcome(
        reader="r", learned=True, bank="b", bank_vq="v", documents=3, references=9, made_s=1.0,
        asked_s=1.0, num_questions=4, top_k=5, found=0.75,
        accuracy=dict.fromkeys(ways, 0.25), ttft_ms=dict.fromkeys(ways, 10.5),
        tokens_per_s={"none": None, "text": 9.0, "explicit": 8.0, "explicit_vq": 7.0},
        kib_per_reference={"text": 0.25, "explicit": 65.0, "explicit_vq": 17.0},
        examples=(
            Sourced("Where?", "Fez", dict.fromkeys(ways, "Fez"), "Chad.txt:3-99", "It is in Fez."),
            Sourced("Who?", "Bo", dict.fromkeys(ways, HOSTILE), None, ""),
        ),
    )  # fmt: skip
    example = Example("Where?", "Fez", {"memory": "Fez", "dense": "Oslo"})
    run.mkdir()
    write_json(Outcome(*two, [example], bank, 1, 2.0, 2, "fp32"), run / "report.json")
    for kind in ("memory", "dense"):
        (run / kind).mkdir()
        for name in ("metrics.jsonl", "recipe.yaml"):
            (run / kind / name).write_bytes((trained / kind / name).read_bytes())
    (run / "recipe.yaml").write_text("name: memory\n")
    write_report([run], out=tmp_path / "page")
    page = read(tmp_path / "page", tmp_path)
    assert page.titles == [
        "quick: two models, the same facts", "quick: a reader with a bank", "Training of quick",
    ]  # fmt: skip
    assert ("quick/report.json#/closed_book/memory", "100.0%") in page.cells
    assert ("quick/report.json#/explicit/kib_per_reference/explicit", "65.0") in page.cells
    assert ("quick/report.json#/explicit/examples/0/source", "Chad.txt:3-99") in page.cells
    assert "no reference given" in page.words and HOSTILE in page.words


def test_runs_of_several_kinds_and_figures_of_strata_eval(trained: Path, tmp_path: Path) -> None:
    measures = (Measure("tokens", "loss", 1.25, 0.01, 300), Measure("x", "bytes", None, None, 2))
    save(tmp_path / "a" / "eval.json", Evaluation("m", measures).to_json(records=True))
    save(tmp_path / "a" / "memory.json", asdict(evaluation()))
    save(tmp_path / "b" / "memory.json", asdict(evaluation()))
    save(tmp_path / "b" / "tokenizer.json", {"model": {}, "version": "1"})
    write_report([tmp_path / "a", tmp_path / "b"], out=tmp_path / "page")
    page = read(tmp_path / "page", tmp_path)
    assert page.titles == [
        "Evaluation a/eval.json", "Formats of knowledge: a/memory.json",
        "Formats of knowledge: b/memory.json",
    ]  # fmt: skip
    assert ("a/eval.json#/measures/0/value", "1.2500") in page.cells


def test_wrong_input_is_one_line(
    run: Callable[..., tuple[int, str, str]], trained: Path, tmp_path: Path
) -> None:
    empty, other, damaged, odd = (tmp_path / n for n in ("empty", "other", "damaged", "odd"))
    empty.mkdir()
    save(other / "notes.json", {"a": 1})
    save(odd / "metrics.jsonl", {"step": 1, "tokens": 5, "loss": "low", "lr": 1.0})
    (damaged / "x").mkdir(parents=True)
    (damaged / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nnothing\n{"step": 2}\n')
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{")
    shapeless = save(tmp_path / "shapeless.json", {"scores": [{}], "found": 1.0})
    for arguments, says in (
        ((tmp_path / "none",), "no run at"),
        ((empty,), "is empty: give a folder of strata train"),
        ((other,), "holds nothing that strata report knows"),
        ((damaged,), "line 2 is not JSON"),
        ((odd,), "metrics.jsonl#L1/loss holds str, not a number"),
        ((wrong,), "wrong.json is not JSON"),
        ((shapeless,), "has no scores"),
        ((trained / "dense", trained / "dense"), "a run is given twice"),
        ((trained / "dense", "--answers", "-1"), "--answers -1: give 0 or more"),
        ((trained / "dense", "--out", wrong), "is a file: give a folder"),
    ):
        code, shown, err = run("report", *arguments)
        lines = [line for line in err.splitlines() if line.startswith("strata: error: ")]
        assert code == 2 and shown == "" and len(lines) == 1 and says in lines[0], err
        assert "Traceback" not in err


def test_the_command_line(
    run: Callable[..., tuple[int, str, str]], trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "made" / "here"
    code, shown, err = run("report", trained / "memory", "--out", out)
    assert code == 0, err
    assert shown == f"{out / 'report.html'}: 1 sections, 5 pictures\n"
    code, shown, _ = run("report", trained / "memory", trained / "dense", "--out", out, "--json")
    assert code == 0 and json.loads(shown)["sections"] == ["Training, compared"]

"""The study of reading: its arms are settings that exist, it goes on, and it counts right."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from strata.data.facts.entities import question_files
from strata.errors import ConfigError
from strata.explicit.encode import Encoder
from strata.explicit.host import Host
from strata.explicit.select import SELECTORS
from strata.models import ModelConfig, build
from strata.reader.data import make_data, read_settings
from strata.reader.probe import Probe
from strata.reader.stages import plan_stages, read_stages

FOLDER = Path(__file__).parents[2] / "benchmarks"
DATA = (
    "vocab_size=700", "tokenizer_rows=30", "val_rows=8", "bank_references=40", "questions=40",
    "text.level1.tokens=600", "text.level2.tokens=900", "text.level3.tokens=0",
    "text.level4.tokens=2200", "memory.level1.tokens=600", "memory.level2.tokens=1200",
    "memory.level3.tokens=4000",
)  # fmt: skip
HOST = {
    "model_type": "llama", "vocab_size": 700, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "initializer_range": 0.3,
}  # fmt: skip
COMMON = (
    "common.run.threads=1", "common.run.log_every=1", "common.run.validate_every=null",
    "probe.questions=4", "probe.answer_tokens=3", "probe.batch_size=4", "common.run.device=cpu",
)  # fmt: skip
ABLATION = ("--steps", "2", "--rows", "4", *COMMON, "stages.arm.batch_size=2")
# The choices of the reader: what an arm of every ablation comes to.
OWN = {
    "base", "tokens_per_head/64", "layers/last", "references/5", "interval/64",
    "positions/parallel", "marker/reference", "gradient/through_encoding", "query/own_chunk",
}  # fmt: skip
KEPT = (1, 2, 4, 8, 16, 32, 64)

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def modules() -> Any:
    """The scripts, by their names."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        import reading_arms
        import reading_rows
        import reading_study
        import reading_tables
    finally:
        sys.path[:] = before
    return SimpleNamespace(
        arms=reading_arms, rows=reading_rows, study=reading_study, tables=reading_tables
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studied") / "data"
    make_data(None, (), out=out, config=read_settings(DATA, extract=True))
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("studied") / "model"
    torch.manual_seed(0)
    build(ModelConfig(host=HOST), None).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def main(modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reading_study.py", *map(str, arguments)])
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as caught:
            modules.study.main()
        torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


def arms_of(modules: Any, **given: Any) -> list[Any]:
    settings = dict(
        model=Path("model"), num_layers=6, level="memory/level3", steps=300, lr=3e-4,
        made_with={"chunk_tokens": 64, "reach": 4},
    )  # fmt: skip
    return list(modules.arms.ablation_arms(**{**settings, **given}))


# The arms


def test_every_arm_is_accepted_and_changes_something(modules: Any, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    host = Host(build(read_stages().model, None, device="meta"))
    seen: dict[str, str] = {}
    arms = arms_of(modules)
    for arm in arms:
        config = arm.config(7)
        (stage,) = plan_stages(config, data=data, out=data)
        recipe = stage.recipe
        assert recipe.seed == 7 and recipe.tokens_per_step == modules.arms.STEP_TOKENS
        assert stage.memory is not None and recipe.model.path == str(Path("model").absolute())
        Encoder(host, tokenizer, stage.memory)  # layers, selector and lengths that there are
        settings = recipe.model_dump_json() + str(config.probe.asked) + str(arm.data_keys)
        assert seen.setdefault(settings, arm.folder) == arm.folder
    assert len({arm.folder for arm in arms}) == len(seen)
    assert {arm.name for arm in arms if arm.folder == "base"} == OWN
    shared = {arm.name: arm.folder for arm in arms if arm.folder != arm.name.replace("/", "-")}
    assert shared.pop("selectors/all") == "tokens_per_head-all"
    assert shared.pop("selectors/expected") == "tokens_per_head-32"
    assert shared.keys() == OWN - {"base"}
    assert modules.arms.ABLATIONS["selectors"].keys() == SELECTORS.keys()


def test_arms_are_what_they_are_called(modules: Any) -> None:
    arms = {arm.name: arm for arm in arms_of(modules)}

    def reading(name: str) -> Any:
        return plan_stages(arms[name].config(0), data=Path("d"), out=Path("o"))[0].recipe.reading

    kept = [reading(f"tokens_per_head/{n}").memory for n in KEPT]
    assert [(m.selector, m.tokens_per_head) for m in kept] == [("expected", n) for n in KEPT]
    few = {name: reading(f"selectors/{name}").memory for name in SELECTORS if name != "all"}
    assert {m.tokens_per_head for m in few.values()} == {modules.arms.FEW}
    assert all(m.selector == name for name, m in few.items())
    layers = {name: reading(f"layers/{name}").memory.layers for name in
              ("first_half", "middle_half", "last_half", "all", "last")}  # fmt: skip
    assert layers == {
        "first_half": None, "middle_half": (1, 2, 3), "last_half": (3, 4, 5),
        "all": (0, 1, 2, 3, 4, 5), "last": (5,),
    }  # fmt: skip
    for number in (1, 2, 3, 5, 10):
        arm = f"references/{number}"
        assert reading(arm).reach == number
        assert f"memory_{number}" in arms[arm].config(0).probe.asked
    assert {n: dict(arms[f"interval/{n}"].data_keys) for n in (16, 32, 64, 128)} == {
        16: {"chunk_tokens": 16, "reach": 1}, 32: {"chunk_tokens": 32, "reach": 3}, 64: {},
        128: {"chunk_tokens": 128},
    }  # fmt: skip
    assert reading("positions/sequential").memory.positions == "sequential"
    assert [reading(f"marker/{n}").memory.marker for n in ("beginning_only", "none")] == ["<s>", ""]
    assert reading("gradient/detached").detach and reading("query/previous_chunk").query != "own"
    assert modules.arms.some_layers("last", 5) == [2, 3, 4]


def test_overrides_reach_all_arms_and_an_arm_s_own_win(modules: Any) -> None:
    given = ("stages.arm.selector=all", "common.run.precision=bf16")
    arms = {arm.name: arm for arm in arms_of(modules, overrides=given)}
    for name, selector in (("layers/all", "all"), ("tokens_per_head/8", "expected")):
        (stage,) = plan_stages(arms[name].config(0), data=Path("d"), out=Path("o"))
        assert stage.memory is not None and stage.memory.selector == selector
        assert stage.recipe.run.precision == "bf16"
    assert arms["tokens_per_head/all"].folder == "base" != arms["tokens_per_head/8"].folder
    wrong = arms_of(modules, overrides=("common.reading.memory.positions=parallel",))
    assert {arm.name for arm in wrong if arm.folder == "base"} == OWN
    with pytest.raises(ConfigError, match=r"stage arm, its recipe: .*precison"):
        arms_of(modules, overrides=("common.run.precison=bf16",))


def test_stage_arms_see_as_many_tokens_at_the_same_rates(modules: Any) -> None:
    made = read_settings()
    for level, (_, tokens) in modules.arms.SHAPES.items():
        kind, name = level.split("/")
        assert getattr(made, kind)[name].row_tokens == tokens
    plans = {
        arm.name: plan_stages(arm.config(3), data=Path("d"), out=Path("o"))
        for arm in modules.arms.stage_arms(tokens=6_000_000)
    }
    assert len(plans) == 3
    for plan in plans.values():
        last = plan[-1]
        tokens = last.tokens_before + last.recipe.run.steps * last.recipe.tokens_per_step
        assert tokens == pytest.approx(6_000_000, rel=0.01) and last.recipe.seed == 3
    assert len({str([(s.tokens_before, s.recipe.optim, s.recipe.schedule) for s in plan])
                for plan in plans.values()}) == 1  # fmt: skip
    reads = {name: [stage.memory is not None for stage in plan] for name, plan in plans.items()}
    assert all(reads["from_start"]) and not any(reads["text_only"])
    assert reads["text_first"] == [False] * 3 + [True] * 3
    probes = {arm.config(0).probe.memory for arm in modules.arms.stage_arms(tokens=1)}
    assert probes == {plans["from_start"][0].memory}


# Rows


def rows_of(modules: Any, data: Path, level: str, *overrides: str) -> Any:
    (arm, *_) = arms_of(
        modules, num_layers=HOST["num_hidden_layers"], overrides=(*COMMON, *overrides)
    )
    tree = arm.tree["stages"]["arm"] | modules.arms.stage(level, 1, lr=1.0, min_ratio=1.0)
    tree |= {"batch_size": 3}
    if level.startswith("text/"):
        del tree["selector"], tree["tokens_per_head"]
    stage = type(arm)(arm.name, "", {**arm.tree, "stages": {"rows": tree}}, {})
    (planned,) = plan_stages(stage.config(0), data=data, out=data)
    return modules.rows.Rows(planned.recipe, rows=6)


@pytest.mark.parametrize("level", ["text/level4", "memory/level3"])
def test_answers_are_found_in_rows(modules: Any, data: Path, level: str) -> None:
    rows = rows_of(modules, data, level)
    texts = [json.loads(line)["text"] for line in (data / level / "rows/val.jsonl").open()]
    said = {text: re.findall(r"\nAnswer:(.+)", text) for text in texts}
    tokenizer, found = AutoTokenizer.from_pretrained(data / "tokenizer"), 0
    for batch in rows._feed.validation:
        for ids in batch["input_ids"].tolist():
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert [tokenizer.decode(ids[a:b]) for a, b in rows._answers.spans(ids)] == said[text]
            found += len(said[text])
    assert found > 20


class Known:
    """A model that knows every row, but for a share of tokens."""

    device = torch.device("cpu")

    def __init__(self, wrong: int | None = None) -> None:
        self.wrong = wrong

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
        coming = input_ids.roll(-1, 1)
        if self.wrong is not None:
            coming = torch.where(coming == self.wrong, 0, coming)
        return SimpleNamespace(logits=50.0 * torch.nn.functional.one_hot(coming, 700).float())


def test_rows_are_counted(modules: Any, data: Path) -> None:
    rows = rows_of(modules, data, "text/level4")
    all_right = rows.measure(Known())
    assert all_right["answers"] == 1.0 and all_right["loss"] < 1e-3 > all_right["answer_loss"]
    first = [ids[a] for batch in rows._feed.validation for ids in batch["input_ids"].tolist()
             for a, _ in rows._answers.spans(ids)]  # fmt: skip
    wrong = max(set(first), key=first.count)
    some = rows.measure(Known(wrong))
    assert some["asked"] == len(first) and "read" not in some
    assert 0 < some["answers"] <= 1 - first.count(wrong) / len(first)
    assert some["answer_loss"] > 0.1 > all_right["answer_loss"]


def test_rows_are_read_as_their_recipe_says(modules: Any, data: Path, model: Path) -> None:
    decoder = build(ModelConfig(path=str(model)), None).eval()
    far = rows_of(modules, data, "memory/level3")
    near = rows_of(modules, data, "memory/level3", "common.reading.reach=1")
    found = {
        "far": far.measure(decoder), "near": near.measure(decoder),
        "unread": far.measure(decoder, reads=False), "again": near.measure(decoder, reads=False),
    }  # fmt: skip
    assert found["unread"] == found["again"]
    losses = [found[name]["loss"] for name in ("far", "near", "unread")]
    assert len(set(losses)) == 3
    assert found["near"]["read"] == 1.0 < found["far"]["read"] <= 5.0


# Runs


def test_ablations_from_settings_to_pictures(
    main: Main, modules: Any, data: Path, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ("--study", "ablations", "--data", data, "--model", model, "--out", tmp_path,
               *ABLATION)  # fmt: skip
    trained = (*command, "--seeds", "0,1", "--only", "positions,interval/32")
    code, printed, err = main(*trained)
    assert code == 0, err
    assert "positions/sequential, seed 1: arm, step 2: none " in printed
    asked = (*command, "--no-train", "--only", "positions,gradient")
    code, printed, err = main(*asked)
    assert code == 0 and "positions/sequential, untrained: memory_1 " in printed, err
    assert "gradient" not in printed

    report = json.loads((tmp_path / "results.json").read_text())
    assert len(report["commands"]) == 2 and "--no-train" in report["commands"][1]
    tables = report["tables"]
    assert tables.keys() == {"positions", "interval"}  # of the others the shared arm alone is done
    sequential = tables["positions"]["trained so"]["sequential"]
    assert sequential["memory_5"]["runs"] == 2
    assert sequential["rows, nats"]["least"] <= sequential["rows, nats"]["mean"]
    assert sequential["rows, nats"] != tables["positions"]["trained so"]["parallel"]["rows, nats"]
    only_asked = tables["positions"]["only asked so"]
    assert "none" in only_asked["parallel"] and "none" not in only_asked["sequential"]
    assert tables["interval"]["only asked so"].keys() == {"64"}
    text = (tmp_path / "results.md").read_text()
    assert f"weights {report['model_sha256']}" in text and "seeds: 0, 1" in text
    assert "| sequential | 2 |" in text and "- steps: 2\n" in text
    for name in ("positions", "interval"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "data" / "chunk_tokens32-reach3"
    made = json.loads((other / "memory/level3/references/manifest.json").read_text())
    assert made["origin"]["config"]["chunk_tokens"] == 32
    runs = {(run["arm"], run["seed"]): run for run in report["runs"]}
    assert runs["interval/32", 0]["data_sha256"] != runs["base", 0]["data_sha256"]
    assert runs["interval/64", 0]["also"] == runs["base", 0]["also"]
    assert not list(tmp_path.glob("arms/*/*/*/checkpoints"))

    # What is done is skipped, and other settings are refused.
    monkeypatch.setattr(modules.study, "train_reader", None)
    monkeypatch.setattr(modules.study, "Probe", None)
    for again in (trained, asked):
        code, _, err = main(*again)
        assert code == 0, err
    assert json.loads((tmp_path / "results.json").read_text()) == report
    for more, said in (
        (("stages.arm.lr=0.1",), "begun with settings.stages.arm.lr 0.0003, now it is 0.1"),
        (("--rows", "8"), "begun with rows 4, now it is 8"),
    ):
        code, _, err = main(*trained, *more)
        assert code == 2 and said in err and err.count("\n") == 1


def test_interrupted_it_ends_with_the_same_numbers(
    main: Main, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--study", "ablations", "--data", data, "--model", model, *ABLATION,
               "--seeds", "0", "--only", "gradient", "common.run.checkpoint_every=1")  # fmt: skip
    assert main(*command, "--out", tmp_path / "whole")[0] == 0
    broken = (*command, "--out", tmp_path / "broken")
    code, printed, _ = main(*broken, "--for-minutes", "1e-9")
    assert code == 75 and "time: stopped, run the same command to go on" in printed
    ask, asked = Probe.ask, []

    def interrupted(self: Probe, *args: Any) -> Any:
        asked.append(args)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return ask(self, *args)

    monkeypatch.setattr(Probe, "ask", interrupted)
    code, _, err = main(*broken)
    assert code == 130 and "run the same command to go on" in err
    code, _, err = main(*broken)
    assert code == 0, err
    names = ["arms/base/seed0/result.json", "arms/gradient-detached/seed0/result.json"]
    found = [[json.loads((tmp_path / out / name).read_text()) for name in names]
             for out in ("whole", "broken")]  # fmt: skip
    assert found[0] == found[1] and len(asked) == 3
    assert found[0][0]["also"] != found[0][1]["also"]


def test_stages_from_settings_to_pictures(main: Main, data: Path, tmp_path: Path) -> None:
    small = [f"model.host.{key}={value}" for key, value in HOST.items()]
    small += [f"stages.part{number}.batch_size=2" for number in range(1, 7)]
    code, printed, err = main(
        "--study", "stages", "--data", data, "--out", tmp_path, "--tokens", 24_576,
        "--seeds", "0,1", "--rows", 2, "--only", "from_start,text_only", *COMMON, *small,
        "probe.every=null", "probe.questions=2", "probe.ways=[none, text_5, memory_5]",
    )  # fmt: skip
    assert code == 0, err
    assert "text_only, seed 1: part6, step 1: none " in printed
    report = json.loads((tmp_path / "results.json").read_text())
    table = report["tables"]["end"]
    assert list(table) == ["from_start", "text_only"]
    for arm in table.values():
        assert (
            arm["memory_5"]["runs"] == 2 and {"text_5", "none", "memory rows, nats"} <= arm.keys()
        )
    assert "- model: from scratch\n" in (tmp_path / "results.md").read_text()
    for name in ("stages.png", "stages_ways.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_wrong_input_is_one_line(main: Main, data: Path, model: Path, tmp_path: Path) -> None:
    ablations = ("--study", "ablations", "--data", data, "--out", tmp_path)
    stages = ("--study", "stages", "--data", data, "--out", tmp_path)
    (tmp_path / "plain").mkdir()
    for arguments, said in (
        ((*ablations,), "needs --model"),
        ((*ablations, "--model", tmp_path / "no"), "no"),
        ((*ablations, "--model", model, "--level", "text/level1"), "give one of memory/level1"),
        (
            (*ablations, "--model", model, "--only", "smell"),
            "--only smell: give some of base, tokens_per_head, layers",
        ),
        ((*ablations, "--model", model, "common.reading.reach=0"), "reach"),
        ((*ablations, "--model", model, "stages.arm.lr"), "not of the form"),
        ((*stages, "--seeds", "a"), "--seeds a: give numbers with commas"),
        ((*stages, "--tokens", "0"), "--tokens 0: give more than 0"),
        ((*stages, "--no-train"), "--no-train is for ablations"),
        (("--study", "stages", "--data", tmp_path, "--out", tmp_path), "no reader's data at"),
    ):
        code, printed, err = main(*arguments)
        assert code == 2 and not printed
        assert said in err and err.count("\n") == 1, err


def test_texts_of_other_sources_are_refused(
    main: Main, data: Path, model: Path, tmp_path: Path
) -> None:
    """Their questions would be about what was trained on."""
    questions = tmp_path / "questions"
    questions.mkdir()
    for file in question_files():
        rows = gzip.decompress(file.path.read_bytes()).splitlines(keepends=True)
        (questions / file.path.name).write_bytes(gzip.compress(b"".join(rows[::2])))
    options = ("--study", "ablations", "--data", data, "--model", model, "--out", tmp_path / "out",
               *ABLATION, "--only", "interval/128", "--no-train")  # fmt: skip
    code, _, err = main(*options, "--questions", questions)
    assert code == 2 and "came out otherwise" in err and "--prose that DATA was made from" in err
    code, _, err = main(*options)
    assert code == 2 and "was made from other questions" in err


# Tables


def result(modules: Any, arm: str, seed: int | None, **numbers: float) -> Any:
    ways = {name: value for name, value in numbers.items() if "rows" not in name}
    also = {name: value for name, value in numbers.items() if "rows" in name}
    tree = {"seed": seed, "trained": seed is not None, "exact": ways, "also": also}
    return modules.tables.Result(arm, Path(), (), tree)


def test_tables_show_the_mean_and_the_range(modules: Any) -> None:
    tables = modules.tables
    arms = {
        "one_token": [result(modules, "a", n, memory_5=x, none=0.0, rows_answers=x / 2)
                      for n, x in enumerate((0.25, 0.5, 0.3))],
        "all": [result(modules, "b", None, memory_10=0.5, memory_5=0.125)],
    }  # fmt: skip
    columns = tables._columns(arms, (("rows_answers", "rows", True), ("rows_read", "read", False)))
    assert [column.title for column in columns] == ["none", "memory_5", "memory_10", "rows", "read"]
    assert tables.table(arms, columns, corner="arm")[2:] == [
        "| one token | 3 | 0.0% (0.0 to 0.0) | 35.0% (25.0 to 50.0) | - | 17.5% (12.5 to 25.0) "
        "| - |",
        "| all | - | - | 12.5% | 50.0% | - | - |",
    ]
    counted = tables.numbers(arms, columns)
    assert counted["one_token"]["memory_5"] == {
        "mean": pytest.approx(0.35), "least": 0.25, "most": 0.5, "runs": 3,
    }  # fmt: skip
    assert "rows" not in counted["all"]

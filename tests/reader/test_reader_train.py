"""Teaching the reader: stages follow one another, looks change nothing, interruptions neither."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import strata
from strata.config import load_config
from strata.errors import ConfigError, DataError, ModelError, StrataError
from strata.evals.memory import eval_memory
from strata.evals.questions import read_questions
from strata.evals.recall import open_recall
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig
from strata.layers import value_tables
from strata.models import build, load
from strata.reader import train as train_module
from strata.reader.curves import Look, read_looks
from strata.reader.data import make_data, read_settings
from strata.reader.exam import examine
from strata.reader.layers import ask_layers, best_layer
from strata.reader.probe import Probe
from strata.reader.stages import (
    ProbeConfig,
    ReaderTraining,
    memory_of,
    plan_stages,
    read_stages,
)
from strata.reader.train import ReaderResult, train_reader
from strata.train import Recipe
from strata.train import run as run_module
from strata.train.metrics import read_metrics

DATA = (
    "vocab_size=700", "tokenizer_rows=30", "val_rows=12", "bank_references=80", "questions=60",
    "text.level1.tokens=2500", "text.level2.tokens=0", "text.level3.tokens=0",
    "text.level4.tokens=0", "memory.level1.tokens=4000", "memory.level2.tokens=0",
    "memory.level3.tokens=0", "know.tokens=2500", "know.row_tokens=128", "know.facts=30",
)  # fmt: skip
SMALL = (
    "model.host.vocab_size=700", "model.host.hidden_size=32", "model.host.intermediate_size=32",
    "model.host.num_hidden_layers=2", "model.host.num_attention_heads=2",
    "model.host.num_key_value_heads=2", "model.host.initializer_range=0.3",
    "probe.questions=7", "probe.references=3", "probe.answer_tokens=4", "probe.batch_size=3",
    "probe.every=2", "common.run.validate_batches=1", "common.run.checkpoint_every=3",
    "common.run.threads=1", "common.run.precision=fp32", "find_layer=false",
    "stages.text2.steps=0", "stages.text3.steps=0", "stages.text4.steps=0",
    "stages.text1.steps=4", "stages.memory1.steps=5", "stages.memory1.level=memory/level1",
    "stages.memory1.sequence_tokens=128", "stages.memory1.selector=all",
    "stages.memory1.tokens_per_head=null", "stages.memory2.selector=attention",
    "stages.memory2.steps=2", "stages.memory2.level=memory/level1",
    "stages.memory2.sequence_tokens=128", "stages.memory2.tokens_per_head=4",
    "stages.know.steps=3", "stages.know.selector=attention",
    "stages.know.sequence_tokens=128", "stages.know.tokens_per_head=4",
    "stages.know.memory.layers=[1]", "stages.know.memory.num_half_keys=8",
    "stages.know.memory.top_k=4", "stages.know.memory.key_dim=8",
    *(f"stages.{name}.{key}" for name in ("text1", "memory1", "memory2", "know")
      for key in ("warmup=1", "batch_size=2")),
)  # fmt: skip
STAGES = ("01-text1", "02-memory1", "03-memory2", "04-know")
WAYS = ["none", "known", "text_1", "text_3", "memory_1", "memory_3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "data"
    make_data(None, (), out=out, config=read_settings(DATA, extract=True))
    return out


def teach(data: Path, out: Path, *overrides: str, **options: Any) -> ReaderResult:
    config = read_stages(None, [*SMALL, *overrides])
    return train_reader(data, out=out, config=config, progress=False, **options)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that nothing interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("taught") / "run"
    assert teach(data, out).stopped_by is None
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def run_copy(taught: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(taught, tmp_path / "run"))


def weights(out: Path) -> dict[str, bytes]:
    """The bytes of all stages' models."""
    return {name: (out / name / "model" / "model.safetensors").read_bytes() for name in STAGES}


def timeless(out: Path) -> list[Look]:
    return [replace(look, wall_s=0.0) for look in read_looks(out)]


def test_stages_follow_one_another(data: Path, taught: Path) -> None:
    looks = read_looks(taught)
    assert [(look.number, look.stage, look.step) for look in looks] == [
        (1, "text1", 2), (1, "text1", 4), (2, "memory1", 2), (2, "memory1", 4), (2, "memory1", 5),
        (3, "memory2", 2), (4, "know", 2), (4, "know", 3),
    ]  # fmt: skip
    assert [look.tokens for look in looks] == [256 * n for n in (2, 4, 6, 8, 9, 11, 13, 14)]
    assert [look.kept for look in looks] == [128] * 5 + [4] * 3
    for look in looks:
        assert list(look.exact) == list(look.contains) == WAYS
        assert look.num_questions == 7 and look.loss is not None
    assert (taught / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = weights(taught), read_looks(taught)
    again = teach(data, taught)
    assert (again.stage, again.step, again.stopped_by) == ("know", 3, None)
    assert again.model_dir == taught / "04-know" / "model" and again.look == looks[-1]
    assert (weights(taught), read_looks(taught)) == before


def test_a_stage_begins_with_the_weights_of_the_last(data: Path, tmp_path: Path) -> None:
    still = [f"stages.{name}.lr=1e-12" for name in ("memory1", "memory2", "know")]
    teach(data, tmp_path, *still, "common.optim.weight_decay=0", "probe.every=null")
    assert [(look.stage, look.step) for look in read_looks(tmp_path)] == [
        ("text1", 4), ("memory1", 5), ("memory2", 2), ("know", 3),
    ]  # fmt: skip
    first, *others = (reader_weights(tmp_path / name) for name in STAGES)
    for other in others:
        for name, tensor in first.items():
            torch.testing.assert_close(other[name], tensor, atol=1e-8, rtol=0)


def reader_weights(stage: Path) -> dict[str, torch.Tensor]:
    """A stage's weights, by their names without memory layers beside."""
    weights = load(stage / "model")[0].state_dict()
    return {name.replace(".mlp.mlp.", ".mlp."): tensor for name, tensor in weights.items()}


def test_memory_layers_learn_beside_a_reader_that_stays(taught: Path) -> None:
    before, after = (reader_weights(taught / name) for name in STAGES[-2:])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    recipe = load_config(Recipe, taught / "04-know" / "recipe.yaml")
    torch.manual_seed(recipe.seed)  # as the run did before it drew them
    drawn = build(recipe.model, recipe.memory).state_dict()
    new = {name: tensor for name, tensor in drawn.items() if "memory" in name}
    assert set(after) == set(before) | set(new) and "model.memory_values.0.weight" in new
    assert not any(torch.equal(after[name], tensor) for name, tensor in new.items())
    records = read_metrics(taught / "04-know")
    assert 0 < records[-1]["rows_updated"] <= 64 and records[-1]["lr_values"] > records[-1]["lr"]


def test_a_stage_may_train_the_reader_along(data: Path, taught: Path, tmp_path: Path) -> None:
    for name in STAGES[:-1]:
        shutil.copytree(taught / name, tmp_path / name)
    for name in ("probes.jsonl", "data.json"):
        shutil.copy(taught / name, tmp_path)
    changes = ["stages.know.memory.freeze_base=false", "probe.every=null"]
    # What the later stages begin with lies elsewhere, which is of no account for finished ones.
    teach(data, tmp_path, *changes)
    before, after = (reader_weights(tmp_path / name) for name in STAGES[-2:])
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_looks_do_not_change_what_is_learnt(data: Path, taught: Path, tmp_path: Path) -> None:
    teach(data, tmp_path, "probe.every=null", "probe.questions=2")
    assert weights(tmp_path) == weights(taught)


def test_looks_hold_what_was_asked_for(data: Path, taught: Path, tmp_path: Path) -> None:
    """Any ways, any memories where no stage makes any, and what a watcher adds."""
    seen = []

    def measure(model: Any) -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {"draw": float(torch.rand(()))}

    text_only = [f"stages.{name}.steps=0" for name in ("memory1", "memory2", "know")]
    ways = ("probe.ways=[memory_2, none]", "probe.memory={tokens_per_head: 3}")
    teach(data, tmp_path, *text_only, *ways, measure=measure)
    looks = read_looks(tmp_path)
    assert [look.step for look in looks] == [2, 4] and seen[0] == (False, False)
    for look in looks:
        assert list(look.exact) == ["memory_2", "none"] and look.kept == 3
        assert look.num_questions == 7 and 0 <= look.also["draw"] < 1
    model = "01-text1/model/model.safetensors"
    assert (tmp_path / model).read_bytes() == (taught / model).read_bytes()


def test_interrupted_it_ends_with_the_same_bits(
    data: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal in the middle of a look, and by the clock, as often as it takes."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    monkeypatch.setattr(run_module, "time", fake)
    monkeypatch.setattr(train_module, "time", fake)
    ask, looks = Probe.ask, []

    def late(self: Probe, *args: Any) -> Any:
        clock.now += 100.0
        looks.append(args)
        if len(looks) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, *args)

    monkeypatch.setattr(Probe, "ask", late)
    stops = []
    for _ in range(20):
        result = teach(data, tmp_path, for_s=50.0)
        stops.append((result.stopped_by, result.stage, result.step))
        if result.stopped_by is None:
            break
        torch.manual_seed(len(stops))  # a new process knows nothing of the old one's random state
    assert stops == [
        ("time", "text1", 2), ("time", "memory1", 0), ("SIGTERM", "memory1", 2),
        ("time", "memory1", 4), ("time", "memory2", 0), ("time", "know", 0), ("time", "know", 2),
        (None, "know", 3),
    ]  # fmt: skip
    assert weights(tmp_path) == weights(taught)
    assert timeless(tmp_path) == timeless(taught)


# Within a stage without and with a checkpoint, and behind it; before and after the look is kept.
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("looks", [2, 3, 4])
def test_killed_it_ends_with_the_same_bits(
    data: Path,
    taught: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    looks: int,
    kept: bool,
) -> None:
    class Killed(BaseException):
        pass

    add = train_module.add_look

    def kill(out: Path, look: Look) -> None:
        last = len(read_looks(out)) == looks
        if kept or not last:
            add(out, look)
        if last:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_module, "add_look", kill)
        teach(data, tmp_path)
    assert (tmp_path / "02-memory1" / "model").exists() == (looks == 4)
    assert teach(data, tmp_path).stopped_by is None
    assert weights(tmp_path) == weights(taught)
    assert timeless(tmp_path) == timeless(taught)


# What is refused


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.text1.lr=0.5", "01-text1 holds a run of another recipe .optim.lr was 0.001"),
        ("stages.memory2.tokens_per_head=5", "reading.memory.tokens_per_head was 4, is 5"),
        ("model.host.hidden_size=64", "model.host.hidden_size was 32"),
        ("stages.text1.steps=0", "01-text1 holds a stage that these settings do not have"),
        ("stages.text2.steps=3", "02-memory1 holds a stage that these settings do not have"),
    ],
)
def test_other_settings_are_refused(data: Path, taught: Path, override: str, said: str) -> None:
    before = weights(taught)
    extra = ["stages.text2.level=text/level1", "stages.text2.warmup=1"]
    with pytest.raises(ConfigError, match=said) as refused:
        teach(data, taught, *extra, override)
    assert "another --out" in str(refused.value) and "\n" not in str(refused.value)
    assert weights(taught) == before


def test_what_changes_no_stage_may_change(data: Path, run_copy: Path) -> None:
    later = "stages.more={level: text/level1, steps: 1, batch_size: 2, sequence_tokens: 128, lr: 1}"
    assert teach(data, run_copy, "probe.every=1", "common.run.log_every=1", later).step == 1
    looks = read_looks(run_copy)
    assert looks[-1].stage == "more" and looks[-1].kept == 4  # asked as the stage before it
    model, _ = load(run_copy / "05-more" / "model")
    assert len(value_tables(model)) == 1  # it keeps the memory layers, and trains all of them
    before, after = (reader_weights(run_copy / name) for name in ("04-know", "05-more"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_a_lost_stage_is_said(data: Path, run_copy: Path) -> None:
    shutil.rmtree(run_copy / "01-text1")
    with pytest.raises(ConfigError, match=r"02-memory1 went on from .*01-text1.*not there"):
        teach(data, run_copy)


def test_other_data_are_refused(data: Path, taught: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(data, tmp_path / "other"))
    questions = other / "eval" / "val" / "questions.jsonl"
    rows = questions.read_text().splitlines(keepends=True)
    questions.write_text("".join(rows[1:]))
    with pytest.raises(DataError, match=r"begun with another tokenizer or other .* questions"):
        teach(other, taught)
    questions.write_text(rows[0].replace('"source": "val', '"source": "no'))
    with pytest.raises(DataError, match="which is no reference of its bank"):
        teach(other, tmp_path / "new")
    (other / "eval" / "val" / "bank" / "references.jsonl").write_text("{")
    with pytest.raises(DataError, match="not JSON lines"):
        teach(other, tmp_path / "new")
    with pytest.raises(DataError, match="no reader's data at"):
        teach(tmp_path / "nowhere", tmp_path / "new")
    shutil.rmtree(other / "memory" / "level1" / "references")
    shutil.copytree(data / "eval", other / "eval", dirs_exist_ok=True)
    with pytest.raises(DataError, match="references has no manifest"):
        teach(other, tmp_path / "new")
    assert not (tmp_path / "new" / "01-text1").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.text1.selector=all", "selector and tokens_per_head are not for text levels"),
        ("stages.text1.level=words/level1", "level"),
        ("stages.text1.smell=1", "unknown key stages.text1.smell"),
        ("stages.text1.sequence_tokens=2000", "max_position_embeddings 1024"),
        ("stages.text1.warmup=9", "stage text1.*warmup_steps is 9 but run.steps is 4"),
        ("stages.text1.level=text/level2", "level2"),
        ("stages.memory1.selector=smell", "no selector 'smell'"),
        ("common.reading.memory.layers=[7]", "memory layer 7 does not exist"),
        ("common.run.steps=3", "common.run.steps: each stage has its own"),
        ("common.run.precison=bf16", "unknown key run.precison; allowed here"),
        ("stages={}", "no stage has steps"),
        ("model.host.vocab_size=300", "raise model.host.vocab_size"),
        ("probe.references=1", "probe.references"),
        ("probe.ways=[memory_0]", "probe.ways"),
        ("probe.memory.layers=[7]", "memory layer 7 does not exist"),
        ("stages.know.memory.layers=[7]", "memory.layers names layer 7, the decoder has 2"),
        ("stages.know.level=know/level1", "stages.know.level"),
        ("memory={layers: [0]}", "the first model's and stages.know both install memory layers"),
        ("common.optim={value_lr: 0.1}", "common.optim.value_lr: each stage has its own"),
        ("find_layer={}", "find_layer"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    data: Path, tmp_path: Path, override: str, said: str
) -> None:
    with pytest.raises(StrataError, match=said) as refused:
        teach(data, tmp_path / "run", override)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("run/*/checkpoints"))


def test_stages_that_come_with_strata_can_be_planned(tmp_path: Path) -> None:
    """They fit the levels of the data that come with strata."""
    config, made = read_stages(), read_settings()
    plan = plan_stages(config, data=tmp_path, out=tmp_path)
    assert [stage.number for stage in plan] == list(range(1, len(plan) + 1))
    run = [stage for stage in config.stages.values() if stage.steps]
    for stage, planned in zip(run, plan, strict=True):
        kind, _, level = stage.level.partition("/")
        given = getattr(made, kind)[level] if level else made.know
        assert given.row_tokens == stage.sequence_tokens and given.tokens
        assert (planned.memory is not None) == (kind != "text")
    assert memory_of(plan, 1) == next(s.memory for s in plan if s.memory is not None)
    # What is to be known is learnt among references that are read as the reader learnt to.
    assert plan[-1].name == "know" and plan[-1].memory == plan[-2].memory
    host = config.model.host or {}
    assert host["vocab_size"] == made.vocab_size
    reading = plan[-1].recipe.reading
    assert reading is not None and reading.reach == made.reach + 1
    assert reading.memory.reference_tokens >= made.reference_tokens
    # With its memory layers the reader is a file of 16 MB in bf16, and its memories are the same.
    model = build(config.model, config.stages["know"].memory, device="meta")
    assert 2 * sum(weight.numel() for weight in model.parameters()) < 15.5e6
    assert Host(model).memory_shape(reading.memory).layers[-1] <= min(know_layers(config))


def know_layers(config: ReaderTraining) -> tuple[int, ...]:
    memory = config.stages["know"].memory
    assert memory is not None and memory.placement == "beside"
    return memory.layers


# Where memories stand

FINDING = ("find_layer=true", "stages.text1.steps=2", "stages.memory1.steps=2",
           "stages.memory2.steps=0", "stages.know.steps=0", "probe.every=1")  # fmt: skip


def stands_in(out: Path) -> tuple[int, ...] | None:
    reading = load_config(Recipe, out / "02-memory1" / "recipe.yaml").reading
    assert reading is not None
    return reading.memory.layers


def test_memories_stand_in_the_layer_that_answers_best(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    teach(data, tmp_path, *FINDING, say=said.append)
    found = json.loads((tmp_path / "layer.json").read_text(encoding="utf-8"))
    model, tokenizer = load(tmp_path / "01-text1" / "model")
    config = ProbeConfig(questions=7, references=3, answer_tokens=4, ways=("memory_1", "memory_3"))
    memory = ExplicitMemoryConfig(reference_tokens=128, tokens_per_head=1)
    shares = ask_layers(model, tokenizer, Probe(data / "eval" / "val", config), memory)
    assert found["exact"] == {str(layer): by for layer, by in shares.items()}
    assert stands_in(tmp_path) == (found["layer"],) == (best_layer(shares),)
    assert any(line.startswith(f"memories stand in layer {found['layer']}: ") for line in said)
    # Before it is known nothing is read from memories.
    assert [set(look.exact) == set(WAYS) for look in read_looks(tmp_path)] == [False] * 2 + [
        True
    ] * 2


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_is_found_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    times, looks, answer = [], [], Probe.ask

    def ask(*given: object) -> dict[int, dict[str, float]]:
        times.append(given)
        return {0: {"memory_1": 0.4, "memory_3": 0.2}, 1: {"memory_1": layer, "memory_3": 0.0}}

    def stop_in_memory1(self: Probe, *given: Any) -> Any:
        looks.append(given)
        if len(looks) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, *given)

    monkeypatch.setattr(train_module, "ask_layers", ask)
    monkeypatch.setattr(Probe, "ask", stop_in_memory1)
    assert teach(data, tmp_path, *FINDING).stopped_by == "SIGTERM"
    assert stands_in(tmp_path) == (layer,) and len(times) == 1
    assert teach(data, tmp_path, *FINDING).stopped_by is None
    assert stands_in(tmp_path) == (layer,) and len(times) == 1
    (tmp_path / "layer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"layer\.json is damaged: delete it"):
        teach(data, tmp_path, *FINDING)


def test_layers_that_are_given_are_not_found(data: Path, tmp_path: Path) -> None:
    teach(data, tmp_path, *FINDING, "common.reading.memory.layers=[1]")
    assert stands_in(tmp_path) == (1,) and not (tmp_path / "layer.json").exists()
    with pytest.raises(ConfigError, match="find_layer: the first stage reads memories already"):
        read_stages(None, [*SMALL, *FINDING, "stages.text1.steps=0"])


def test_of_equal_layers_the_lowest_is_taken() -> None:
    equal = {layer: {"memory_1": share} for layer, share in ((3, 0.5), (4, 0.5), (1, 0.2))}
    assert best_layer(equal) == 3


# What is asked


def test_looks_agree_with_eval_memory(data: Path, taught: Path, tmp_path: Path) -> None:
    """The same answers as one by one, from a bank; "dense" is what no codec rounds."""
    pytest.importorskip("lance")
    model, tokenizer = load(taught / "02-memory1" / "model")
    dense = ExplicitMemoryConfig(layers=(0, 1), selector="all")
    config = ProbeConfig(questions=9, references=4, answer_tokens=6, batch_size=4)
    looked = Probe(data / "eval" / "val", config).ask(model, tokenizer, dense)
    bank = strata.Bank.create(tmp_path / "bank", model=model, tokenizer=tokenizer)
    rows = (data / "eval" / "val" / "bank" / "references.jsonl").read_text().splitlines()
    told = [json.loads(row) for row in rows]
    bank.add([strata.Document(row["text"], row["id"]) for row in told])
    questions = read_questions(data / "eval" / "val" / "questions.jsonl")[:9]
    records = eval_memory(
        model, tokenizer, bank, questions, retriever=None, formats=("none", "text", "dense"),
        max_new_tokens=6,
    ).records  # fmt: skip
    for way, name in (("none", "none"), ("text_1", "text"), ("memory_1", "dense")):
        written = [record.text for record in records if record.format == name]
        assert [answer.text for answer in looked[way].answers] == written
    texts = [[answer.text for answer in result.answers] for result in looked.values()]
    assert len({tuple(answers) for answers in texts}) == 5  # every way gives something else


def test_known_questions_are_asked_with_nothing_to_read(data: Path, taught: Path) -> None:
    model, tokenizer = load(taught / "04-know" / "model")
    questions = read_questions(data / "eval" / "know" / "questions.jsonl")
    config = ProbeConfig(questions=9, answer_tokens=4)
    val, know = data / "eval" / "val", data / "eval" / "know"
    asked = Probe(val, config, known=know).ask(model, tokenizer, None)["known"].answers
    alone = open_recall(model, questions[:9], tokenizer=tokenizer, max_new_tokens=4).answers
    assert asked == alone and len({answer.text for answer in asked}) > 1
    without = Probe(val, config, known=data / "eval" / "no").ask(model, tokenizer, None)
    assert list(without) == ["none", "text_1", "text_5"]


def test_what_is_given_is_drawn_once_and_holds_the_answer(data: Path) -> None:
    config = ProbeConfig(questions=12, references=5)
    probes = [Probe(data / "eval" / "val", config) for _ in range(2)]
    questions = read_questions(data / "eval" / "val" / "questions.jsonl")[:12]
    places = set()
    for place, question in enumerate(questions):
        names = probes[0]._given(place, 5)
        assert names == probes[1]._given(place, 5) and len(set(names)) == 5
        assert probes[0]._given(place, 1) == [question.source]
        places.add(names.index(str(question.source)))
    assert len(places) > 2


# The commands


def test_the_command_says_how_to_go_on(
    run: Callable[..., tuple[int, str, str]], data: Path, taught: Path, tmp_path: Path
) -> None:
    new = ("train", "--data", data, "--out", tmp_path / "run", *SMALL)
    code, printed, _ = run("reader", *new, "--for-minutes", "1e-9")
    assert code == 75
    assert "time: stopped at step 0 of text1, run the same command to go on" in printed
    code, printed, _ = run("reader", *new, "--for-minutes", "1e-9", "--json")
    assert code == 75 and json.loads(printed)["stopped_by"] == "time"
    code, printed, err = run("reader", "train", "--data", data, "--out", taught, *SMALL)
    assert code == 0, err
    assert f"all stages are done, the model is {taught / '04-know' / 'model'}" in printed


def test_wrong_input_is_one_line(
    run: Callable[..., tuple[int, str, str]], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for arguments, expected in (
        (("train", "--for-minutes", "0"), "--for-minutes 0.0: give more than 0"),
        (("train", "--stages", tmp_path / "no.yaml"), "no recipe at"),
        (("train", "--data", tmp_path / "no"), "make it with strata reader data"),
        (("train", "stages.text1"), "not of the form"),
        (("train", "--data", data, "--out", tmp_path / "file", *SMALL), "is a file"),
        (("eval", "--run", tmp_path / "no"), "no finished stage"),
        (("eval", "--limit", "0"), "--limit 0: give 1 or more"),
    ):
        code, printed, err = run("reader", *arguments)
        assert code == 2 and not printed
        assert expected in err and err.count("\n") == 1, err


def test_the_exam_asks_in_every_format(
    run: Callable[..., tuple[int, str, str]], data: Path, taught: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lance")
    with pytest.raises(ModelError, match=r"give one of 01-text1, .* 04-know"):
        examine(data, run=taught, out=tmp_path, stage="memory9")
    command = ("eval", "--data", data, "--run", taught, "--out", tmp_path, "--embedder", "none",
               "--codec", "int8", "--limit", 4, "--top-k", 2, "--max-new-tokens", 3)  # fmt: skip
    code, printed, err = run("reader", *command)
    assert code == 0, err
    assert "04-know, oracle: 4 questions" in printed and "04-know, search: 4" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    for by in ("oracle", "search"):
        formats = [score["format"] for score in report[by]["scores"]]
        assert formats == ["none", "text", "cached", "dense", "explicit", "explicit:int8"]
        assert len(report[by]["records"]) == 4 * 6
    assert report["oracle"]["found"] == 1.0
    code, printed, err = run("reader", *command, "--json")  # the bank is there
    assert code == 0 and json.loads(printed)["stage"] == "04-know", err

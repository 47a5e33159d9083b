"""`strata sft` and `strata dpo` from rows to a model: they learn, resume, and end a bank's life."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_tune import dpo_rows, sft_rows, write_rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import strata
from strata.cli.main import app
from strata.config import load_config
from strata.errors import BankError, StrataError
from strata.explicit.documents import Document
from strata.explicit.memories import Reference
from strata.explicit.settings import ExplicitMemoryConfig
from strata.models import load
from strata.train import read_metrics
from strata.train.tune import DPORecipe, SFTRecipe, dpo, run, sft
from strata.train.tune.recipe import TuneRecipe
from strata.train.tune.recorder import Recorder
from tiny_bank import TinyEmbedder

RECIPES = Path(__file__).parents[2] / "recipes"
MEMORY = {"reference_tokens": 32, "tokens_per_head": 4}

pytestmark = [
    pytest.mark.filterwarnings("ignore:no memory was injected"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

Make = Callable[..., Any]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Make:
    """Makes the recipe of a tiny run: `recipe("dpo", "run.steps=3")`."""
    write_rows(tmp_path / "sft.jsonl", sft_rows(48))
    write_rows(tmp_path / "sft_held.jsonl", sft_rows(12, seed=1))
    write_rows(tmp_path / "dpo.jsonl", dpo_rows(48))
    write_rows(tmp_path / "dpo_held.jsonl", dpo_rows(12, seed=1))

    def make(kind: str, *overrides: str) -> Any:
        tree = {
            "name": kind,
            "model": {"path": str(tiny_model)},
            "data": {
                "train": str(tmp_path / f"{kind}.jsonl"),
                "validation": str(tmp_path / f"{kind}_held.jsonl"),
                "sequence_tokens": 48,
            },
            "reading": {"memory": MEMORY},
            "optim": {"lr": 3e-3, "value_lr": 1e-2},
            "run": {
                "dir": str(tmp_path / f"run_{kind}"),
                "steps": 12,
                "device": "cpu",
                "log_every": 2,
                "validate_every": 6,
                "checkpoint_every": 4,
            },
        }
        if kind == "dpo":
            tree["beta"] = 0.1
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config({"sft": SFTRecipe, "dpo": DPORecipe}[kind], path, overrides)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM while that step is made."""
    original = Recorder.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Recorder, "on_step_end", on_step_end)


def test_sft_then_dpo_learn_and_memory_works_on(
    recipe: Make, tiny_model: Path, tmp_path: Path
) -> None:
    """Held-out loss falls, held-out margins rise; the old bank is refused, a new one is read."""
    model, tokenizer = load(tiny_model)
    config = ExplicitMemoryConfig(**MEMORY)
    old = strata.Bank.create(
        tmp_path / "old", model=model, tokenizer=tokenizer, config=config, embedder=TinyEmbedder()
    )
    documents = [Document(f"{name} is in Accra.", name) for name in ("Ada", "Hana")]
    old.add(documents)
    taught = sft(recipe("sft"), progress=False)
    assert taught.before and taught.after and taught.model_dir
    assert taught.after["loss"] < 0.8 * taught.before["loss"]
    assert taught.rows_reading == 32 and taught.rows_left_out == 0
    preferring = dpo(
        recipe("dpo", f"model.path={taught.model_dir}", "optim.lr=1e-3"), progress=False
    )
    assert preferring.before and preferring.after and preferring.model_dir
    assert preferring.before["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert preferring.after["rewards/margins"] > 0.02
    assert preferring.after["loss"] < preferring.before["loss"]
    for folder in (taught.model_dir, preferring.model_dir):
        new, own_tokenizer = load(folder)
        with pytest.raises(BankError, match=r"other weights of the same .*make a new bank"):
            strata.Bank.open(tmp_path / "old").use(new, own_tokenizer)
        with (
            pytest.raises(BankError, match="make a new bank"),
            strata.attach(new, old, tokenizer=own_tokenizer),
        ):
            raise AssertionError("not reached")
        bank = strata.Bank.create(
            tmp_path / f"bank_{folder.parent.name}",
            model=new,
            tokenizer=own_tokenizer,
            config=config,
        )
        bank.add(documents)
        prompt = own_tokenizer("Where is Ada?", return_tensors="pt")
        answers = []
        for source in (bank, None):
            if source is None:
                out = new.generate(**prompt, max_new_tokens=4, output_logits=True,
                                   return_dict_in_generate=True, do_sample=False)  # fmt: skip
            else:
                with strata.attach(new, source, tokenizer=own_tokenizer) as memory:
                    out = new.generate(**prompt, max_new_tokens=4, output_logits=True,
                                       return_dict_in_generate=True, do_sample=False)  # fmt: skip
                assert memory.used[0].memories[0].text == "Ada is in Accra."
            answers.append(out.logits[0])
        assert not torch.allclose(*answers)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("tables", [False, True], ids=["plain", "tables"])
def test_stopped_and_resumed_is_uninterrupted(
    recipe: Make,
    tiny_memory_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tables: bool,
) -> None:
    """Weights bit for bit, and the same records, in the middle of an epoch."""
    runs: dict[str, Callable[..., Any]] = {"sft": sft, "dpo": dpo}
    options = ["run.accumulate=2", "data.batch_size=2"]
    if tables:
        options.append(f"model.path={tiny_memory_model}")
    whole = runs[kind](recipe(kind, *options, f"run.dir={tmp_path / 'whole'}"), progress=False)
    broken = recipe(kind, *options, f"run.dir={tmp_path / 'broken'}")
    with monkeypatch.context() as patched:
        kill_at(patched, 7)
        stopped = runs[kind](broken, progress=False)
    assert (stopped.stopped_by, stopped.steps, stopped.model_dir) == ("SIGTERM", 7, None)
    half = tmp_path / "broken" / "checkpoints" / "checkpoint-9"
    half.mkdir()  # a kill while it was written
    torch.manual_seed(12345)
    resumed = runs[kind](broken, progress=False)
    assert not half.exists() and resumed.steps == 12
    one, other = weights(whole.model_dir), weights(resumed.model_dir)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert resumed.before == whole.before and resumed.after == whole.after
    losses = [
        {r["step"]: r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r}
        for name in ("whole", "broken")
    ]
    assert sorted(losses[0]) == sorted(losses[1]) == [2, 4, 6, 8, 10, 12]
    for step in (2, 4, 6, 10, 12):  # that of step 8 is the mean since the last record, or the start
        assert losses[0][step] == losses[1][step]


def test_low_precision_and_checkpointing_learn_as_well(recipe: Make, tmp_path: Path) -> None:
    """Memories are written under autocast too, and read again in the backward pass."""
    losses = []
    for number, options in enumerate(
        ((), ("model.gradient_checkpointing=true",), ("run.precision=bf16",))
    ):
        result = sft(
            recipe("sft", "run.steps=4", f"run.dir={tmp_path / str(number)}", *options),
            progress=False,
        )
        assert result.after is not None
        losses.append(result.after["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=0.03)


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_verbs(recipe: Make, tmp_path: Path) -> None:
    recipe("sft"), recipe("dpo")
    result = cli("sft", tmp_path / "sft.yaml", "run.steps=4")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("4 steps on 48 rows, held-out loss ")
    assert f"model in {tmp_path / 'run_sft' / 'model'}" in result.stdout
    assert "48 rows, 12 held out, 32 read references" in result.stderr
    again = cli("sft", tmp_path / "sft.yaml", "run.steps=4", "--json")  # finished: nothing is done
    assert json.loads(again.stdout)["steps"] == 4 and not again.stderr
    other = cli("sft", tmp_path / "sft.yaml", "run.steps=5")
    assert isinstance(other.exception, StrataError)
    assert "holds a run of another recipe (run.steps was 4, is 5)" in str(other.exception)
    fresh = cli("sft", tmp_path / "sft.yaml", "run.steps=5", "--fresh", "--json")
    assert json.loads(fresh.stdout)["steps"] == 5
    path = tmp_path / "run_sft" / "model"
    preferring = cli("dpo", tmp_path / "dpo.yaml", "run.steps=2", f"model.path={path}")
    assert preferring.exit_code == 0
    assert ", margin 0.0000 -> " in preferring.stdout and ", preferred " in preferring.stdout


def test_other_rows_are_refused_on_resumption(recipe: Make, tmp_path: Path) -> None:
    made = recipe("sft", "run.steps=4")
    sft(made, progress=False)
    write_rows(tmp_path / "sft.jsonl", sft_rows(47))
    with pytest.raises(StrataError, match=r"the rows \(or their bank\) are not those"):
        sft(made, progress=False)


def test_a_bank_finds_references_ahead(recipe: Make, tmp_path: Path) -> None:
    bank = strata.Bank.create(tmp_path / "texts", embedder=TinyEmbedder())
    names = ("Ada", "Bruno", "Chidi", "Farah", "Goran", "Hana")
    bank.add(
        [Document(f"{name} lives by the river.", name) for name in names],
        cut=lambda d: [Reference(d.text, d.source, 0, len(d.text))],
        embedder=TinyEmbedder(),
    )
    rows = [{k: v for k, v in row.items() if k != "references"} for row in sft_rows(24)]
    record = bank.search("Ada", 1, None)[0]
    rows[0]["references"] = [{"id": record.id}]
    rows[1]["references"] = []
    made = recipe_rows(recipe, tmp_path, rows)
    seen: dict[str, Any] = {}
    original = run._about

    def about(split: Any, dataset: Any, given: TuneRecipe, model: Any) -> str:
        seen["rows"] = [dict(row) for row in dataset]
        return original(split, dataset, given, model)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "_about", about)
        result = sft(made(f"reading.bank={tmp_path / 'texts'}", "reading.by=text"), progress=False)
    read = [row["references"] for row in seen["rows"]]
    assert read[0] == [record.text] and read[1] == []
    for row, texts in zip(rows[2:], read[2:], strict=True):
        name = row["prompt"].split()[-1].rstrip("?")
        assert texts == [f"{name} lives by the river."]
    assert result.rows_reading == 23


def recipe_rows(recipe: Make, tmp_path: Path, rows: list[dict[str, Any]]) -> Make:
    """Recipes over these rows: the fixture writes its own first."""

    def make(*overrides: str) -> Any:
        made = recipe("sft", "run.steps=2", "data.validation=null", *overrides)
        write_rows(tmp_path / "sft.jsonl", rows)
        return made

    return make


def test_long_references_are_cut_as_a_bank_cuts_them(recipe: Make, tmp_path: Path) -> None:
    long = " ".join(f"House {number} is old." for number in range(8))
    rows = [{**row, "references": [long]} for row in sft_rows(8)]
    result = sft(recipe_rows(recipe, tmp_path, rows)(), progress=False)
    assert result.rows_reading == 8
    with pytest.raises(StrataError, match=r"line 1: \d+ references .* above reading.max_ref"):
        sft(recipe_rows(recipe, tmp_path, rows)("reading.max_references=1"), fresh=True)


def test_messages_and_a_validation_share(recipe: Make, tmp_path: Path) -> None:
    turns = [
        {"messages": [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "B?"},
            {"role": "assistant", "content": "C"},
        ]}
        for number in range(30)
    ]  # fmt: skip
    make = recipe_rows(recipe, tmp_path, turns)
    options = ("data.validation_fraction=0.3", "data.turns=every", "data.sequence_tokens=60")
    result = sft(make(*options), progress=False)
    assert 30 < result.rows < 54 and result.rows_left_out == 0  # of two answers each
    assert result.before is not None
    _, tokenizer = load(result.model_dir or Path())
    assert tokenizer.chat_template  # the default one, saved


@pytest.mark.parametrize("name", ["sft_paper", "dpo_paper", "sft_laptop", "dpo_laptop"])
def test_published_recipes(name: str) -> None:
    kind: Any = SFTRecipe if name.startswith("sft") else DPORecipe
    made = load_config(kind, RECIPES / f"{name}.yaml")
    assert made.name == name and made.reading is not None
    if name == "sft_paper":
        assert (made.optim.lr, made.optim.weight_decay, made.run.epochs) == (5e-5, 0.1, 3)
        assert made.data.batch_size * made.run.accumulate == 512
        assert made.schedule.warmup_fraction == 0.1 and made.schedule.kind == "cosine"
        assert made.data.sequence_tokens == 2048
    if name == "dpo_paper":
        assert (made.optim.lr, made.beta, made.schedule.kind) == (4e-6, 0.01, "cosine")

"""What one step does: loss, clipping, rates, decay; what a run leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from strata.errors import ConfigError, DataError
from strata.layers import value_tables
from strata.ops import reduce_uses
from strata.train import Recipe, StepEvent, read_metrics, train
from strata.train.feed import Batch, Feed
from strata.train.loop import Training, backward, start_or_resume, take_step, validate
from strata.train.run import RunFolder, require_one_process
from strata.train.state import DENSE, VALUES, named_weights
from strata.train.world import World

MakeRecipe = Callable[..., Recipe]
GOLDEN = Path(__file__).parents[1] / "golden" / "loss_curves.json"


@contextmanager
def opened(recipe: Recipe) -> Iterator[Training]:
    with RunFolder(recipe) as folder:
        feed = Feed(recipe)
        yield start_or_resume(recipe, folder=folder, feed=feed, world=World(torch.device("cpu")))


def dense_weights(training: Training) -> dict[str, Tensor]:
    values = {id(table.weight) for table in value_tables(training.model).values()}
    named = named_weights(training.model).items()
    return {name: w.detach().clone() for name, w in named if id(w) not in values}


def table_weight(training: Training) -> Tensor:
    (table,) = value_tables(training.model).values()
    return table.weight


@pytest.mark.parametrize("kind", ["memory", "dense"])
def test_golden_loss_curve(tiny_recipe: MakeRecipe, kind: str) -> None:
    """Fifty steps give the losses they gave when the file was written.

    Tolerance 5e-3 nats: one machine repeats the bits, another CPU's kernels sum in another order,
    and a changed top-k pick then moves a loss in its fourth digit. A wrong rate, clip or
    gradient moves it in its second. Rewrite the file with STRATA_WRITE_GOLDEN=1, and say why.
    """
    overrides = ("memory=null",) if kind == "dense" else ()
    threads = torch.get_num_threads()
    recipe = tiny_recipe("run.steps=50", "run.threads=1", *overrides)
    train(recipe, progress=False)
    torch.set_num_threads(threads)
    losses = [round(record["loss"], 6) for record in read_metrics(recipe.run_dir)]
    if os.environ.get("STRATA_WRITE_GOLDEN"):
        known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps({**known, kind: losses}, indent=1) + "\n")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[kind], abs=5e-3)
    assert losses[-1] < losses[0] - 0.5


def gradients(training: Training, micro_batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of every weight, the value table's made dense."""
    training.model.eval()
    loss = float(backward(training, micro_batches))
    grads = {
        name: weight.grad.clone()
        for name, weight in training.model.named_parameters()
        if weight.grad is not None
    }
    (table,) = value_tables(training.model).values()
    rows = reduce_uses(table.queue.take())
    grads["values"] = torch.zeros_like(table.weight).index_copy(0, rows.rows_u, rows.grad_uv)
    training.model.zero_grad()
    return loss, grads


def test_accumulation_equals_the_larger_batch(tiny_recipe: MakeRecipe) -> None:
    with opened(tiny_recipe()) as training:
        batch = training.feed.next_batch()
        # Few labels in one half: a mean of means would weigh them up.
        batch["labels"][:2, 3:] = -100
        halves = [{name: t[:2] for name, t in batch.items()}, {n: t[2:] for n, t in batch.items()}]
        loss, whole = gradients(training, [batch])
        loss_of_halves, summed = gradients(training, halves)
    # fp32 sums in another order: a few ulp of the largest terms.
    assert loss_of_halves == pytest.approx(loss, rel=1e-6)
    assert whole.keys() == summed.keys() and "values" in whole
    for name, grad in whole.items():
        torch.testing.assert_close(summed[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_is_the_mean_over_label_tokens(tiny_recipe: MakeRecipe) -> None:
    with opened(tiny_recipe()) as training:
        batch = training.feed.next_batch()
        batch["labels"][0, :20] = -100
        loss = float(backward(training, [batch]))
        training.model.zero_grad()
        expected = training.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_without_labels_moves_nothing_to_nan(tiny_recipe: MakeRecipe) -> None:
    with opened(tiny_recipe()) as training:
        batch = training.feed.next_batch()
        batch["labels"][:] = -100
        assert float(backward(training, [batch])) == 0.0


def one_step(recipe: Recipe) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, float]]:
    """Dense weights after a step, the table before and after, and the record."""
    with opened(recipe) as training:
        before = table_weight(training).detach().clone()
        record = take_step(training)
        return dense_weights(training), before, table_weight(training).detach().clone(), record


SGD = ("optim.value_algorithm=sgd", "optim.value_lr=1.0", "schedule.kind=linear")


def test_values_are_clipped_apart_from_the_dense_part(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    free = tiny_recipe(*SGD, "run.clip_norm_values=null", f"run.dir={tmp_path / 'free'}")
    tight = tiny_recipe(*SGD, "run.clip_norm_values=1e-3", f"run.dir={tmp_path / 'tight'}")
    dense_free, before, table_free, record_free = one_step(free)
    dense_tight, _, table_tight, record_tight = one_step(tight)

    assert all(dense_free[name].equal(dense_tight[name]) for name in dense_free)
    assert record_free["grad_norm_values"] == record_tight["grad_norm_values"] > 1e-3
    lr = record_tight["lr_values"]
    moved = float((table_tight - before).norm())
    assert moved == pytest.approx(lr * 1e-3, rel=1e-2)  # fp32 rows of size 0.2 hold 1e-8
    assert float((table_free - before).norm()) == pytest.approx(
        lr * record_free["grad_norm_values"], rel=1e-4
    )


def test_the_dense_part_is_clipped_apart_from_values(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    free = tiny_recipe(*SGD, "run.clip_norm=null", f"run.dir={tmp_path / 'free'}")
    tight = tiny_recipe(*SGD, "run.clip_norm=1e-12", f"run.dir={tmp_path / 'tight'}")
    _, _, table_free, record_free = one_step(free)
    dense_tight, _, table_tight, record_tight = one_step(tight)
    assert table_free.equal(table_tight)
    assert record_free["grad_norm"] == pytest.approx(record_tight["grad_norm"])
    dense_free, *_ = one_step(tiny_recipe(*SGD, f"run.dir={tmp_path / 'one'}"))
    assert not all(dense_free[name].equal(dense_tight[name]) for name in dense_free)


def test_rows_that_were_not_read_do_not_decay(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("optim.weight_decay=10.0", "memory.num_half_keys=64")
    _, before, after, record = one_step(recipe)
    changed = (before != after).any(dim=1)
    assert 0 < int(changed.sum()) <= record["rows_updated"] < len(before)


def test_both_rates_follow_one_schedule(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("schedule.kind=linear", "schedule.warmup_steps=4", "schedule.min_ratio=0")
    train(recipe, progress=False)
    records = read_metrics(recipe.run_dir)
    factors = [0.25, 0.5, 0.75, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [r["lr"] for r in records] == pytest.approx([3e-3 * f for f in factors])
    assert [r["lr_values"] for r in records] == pytest.approx([1e-2 * f for f in factors])


def test_rates_reach_the_optimizers(tiny_recipe: MakeRecipe) -> None:
    with opened(tiny_recipe("schedule.warmup_steps=10")) as training:
        take_step(training)
        lrs = {key: opt.param_groups[-1]["lr"] for key, opt in training.optimizers.items()}
    assert lrs == {DENSE: pytest.approx(3e-4), VALUES: pytest.approx(1e-3)}


def test_the_finished_model_opens_with_its_tokenizer(tiny_recipe: MakeRecipe) -> None:
    result = train(tiny_recipe(), progress=False)
    assert result.model_dir is not None
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    with opened(tiny_recipe()) as training:  # resumes at the last step
        for name, weight in named_weights(training.model).items():
            assert dict(model.named_parameters())[name].equal(weight), name
    ids = tokenizer("Ada lives in", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)


def test_inference_needs_nothing_of_training(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    result = train(tiny_recipe(), progress=False)
    assert result.model_dir is not None
    moved = result.model_dir.rename(tmp_path / "elsewhere")
    assert {file.name for file in moved.iterdir()} >= {"config.json", "model.safetensors"}
    AutoModelForCausalLM.from_pretrained(moved)


def test_validation_is_repeatable_and_logged(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("run.validate_every=5", "run.validate_batches=3", "run.log_every=7")
    result = train(recipe, progress=False)
    logged = {
        r["step"]: r["validation_loss"]
        for r in read_metrics(recipe.run_dir)
        if "validation_loss" in r
    }
    assert list(logged) == [5, 10, 12]
    assert result.validation_loss == logged[12]
    with opened(recipe) as training:
        assert len(training.feed.validation) == 3
        assert validate(training) == validate(training)


def test_health_is_logged_per_layer(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()
    train(recipe, progress=False)
    records = {r["step"]: r["health"] for r in read_metrics(recipe.run_dir) if "health" in r}
    assert list(records) == [5, 10]
    assert len(records[5]) == 2
    for layer in records[5].values():
        assert 0 < layer["rows_used"] <= 1 and 0 < layer["entropy"] <= 1


def test_the_hook_sees_every_step(tiny_recipe: MakeRecipe) -> None:
    events: list[StepEvent] = []
    train(tiny_recipe("run.log_every=100"), progress=False, on_step=events.append)
    assert [event.step for event in events] == list(range(1, 13))
    assert {event.num_steps for event in events} == {12}
    assert {"loss", "lr", "lr_values", "grad_norm", "tokens", "tokens_per_s"} <= events[
        0
    ].record.keys()
    assert events[-1].record["tokens"] == 12 * 4 * 32


def test_the_result_counts(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("run.accumulate=2")
    result = train(recipe, progress=False)
    records = read_metrics(recipe.run_dir)
    assert result.steps == 12 and result.loss == records[-1]["loss"]
    assert records[-1]["tokens"] == 12 * 2 * 4 * 32
    rates = sorted(record["tokens_per_s"] for record in records)
    assert result.tokens_per_s == pytest.approx((rates[5] + rates[6]) / 2)
    assert result.wall_s > 0


@pytest.mark.parametrize("overrides", [("run.precision=bf16",), ("data.document_mask=true",)])
def test_it_learns(tiny_recipe: MakeRecipe, overrides: tuple[str, ...]) -> None:
    recipe = tiny_recipe("run.steps=40", *overrides)
    train(recipe, progress=False)
    losses = [record["loss"] for record in read_metrics(recipe.run_dir)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_compiled_training_equals_eager(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    eager = tiny_recipe(f"run.dir={tmp_path / 'eager'}")
    compiled = tiny_recipe(f"run.dir={tmp_path / 'compiled'}", "run.compile=true")
    train(eager, progress=False)
    train(compiled, progress=False)
    losses = [[r["loss"] for r in read_metrics(x.run_dir)] for x in (eager, compiled)]
    # Fused kernels round otherwise; see the golden test.
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        (
            "model.host.vocab_size=100",
            ConfigError,
            "has 320 tokens but the model's vocab_size is 100",
        ),
        ("data.dir=/nowhere", DataError, "no prepared data at /nowhere"),
        ("run.device=cuda:7", ConfigError, "no device 'cuda:7' here"),
    ],
)
def test_refuses_what_does_not_fit(
    tiny_recipe: MakeRecipe, override: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(tiny_recipe(override), progress=False)


def test_refuses_a_group_that_does_not_fit(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"group 3 does not divide 4 .*: give one of 1, 2, 4"):
        train(tiny_recipe("distributed.memory_group=3"), progress=False)


def test_what_trains_in_one_process_refuses_to_be_one_of_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_one_process("strata sft")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="strata sft trains in one process, this is one of 4"):
        require_one_process("strata sft")


def test_a_validation_split_is_needed_only_to_validate(
    tiny_recipe: MakeRecipe, tmp_path: Path, tiny_data: Path
) -> None:
    from strata.data.prepare import PrepareConfig, prepare

    source = tmp_path / "one.jsonl"
    source.write_text(json.dumps({"text": "Ada lives in Accra. " * 400}) + "\n")
    out = tmp_path / "one"
    config = PrepareConfig(memory_gb=1.0)
    prepare([source], out=out, tokenizer=tiny_data / "tokenizer", config=config)
    assert train(tiny_recipe(f"data.dir={out}"), progress=False).steps == 12
    with pytest.raises(DataError, match="val"):
        train(
            tiny_recipe(f"data.dir={out}", "run.validate_every=2", f"run.dir={tmp_path / 'r'}"),
            progress=False,
        )

"""The training loop, read top to bottom.

A step: read `accumulate` micro-batches, divide by the label tokens of all of them, go backward,
clip the dense part and the value tables apart, move both optimizers at the same point of one
schedule. Everything a step depends on is in the checkpoint, so a run that was killed and resumed
ends with the same bits as one that was not (on a CPU, and on a GPU as far as its kernels are
deterministic).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from strata.errors import ConfigError, DivergenceError
from strata.layers import health, sum_usage, track_usage
from strata.models import build
from strata.train import sharded_checkpoint
from strata.train.checkpoint import Checkpoint, TensorGroups
from strata.train.continual import ContinualReading
from strata.train.feed import Batch, Feed
from strata.train.labels import count_labels, head_reads_only, label_tokens
from strata.train.metrics import (
    MetricsFile,
    MetricsSink,
    Report,
    TensorBoardSink,
    Terminal,
    WandbSink,
)
from strata.train.optim import RowOptimizer, optimizers
from strata.train.recipe import Recipe
from strata.train.run import RunFolder, StopRequest
from strata.train.saving import Saving
from strata.train.schedule import learning_rate_factor
from strata.train.sharded_rows import ShardedRowOptimizer
from strata.train.sharding import add_up_gradients, clip, spread, sums_last
from strata.train.state import DENSE, VALUES, Optimizers, optimizer_numbers, restore, tensor_groups
from strata.train.world import World, open_world


@dataclass(frozen=True)
class StepEvent:
    """What an observer is told after each step.

    Attributes:
        step: updates made so far, 1..num_steps.
        num_steps: updates in the whole run.
        model: the live model, in evaluation mode while the observer looks.
        record: this step's numbers, as in `metrics.jsonl`.
    """

    step: int
    num_steps: int
    model: PreTrainedModel
    record: Mapping[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: updates made so far.
        loss: training loss of the last step, nats a token; None if there was no step.
        validation_loss: the newest one; None if there was none.
        tokens_per_s: median over steps, validation and checkpoints left out; of the process that
            last made a step, None if none did.
        wall_s: seconds in steps and validations, over all processes of the run.
        stopped_by: what ended it early: `SIGTERM`, `SIGINT`, or `time`; else None.
        run_dir: the run folder.
        model_dir: the finished model; None if the run is not finished.
    """

    steps: int
    loss: float | None
    validation_loss: float | None
    tokens_per_s: float | None
    wall_s: float
    stopped_by: str | None
    run_dir: Path
    model_dir: Path | None


@dataclass
class Progress:
    """How far a run is; kept in its checkpoints."""

    step: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_s: float | None = None


@dataclass
class Training:
    """A run in progress: what a step reads and changes."""

    recipe: Recipe
    folder: RunFolder
    feed: Feed
    device: torch.device
    model: PreTrainedModel
    forward: Callable[..., Any]  # the model, compiled or not
    optimizers: Optimizers
    world: World
    reading: ContinualReading | None = None  # of references, beside the text
    done: Progress = field(default_factory=Progress)
    step_rates: list[float] = field(default_factory=list)  # tokens/s of this process's steps


def train(
    recipe: Recipe,
    *,
    on_step: Callable[[StepEvent], None] | None = None,
    progress: bool = True,
    fresh: bool = False,
    for_s: float | None = None,
) -> TrainResult:
    """Train a model by a recipe, going on from the run folder's newest checkpoint if it has one.

    Args:
        recipe: the run.
        on_step: called after every step with the live model; random numbers it draws and the time
            it takes are not the run's, so that watching a run does not change it.
        progress: show progress on stderr.
        fresh: delete what an earlier run left in the run folder and start over.
        for_s: stop after about so many seconds, saved as by a signal; None trains to the end.

    Raises:
        ConfigError: the recipe does not fit the data, the machine or the run in the folder.
        CheckpointError: the newest checkpoint is damaged.
        DataError: the data cannot be read.
        DivergenceError: the loss or a gradient is not finite.
        StorageError: the disk is full.
    """
    run = recipe.run
    stop = StopRequest(for_s=for_s)
    if run.threads is not None:
        torch.set_num_threads(run.threads)

    with ExitStack() as stack:
        world = stack.enter_context(open_world(recipe.distributed, device=run.device))
        with world.together():
            feed = Feed(recipe, world)
            folder = stack.enter_context(RunFolder(recipe, is_main=world.is_main))
            if fresh and world.is_main:
                folder.clear()
        training = start_or_resume(recipe, folder=folder, feed=feed, world=world)
        saving = stack.enter_context(Saving(world, beside=run.checkpoint_async))
        done = training.done
        with world.together():
            if world.is_main:
                folder.write_recipe()
        with open_report(training, progress=progress) as report, stop:
            while done.step < run.steps and not world.any(stop.reason is not None or saving.failed):
                start_s = time.perf_counter()
                record = take_step(training)
                last = done.step == run.steps
                if is_due(done.step, run.validate_every, last=last):
                    done.validation_loss = record["validation_loss"] = validate(training)
                done.wall_s += time.perf_counter() - start_s

                report.advance(done.step)
                wanted = record.keys() & {"validation_loss", "health"}
                if wanted or is_due(done.step, run.log_every, last=last):
                    report.write(record)
                if is_due(done.step, run.checkpoint_every, last=last):
                    save_checkpoint(training, saving, at_once=last)
                if on_step is not None:
                    observe(on_step, training, record)

            save_checkpoint(training, saving, at_once=True)
            reasons = [reason for reason in world.gather(stop.reason) if reason]
            if done.step < run.steps:
                report.say(
                    f"{reasons[0]}: stopped after step {done.step} and saved it, "
                    "run the same command to go on"
                )
            else:
                with world.together():
                    save_model(training)
    return result(training, stopped_by=reasons[0] if done.step < run.steps else None)


def start_or_resume(recipe: Recipe, *, folder: RunFolder, feed: Feed, world: World) -> Training:
    """Build the model and its optimizers, and bring them to the newest checkpoint's state."""
    if world.tensor_group is not None and recipe.reading is not None:
        world.refuse(
            ConfigError(
                "distributed.tensor_group cannot read references, whose memories have all heads: "
                "set distributed.tensor_group=1"
            )
        )
    if world.size > 1 and recipe.reading is not None and recipe.distributed.dense == "fsdp":
        world.refuse(
            ConfigError(
                "distributed.dense=fsdp cannot read references, which are encoded outside the "
                "model's forward pass: set distributed.dense=replicated"
            )
        )
    with world.together():
        checkpoint = folder.open_newest(part=world.rank, parts=world.size)
        torch.manual_seed(recipe.seed)
        model = build(recipe.model, recipe.memory, device=world.device, group=world.memory_group)
        feed.check_model(model)
        spread(model, recipe.distributed, world, sequence_tokens=recipe.data.sequence_tokens)
    training = Training(
        recipe=recipe,
        folder=folder,
        feed=feed,
        device=world.device,
        model=model,
        forward=torch.compile(model) if recipe.run.compile else model,
        optimizers=build_optimizers(model, recipe, world),
        world=world,
        reading=start_reading(recipe, feed, model),
    )
    if checkpoint is None:
        if world.size > 1:  # each draws its own dropout
            torch.manual_seed(recipe.seed * 1_009 + world.data_rank)
    else:
        bring_back(checkpoint, training)
        feed.load_state_dict(checkpoint.state["feed"])
        training.done = Progress(**checkpoint.state["progress"])
    return training


def bring_back(checkpoint: Checkpoint, training: Training) -> None:
    """Put a checkpoint's tensors in place, of one process or of many."""
    model, optimizers, world = training.model, training.optimizers, training.world
    if world.size == 1 and not checkpoint.is_sharded:
        restore(checkpoint, model, optimizers, device=world.device)
    else:
        with world.together():
            sharded_checkpoint.restore(
                checkpoint, model, optimizers, world=world, seed=training.recipe.seed
            )


def start_reading(recipe: Recipe, feed: Feed, model: PreTrainedModel) -> ContinualReading | None:
    """What lets the model read references, if the recipe asks for it."""
    if recipe.reading is None or feed.references is None:
        return None
    return ContinualReading(
        model,
        feed.tokenizer,
        feed.references,
        recipe.reading,
        document_mask=recipe.data.document_mask,
    )


def take_step(training: Training) -> dict[str, Any]:
    """Make one update and return its record."""
    recipe, run, done = training.recipe, training.recipe.run, training.done
    start_s = time.perf_counter()
    step = done.step + 1
    watch_memory = is_due(step, run.health_every)
    track_usage(training.model, enabled=watch_memory)

    training.model.train()
    factor = learning_rate_factor(recipe.schedule, step=step, num_steps=run.steps)
    rates = set_learning_rates(training, factor=factor)
    micro_batches = [training.feed.next_batch() for _ in range(run.accumulate)]
    numbers = update(training, backward(training, micro_batches), step=step)

    done.step, done.loss = step, numbers["loss"]
    done.tokens += recipe.tokens_per_step
    training.step_rates.append(recipe.tokens_per_step / (time.perf_counter() - start_s))
    record: dict[str, Any] = {"step": step, **numbers, **rates, "tokens": done.tokens}
    record["tokens_per_s"] = training.step_rates[-1]
    if watch_memory:
        sum_usage(training.model, training.world.sum_everywhere)
        record["health"] = {name: asdict(of) for name, of in health(training.model).items()}
    return record


def backward(training: Training, micro_batches: Sequence[Batch]) -> Tensor:
    """Gradients of the mean loss over the label tokens of all micro-batches and processes together.

    One division for all of them makes accumulating, or more processes, equal one larger batch,
    however unevenly the labels are spread.

    Returns:
        The loss, nats a label token, 0-d, detached.
    """
    world = training.world
    (num_labels,) = world.sum([sum(count_labels(batch["labels"]) for batch in micro_batches)])
    total = torch.zeros((), device=training.device)
    for number, batch in enumerate(micro_batches, start=1):
        sums_last(training.model, last=number == len(micro_batches))
        loss = summed_loss(training, batch) / max(1, num_labels)
        loss.backward()
        total += loss.detach()
    add_up_gradients(training.model, dense_weights(training), world)
    return world.sum_tensor(total)


def update(training: Training, loss: Tensor, *, step: int) -> dict[str, float]:
    """Clip, and make both optimizers' steps.

    Returns:
        The loss, and the gradient norms before clipping.

    Raises:
        DivergenceError: one of them is not finite.
    """
    dense = training.optimizers[DENSE]
    limit = training.recipe.run.clip_norm or math.inf
    dense_norm = clip(training.model, dense_weights(training), limit, training.world)
    # The step's one wait for the device, and before any weight has changed.
    loss_value, norm_value = torch.stack([loss, dense_norm.to(loss)]).tolist()
    numbers = {"loss": loss_value, "grad_norm": norm_value}
    require_finite(training, numbers, step=step)

    dense.step()
    dense.zero_grad(set_to_none=True)
    values = training.optimizers.get(VALUES)
    if isinstance(values, RowOptimizer):
        values.step()
        values.zero_grad()
        numbers["grad_norm_values"] = values.grad_norm
        numbers["rows_updated"] = values.rows_updated
        require_finite(training, numbers, step=step)
    return numbers


def dense_weights(training: Training) -> list[nn.Parameter]:
    """What AdamW trains."""
    groups = training.optimizers[DENSE].param_groups
    return [weight for group in groups for weight in group["params"]]


def summed_loss(training: Training, batch: Batch) -> Tensor:
    """Sum of next-token cross-entropies over a batch's label tokens, nats, 0-d fp32."""
    batch = dict(batch)
    positions, targets = label_tokens(batch.pop("labels"))
    device, low_precision = training.device, training.recipe.run.precision == "bf16"
    positions = positions.to(device, non_blocking=True)
    targets = targets.to(device, non_blocking=True)
    reading = nullcontext() if training.reading is None else training.reading(batch)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low_precision), reading:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        if training.recipe.run.compile:  # shapes that stay the same compile once
            logits_nv = training.forward(**batch, use_cache=False).logits.flatten(0, 1)[positions]
        else:
            with head_reads_only(training.model, positions):
                logits_nv = training.forward(**batch, use_cache=False).logits
    return F.cross_entropy(logits_nv.float(), targets, reduction="sum")


@torch.no_grad()
def validate(training: Training) -> float:
    """Loss over the validation batches, nats a label token."""
    training.model.eval()
    batches = training.feed.validation
    loss = sum(float(summed_loss(training, batch)) for batch in batches)
    labels = sum(count_labels(batch["labels"]) for batch in batches)
    total, num_labels = training.world.sum([loss, labels])
    return total / max(1, num_labels)


def save_checkpoint(training: Training, saving: Saving, *, at_once: bool) -> None:
    """Write a checkpoint of the current step, unless it has one, when the pending one is whole.

    Raises:
        StorageError: one of them cannot be written.
    """
    saving.wait()
    done, checkpoints = training.done, training.folder.checkpoints
    if done.step == 0 or done.step in checkpoints.steps():
        return
    done.tokens_per_s = median_rate(training)
    state = {
        "recipe": training.recipe.model_dump(mode="json"),
        "feed": training.feed.state_dict(),
        "progress": asdict(done),
        "optimizers": optimizer_numbers(training.optimizers),
    }
    model, optimizers, world = training.model, training.optimizers, training.world
    step = done.step

    def write(groups: TensorGroups) -> None:
        if world.size == 1:
            checkpoints.save(step, groups=groups, state=state)
        else:
            sharded_checkpoint.save(checkpoints, step, groups, state, saving.world)

    groups = (
        tensor_groups(model, optimizers, device=training.device)
        if world.size == 1
        else sharded_checkpoint.spread_groups(model, optimizers, world)
    )
    saving.start(write, groups, at_once=at_once)


def save_model(training: Training) -> None:
    """Write the finished model, unless that was done; the main process puts its parts together."""
    folder, recipe, feed = training.folder, training.recipe, training.feed
    if folder.model_dir.exists() or not training.world.is_main:
        return
    model = training.model
    if training.world.size > 1:
        model = build(recipe.model, recipe.memory)
        newest = folder.checkpoints.path(training.done.step)
        sharded_checkpoint.read_model(newest, model)
    folder.save_model(model, feed.tokenizer)


def observe(
    on_step: Callable[[StepEvent], None], training: Training, record: Mapping[str, Any]
) -> None:
    """Let the observer look, and see to it that its random numbers are not the run's."""
    devices = [training.device] if training.device.type == "cuda" else []
    event = StepEvent(
        step=training.done.step,
        num_steps=training.recipe.run.steps,
        model=training.model,
        record=record,
    )
    training.model.eval()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        on_step(event)


def build_optimizers(model: PreTrainedModel, recipe: Recipe, world: World) -> Optimizers:
    """AdamW for the dense part, the row optimizer for the value tables if there are any."""
    dense, values = optimizers(
        model,
        recipe.optim,
        max_norm_values=recipe.run.clip_norm_values,
        seed=recipe.seed,
        make_rows=None if world.size == 1 else partial(ShardedRowOptimizer, world=world),
    )
    return {DENSE: dense} if values is None else {DENSE: dense, VALUES: values}


def set_learning_rates(training: Training, *, factor: float) -> dict[str, float]:
    """Put both optimizers at the same point of the schedule; the rates, for the record."""
    optim = training.recipe.optim
    rates = {}
    for key, peak, name in ((DENSE, optim.lr, "lr"), (VALUES, optim.value_lr, "lr_values")):
        if key in training.optimizers:
            rates[name] = peak * factor
            for group in training.optimizers[key].param_groups:
                group["lr"] = rates[name]
    return rates


def open_report(training: Training, *, progress: bool) -> Report:
    """Open every place the recipe logs to; the main process does."""
    if not training.world.is_main:
        return Report([], terminal=None)
    recipe, after_step = training.recipe, training.done.step
    run, run_dir = recipe.run, recipe.run_dir
    sinks: list[MetricsSink] = []
    if run.tensorboard:
        sinks.append(TensorBoardSink(run_dir, after_step=after_step))
    if run.wandb is not None:
        config = recipe.model_dump(mode="json")
        sinks.append(WandbSink(run_dir, project=run.wandb, name=recipe.name, config=config))
    sinks.append(MetricsFile(run_dir, after_step=after_step))
    terminal = Terminal(recipe.name, num_steps=run.steps, start_step=after_step)
    return Report(sinks, terminal=terminal if progress else None)


def is_due(step: int, every: int | None, *, last: bool = False) -> bool:
    """Whether something done every so many steps, and at the last one, is to be done now."""
    return every is not None and (last or step % every == 0)


def require_finite(training: Training, numbers: Mapping[str, float], *, step: int) -> None:
    """Stop before a checkpoint can hold a broken model."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            steps = training.folder.checkpoints.steps()
            kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "no checkpoint yet"
            error = DivergenceError(
                f"{name} is {number} at step {step} ({kept}): lower optim.lr or optim.value_lr, "
                "lengthen schedule.warmup_steps, or check the data"
            )
            training.world.refuse(error)  # the numbers are those of all processes


def median_rate(training: Training) -> float | None:
    """Median tokens a second over this process's steps; the stored one if it made none."""
    if not training.step_rates:
        return training.done.tokens_per_s
    return statistics.median(training.step_rates)


def result(training: Training, *, stopped_by: str | None) -> TrainResult:
    """What `train` returns."""
    done = training.done
    finished = done.step == training.recipe.run.steps
    return TrainResult(
        steps=done.step,
        loss=done.loss,
        validation_loss=done.validation_loss,
        tokens_per_s=median_rate(training),
        wall_s=done.wall_s,
        stopped_by=stopped_by,
        run_dir=training.folder.dir,
        model_dir=training.folder.model_dir if finished else None,
    )

"""A fine-tuning run from beginning to end, by a recipe.

RUN/recipe.yaml      the resolved recipe
RUN/sources.json     what files its rows came from
RUN/metrics.jsonl    what TRL logged, one line each time
RUN/checkpoints/     TRL's checkpoints, checkpoint-STEP
RUN/model/           the finished model with its tokenizer and chat template, for from_pretrained
RUN/result.json      how it ended
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

from strata.config import load_config
from strata.device import pick_device
from strata.errors import CheckpointError, ConfigError, ModelError
from strata.explicit.bank import Bank
from strata.explicit.extras import require
from strata.explicit.source import open_retriever
from strata.layers import value_tables
from strata.models import build
from strata.train.metrics import MetricsFile, Terminal, read_metrics
from strata.train.recipe import RECIPE_NAME, require_same_run
from strata.train.run import RunFolder, StopRequest, require_one_process
from strata.train.tune.find import Finder
from strata.train.tune.recipe import (
    MAY_DIFFER_ON_RESUME,
    DPORecipe,
    SFTRecipe,
    TuneRecipe,
)
from strata.train.tune.rows import Kind, Row, Split, read_split, reference_texts
from strata.train.tune.template import ensure_chat_template

if TYPE_CHECKING:
    from strata.train.tune.trainers import MemoryDPOTrainer, MemorySFTTrainer

SOURCES_NAME, RESULT_NAME = "sources.json", "result.json"
_STATE_NAME = "trainer_state.json"  # TRL writes it last
_NOT_OF_ROWS = {  # clocks, and TRL's count of tokens, which begins anew when a run goes on
    "eval_num_tokens",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_model_preparation_time",
}


@dataclass(frozen=True)
class TuneResult:
    """How a run ended.

    Attributes:
        steps: updates made so far.
        rows, rows_left_out: trained on, and left out because their prompt fills a row.
        rows_reading: of `rows`, those with a reference.
        before, after: of the held-out rows, by TRL's names without `eval_`: loss, and for DPO
            rewards/margins and rewards/accuracies; None without such rows, `after` also before the
            end.
        wall_s: seconds in this process.
        stopped_by: `SIGTERM` or `SIGINT` if a signal ended it early, else None.
        run_dir: the run folder.
        model_dir: the finished model; None if the run is not finished.
    """

    steps: int
    rows: int
    rows_left_out: int
    rows_reading: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    wall_s: float
    stopped_by: str | None
    run_dir: Path
    model_dir: Path | None


def sft(recipe: SFTRecipe, *, fresh: bool = False, progress: bool = True) -> TuneResult:
    """Fine-tune a model on prompts and completions, or go on where the run folder stands.

    Args:
        recipe: the run.
        fresh: delete what the run wrote, and start over.
        progress: tell of it on stderr.

    Raises:
        StrataError: wrong recipe, data, model or run folder; a loss that is no number.
    """
    return _run(recipe, "sft", fresh=fresh, progress=progress)


def dpo(recipe: DPORecipe, *, fresh: bool = False, progress: bool = True) -> TuneResult:
    """Train a model to prefer chosen answers, or go on where the run folder stands.

    Args:
        recipe: the run.
        fresh: delete what the run wrote, and start over.
        progress: tell of it on stderr.

    Raises:
        StrataError: wrong recipe, data, model or run folder; a loss that is no number.
    """
    return _run(recipe, "dpo", fresh=fresh, progress=progress)


def _run(recipe: TuneRecipe, kind: Kind, *, fresh: bool, progress: bool) -> TuneResult:
    require_one_process()
    require("trl", extra="tune", purpose=f"strata {kind}")
    device = pick_device(recipe.run.device)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    begin_s = time.perf_counter()
    with RunFolder(recipe) as folder:
        if fresh:
            folder.clear()
            for name in (SOURCES_NAME, RESULT_NAME):
                (folder.dir / name).unlink(missing_ok=True)
        split = read_split(recipe.data, kind, seed=recipe.seed)
        bank = None
        if recipe.reading is not None and recipe.reading.bank is not None:
            bank = Bank.open(recipe.reading.bank)
            split.fingerprints["reading.bank"] = bank.digest()
        checkpoint = _newest(folder.dir / "checkpoints")
        if checkpoint is not None or (folder.dir / RESULT_NAME).exists():
            _require_same(folder.dir, recipe, split)
        finished = _finished(folder.dir)
        if finished is not None:
            return finished
        model, tokenizer = _open(recipe)
        if split.train[0].conversational:
            ensure_chat_template(tokenizer)
        trainer = _trainer(recipe, kind, split, bank, model, tokenizer, cpu=device.type == "cpu")
        rows: Any = trainer.train_dataset
        folder.write_recipe()
        (folder.dir / SOURCES_NAME).write_text(json.dumps(split.fingerprints), encoding="utf-8")
        start_step = 0 if checkpoint is None else int(checkpoint.name.partition("-")[2])
        with StopRequest() as stop, _without_trl_warnings():
            recorder = _Recorder(recipe, start_step=start_step, stop=stop, progress=progress)
            try:
                trainer.add_callback(recorder)
                recorder.say(_about(split, rows, recipe, model))
                if checkpoint is None and split.validation:
                    trainer.evaluate()
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
            finally:
                recorder.close()
        stopped = trainer.state.global_step < trainer.state.max_steps
        if not stopped:
            folder.save_model(model, tokenizer)
        records = [r for r in read_metrics(folder.dir) if "eval_loss" in r]
        result = TuneResult(
            steps=trainer.state.global_step,
            rows=len(rows),
            rows_left_out=len(split.train) - len(rows),
            rows_reading=_reading_rows(rows, recipe),
            before=_held_out(records[0]) if records else None,
            after=_held_out(records[-1]) if records and not stopped else None,
            wall_s=time.perf_counter() - begin_s,
            stopped_by=stop.signal if stopped else None,
            run_dir=folder.dir,
            model_dir=None if stopped else folder.model_dir,
        )
        if not stopped:
            text = json.dumps(asdict(result), default=str)
            (folder.dir / RESULT_NAME).write_text(text, encoding="utf-8")
    return result


def _open(recipe: TuneRecipe) -> tuple[PreTrainedModel, Any]:
    """The model to be trained, and its tokenizer; checkpointing is TRL's to turn on."""
    path = recipe.model.path
    assert path is not None
    model = build(recipe.model.model_copy(update={"gradient_checkpointing": False}), None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"no tokenizer can be opened at {path}: {reason}") from None
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer at {path} has no eos token, with which an answer ends")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _trainer(
    recipe: TuneRecipe,
    kind: Kind,
    split: Split,
    bank: Bank | None,
    model: Any,
    tokenizer: Any,
    *,
    cpu: bool,
) -> MemorySFTTrainer | MemoryDPOTrainer:
    import datasets
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, SFTConfig

    from strata.train.tune.trainers import MemoryDPOTrainer, MemorySFTTrainer

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    held = split.validation
    common: dict[str, Any] = {
        "train_dataset": _dataset(recipe, split.train, tokenizer, bank),
        "eval_dataset": _dataset(recipe, held, tokenizer, bank) if held else None,
        "processing_class": tokenizer,
        "reading": recipe.reading,
        "finder": _finder(recipe, bank, tokenizer),
        "optim": recipe.optim,
        "clip_norm_values": recipe.run.clip_norm_values,
    }
    settings = _arguments(recipe, validate=bool(held), cpu=cpu)
    with _without_trl_warnings():
        if kind == "sft":
            args: Any = SFTConfig(**settings, completion_only_loss=True)
        else:
            args = DPOConfig(**settings, beta=cast(DPORecipe, recipe).beta)
    trainer: MemorySFTTrainer | MemoryDPOTrainer = (
        MemorySFTTrainer if kind == "sft" else MemoryDPOTrainer
    )(model, args=args, **common)
    trainer.remove_callback(PrinterCallback)
    if bars:
        datasets.enable_progress_bars()
    return trainer


@contextmanager
def _without_trl_warnings() -> Iterator[None]:
    """Transformers renames what TRL calls gradient_checkpointing; nobody can act on it here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        yield


def _arguments(recipe: TuneRecipe, *, validate: bool, cpu: bool) -> dict[str, Any]:
    """A recipe as TRL takes it."""
    run = recipe.run
    return {
        "output_dir": str(recipe.run_dir / "checkpoints"),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "num_train_epochs": run.epochs,
        "max_steps": run.steps or -1,
        "per_device_train_batch_size": recipe.data.batch_size,
        "per_device_eval_batch_size": recipe.data.batch_size,
        "gradient_accumulation_steps": run.accumulate,
        "learning_rate": recipe.optim.lr,
        "weight_decay": recipe.optim.weight_decay,
        "max_grad_norm": run.clip_norm or 0.0,
        "lr_scheduler_type": {
            "cosine": "cosine",
            "linear": "linear",
            "constant": "constant_with_warmup",
        }[recipe.schedule.kind],
        "warmup_steps": recipe.schedule.warmup_fraction,  # below 1 it is a share
        "max_length": recipe.data.sequence_tokens,
        "bf16": run.precision == "bf16",
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "gradient_checkpointing": recipe.model.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": run.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if validate else "no",
        "eval_steps": run.validate_every if validate else None,
        "save_strategy": "steps",
        "save_steps": run.checkpoint_every,
        "save_total_limit": run.keep_checkpoints,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _dataset(recipe: TuneRecipe, rows: Sequence[Row], tokenizer: Any, bank: Bank | None) -> Any:
    from datasets import Dataset

    if recipe.reading is None:
        return Dataset.from_list([dict(row.fields) for row in rows])
    references = reference_texts(
        rows,
        tokenizer,
        recipe.reading.memory,
        bank=bank,
        max_references=recipe.reading.max_references,
    )
    if bank is None:
        references = [texts or [] for texts in references]
    return Dataset.from_list(
        [{**row.fields, "references": texts} for row, texts in zip(rows, references, strict=True)]
    )


def _finder(recipe: TuneRecipe, bank: Bank | None, tokenizer: Any) -> Finder | None:
    reading = recipe.reading
    if reading is None or bank is None:
        return None
    return Finder(
        open_retriever(bank, reading.by),
        tokenizer,
        chunk_tokens=reading.chunk_tokens,
        top_k=reading.top_k,
        min_score=reading.min_score,
    )


def _about(split: Split, dataset: Any, recipe: TuneRecipe, model: PreTrainedModel) -> str:
    """What is about to be trained, in one line."""
    parts = [f"{len(dataset):,} rows"]
    if left := len(split.train) - len(dataset):
        parts.append(f"{left:,} left out, their prompts fill data.sequence_tokens")
    parts.append(f"{len(split.validation):,} held out")
    named = sum(bool(row.references) for row in split.train)
    if recipe.reading is not None:
        parts.append(f"{_reading_rows(dataset, recipe):,} read references")
    elif named:
        parts.append(f"{named:,} name references, which nothing reads without `reading`")
    if tables := value_tables(model):
        parts.append(f"{len(tables)} value tables stepped by the row optimizer")
    return ", ".join(parts)


def _reading_rows(dataset: Any, recipe: TuneRecipe) -> int:
    return 0 if recipe.reading is None else sum(bool(texts) for texts in dataset["references"])


def _newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; what a kill left unfinished behind it is deleted."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        step = path.name.partition("-")[2]
        if not step.isdecimal():
            continue
        try:
            json.loads((path / _STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
            continue
        found.append((int(step), path))
    return max(found)[1] if found else None


def _require_same(run_dir: Path, recipe: TuneRecipe, split: Split) -> None:
    stored = load_config(type(recipe), run_dir / RECIPE_NAME)
    require_same_run(stored, recipe, may_differ=MAY_DIFFER_ON_RESUME)
    try:
        sources = json.loads((run_dir / SOURCES_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{run_dir / SOURCES_NAME} cannot be read: start over with --fresh"
        ) from None
    if sources != split.fingerprints:
        raise ConfigError(
            f"the rows (or their bank) are not those that {run_dir} began with: give back the old "
            "ones, choose another run.dir, or start over with --fresh"
        )


def _finished(run_dir: Path) -> TuneResult | None:
    try:
        tree = json.loads((run_dir / RESULT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not (run_dir / "model").is_dir():
        return None
    return TuneResult(**tree | {"run_dir": run_dir, "model_dir": run_dir / "model"})


def _held_out(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): value
        for name, value in record.items()
        if name.startswith("eval_") and name not in _NOT_OF_ROWS
    }


class _Recorder(TrainerCallback):
    """Writes what TRL logs, shows it, and ends the run on a signal."""

    def __init__(
        self, recipe: TuneRecipe, *, start_step: int, stop: StopRequest, progress: bool
    ) -> None:
        self._file = MetricsFile(recipe.run_dir, after_step=start_step)
        self._stop = stop
        self._recipe, self._start_step = recipe, start_step
        self._terminal: Terminal | None = None
        self._progress = progress

    def say(self, line: str) -> None:
        """Tell the person at the terminal."""
        if self._progress:
            self._shown(0).say(line)

    def close(self) -> None:
        """Take the bar down and close the file."""
        if self._terminal is not None:
            self._terminal.close()
        self._file.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The number of steps is known from here on."""
        if self._progress:
            self._terminal = None
            self._shown(state.max_steps).start()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        """Write one record."""
        if not logs or "train_runtime" in logs:
            return
        record = {"step": state.global_step, **logs}
        self._file.write(record)
        if self._progress:
            self._shown(state.max_steps).say(_line(record))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop after this step if asked to."""
        if self._progress:
            self._shown(state.max_steps).advance(state.global_step)
        if self._stop.signal is not None:
            control.should_save = control.should_training_stop = True
            self.say(
                f"{self._stop.signal}: stopped after step {state.global_step} and saved it, run "
                "the same command to go on"
            )
        return control

    def _shown(self, num_steps: int) -> Terminal:
        if self._terminal is None:
            self._terminal = Terminal(
                self._recipe.name, num_steps=num_steps, start_step=self._start_step
            )
        return self._terminal


_SHOWN = (
    "loss",
    "eval_loss",
    "rewards/margins",
    "rewards/accuracies",
    "eval_rewards/margins",
    "eval_rewards/accuracies",
    "learning_rate",
)


def _line(record: Mapping[str, Any]) -> str:
    parts = [f"step {record['step']}"]
    for name in _SHOWN:
        value = record.get(name)
        if value is not None and math.isfinite(float(value)):
            short = name.removeprefix("rewards/").replace("eval_", "held-out ")
            parts.append(f"{short.replace('rewards/', '')} {float(value):.4g}")
    return "  ".join(parts)

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
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from strata.config import load_config
from strata.device import pick_device
from strata.errors import CheckpointError, ConfigError
from strata.explicit.bank import Bank
from strata.explicit.extras import require
from strata.layers import value_tables
from strata.train.metrics import read_metrics
from strata.train.recipe import RECIPE_NAME, require_same_run
from strata.train.run import RunFolder, StopRequest, require_one_process
from strata.train.tune.make import make_trainer, open_model, without_trl_warnings
from strata.train.tune.recipe import (
    MAY_DIFFER_ON_RESUME,
    DPORecipe,
    SFTRecipe,
    TuneRecipe,
)
from strata.train.tune.recorder import Recorder
from strata.train.tune.rows import Kind, Split, read_split
from strata.train.tune.template import ensure_chat_template

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
    require_one_process(f"strata {kind}")
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
        model, tokenizer = open_model(recipe)
        if split.train[0].conversational:
            ensure_chat_template(tokenizer)
        trainer = make_trainer(
            recipe, kind, split, bank, model, tokenizer, cpu=device.type == "cpu"
        )
        rows: Any = trainer.train_dataset
        folder.write_recipe()
        (folder.dir / SOURCES_NAME).write_text(json.dumps(split.fingerprints), encoding="utf-8")
        start_step = 0 if checkpoint is None else int(checkpoint.name.partition("-")[2])
        with StopRequest() as stop, without_trl_warnings():
            recorder = Recorder(recipe, start_step=start_step, stop=stop, progress=progress)
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

"""A recipe's model, rows and searches as one of our trainers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from transformers import AutoTokenizer, PreTrainedModel

from strata.errors import ModelError
from strata.explicit.bank import Bank
from strata.explicit.source import open_retriever
from strata.models import build
from strata.train.tune.find import Finder
from strata.train.tune.recipe import DPORecipe, TuneRecipe
from strata.train.tune.rows import Kind, Row, Split, reference_texts

if TYPE_CHECKING:
    from strata.train.tune.trainers import MemoryDPOTrainer, MemorySFTTrainer


def open_model(recipe: TuneRecipe) -> tuple[PreTrainedModel, Any]:
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


def make_trainer(
    recipe: TuneRecipe,
    kind: Kind,
    split: Split,
    bank: Bank | None,
    model: Any,
    tokenizer: Any,
    *,
    cpu: bool,
) -> MemorySFTTrainer | MemoryDPOTrainer:
    """The trainer of a run, with its rows and what they read."""
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
    with without_trl_warnings():
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
def without_trl_warnings() -> Iterator[None]:
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

"""TRL's trainers for decoders that read references and have value tables.

    trainer = MemorySFTTrainer(model, args=SFTConfig(...), train_dataset=rows,
                               processing_class=tokenizer, reading=TuneReading())

A row of the dataset may have `references`, a list of texts; whatever else TRL takes stays as it is.
Importing this module imports TRL.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer, SFTTrainer

from strata.errors import CheckpointError, ConfigError, DataError, DivergenceError
from strata.layers import value_tables
from strata.train.optim import OptimConfig, RowOptimizer, optimizers, parameter_groups
from strata.train.tune.collate import PIECES, READS, REFERENCES, ReadingCollator, prompt_tokens
from strata.train.tune.find import Finder
from strata.train.tune.recipe import TuneReading
from strata.train.tune.step import StepReading

VALUES_FILE = "value_optimizer.safetensors"

_REFUSED = ("packing", "eval_packing", "padding_free", "precompute_ref_log_probs")


class _WithMemory:
    """What both trainers have more than TRL's; it stands before them in the method order."""

    _answers = 1  # rows of a batch for each example

    # Of transformers' trainer.
    model: Any
    args: Any
    state: Any
    optimizer: Any
    processing_class: Any
    data_collator: Any
    add_callback: Any

    def __init__(
        self,
        model: Any,
        *,
        args: Any,
        reading: TuneReading | None = None,
        finder: Finder | None = None,
        optim: OptimConfig | None = None,
        clip_norm_values: float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            raise ConfigError("give the opened model (strata.models.load), not its name")
        self._reading = reading
        self._finder = finder if reading is not None else None
        self._optim, self._clip_norm_values = optim, clip_norm_values
        self.row_optimizer: RowOptimizer | None = None
        self._steps: list[StepReading] = []
        if reading is not None:
            _refuse_what_memory_cannot_follow(args, finder)
            args.remove_unused_columns = False  # references are no argument of the model
        super().__init__(model, args=args, **kwargs)  # type: ignore[call-arg]
        self.add_callback(_StepRows(self))
        if reading is not None:
            self.data_collator = ReadingCollator(
                self.data_collator, chunk_tokens=reading.chunk_tokens, answers=self._answers
            )
            self._steps = self._step_readings(reading)

    def _step_readings(self, reading: TuneReading) -> list[StepReading]:
        tokenizer, with_grad = self.processing_class, not reading.detach
        return [StepReading(self.model, tokenizer, reading, with_grad=with_grad)]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's tokens and labels, and beside them what each piece reads."""
        prepared = super()._prepare_dataset(dataset, *args, **kwargs)  # type: ignore[misc]
        if isinstance(dataset, Dataset) and not len(prepared):
            raise DataError(
                f"none of {len(dataset)} rows is left: the prompt of each fills the tokens of a "
                "row alone; raise data.sequence_tokens (max_length)"
            )
        if self._finder is None or (
            isinstance(prepared, Dataset) and PIECES in prepared.column_names
        ):
            return prepared
        if not isinstance(prepared, Dataset):
            raise ConfigError("references are found ahead: give a Dataset, not a stream")
        return _found(prepared, self._finder)

    @contextmanager
    def _reads(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A batch without its references, which the models read meanwhile."""
        plain = dict(inputs)
        reads = plain.pop(READS, None)
        with ExitStack() as stack:
            for step in self._steps if reads is not None else ():
                stack.enter_context(step(reads))
            yield plain

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, of a batch that reads."""
        with self._reads(inputs) as plain:
            return super().compute_loss(model, plain, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's; a loss that is no number ends the run before any weight changes."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise DivergenceError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}: lower the "
                "learning rate, lengthen the warmup, or check the data"
            )
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """AdamW for the dense part, and beside it the row optimizer of the value tables."""
        if self.optimizer is not None:
            return self.optimizer
        config, seed = self._optim or OptimConfig(), self.args.seed
        clip = self._clip_norm_values
        if self._optim is not None:
            dense, self.row_optimizer = optimizers(
                self.model, config, max_norm_values=clip, seed=seed
            )
            self.optimizer = dense
            return dense
        tables = parameter_groups(self.model).tables
        if tables:  # their .grad stays None now, so that TRL's optimizer leaves them alone
            self.row_optimizer = RowOptimizer(
                tables,
                lr=config.value_lr,
                algorithm=config.value_algorithm,
                betas=config.value_betas,
                eps=config.value_eps,
                max_norm=clip,
                rounding=config.value_rounding,
                seed=seed,
            )
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights of a checkpoint; transformers would read a sealed config.json as a plain one."""
        target = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        try:
            if hasattr(target, "get_base_model") or not value_tables(target):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            else:
                _load_weights(target, folder)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise _damaged(folder, error) from None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.row_optimizer is not None:
            _save_rows(self.row_optimizer, Path(output_dir) / VALUES_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self.row_optimizer is not None and checkpoint is not None:
            _load_rows(self.row_optimizer, Path(checkpoint) / VALUES_FILE)

    def _send_telemetry(self) -> None:
        """Nothing is sent to anyone."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the run folder holds the recipe."""


class MemorySFTTrainer(_WithMemory, SFTTrainer):
    """Supervised fine-tuning of a decoder that reads references.

    Args:
        model: an opened decoder, with value tables or without.
        args: TRL's SFTConfig, without packing.
        reading: how references are written and read; None reads none.
        finder: finds the references of rows that name none.
        optim: rates and rules of AdamW and of the value tables' row optimizer; None leaves the
            dense part to TRL's arguments and takes the defaults for the tables.
        clip_norm_values: largest gradient norm of the value tables; None does not clip.
        kwargs: TRL's, such as train_dataset and processing_class.

    Attributes:
        row_optimizer: steps with TRL's, at the same point of its schedule; None before `train` and
            where there is no table to train.

    Raises:
        ConfigError: an argument that memory cannot follow.
        HostError: the model cannot have explicit memory, or not as `reading` asks.
        ModelError: a value table is read-only.
    """


class MemoryDPOTrainer(_WithMemory, DPOTrainer):
    """DPO of a decoder that reads references; the reference model reads the same ones.

    Each of the two models reads memories that it wrote itself.

    Args:
        model, reading, finder, optim, clip_norm_values: as for `MemorySFTTrainer`.
        args: TRL's DPOConfig.
        ref_model: None for a copy of the model as it is given; needed where that is under adapters.
        kwargs: TRL's.

    Raises:
        ConfigError: an argument that memory cannot follow.
        HostError: the model cannot have explicit memory, or not as `reading` asks.
        ModelError: a value table is read-only.
    """

    _answers = 2
    ref_model: Any

    def __init__(
        self,
        model: Any,
        *,
        args: Any,
        ref_model: Any = None,
        reading: TuneReading | None = None,
        **kwargs: Any,
    ) -> None:
        adapted = hasattr(model, "get_base_model")
        if ref_model is None and adapted and reading is not None:
            raise ConfigError(
                "a model under adapters needs its reference model beside it, which writes memories "
                "of its own: give ref_model"
            )
        if ref_model is None and not adapted and not args.precompute_ref_log_probs:
            ref_model = copy.deepcopy(model)
        if ref_model is not None:
            ref_model.requires_grad_(False).eval()
        super().__init__(model, args=args, ref_model=ref_model, reading=reading, **kwargs)

    def _step_readings(self, reading: TuneReading) -> list[StepReading]:
        of_reference = StepReading(self.ref_model, self.processing_class, reading, with_grad=False)
        return [*super()._step_readings(reading), of_reference]


class _StepRows(TrainerCallback):
    """Steps the value tables with the dense part."""

    def __init__(self, trainer: _WithMemory) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the dense part moved, and before the schedule does."""
        rows = self._trainer.row_optimizer
        if rows is None:
            return
        dense = self._trainer.optimizer.param_groups[0]
        for group in rows.param_groups:
            peak = group.setdefault("initial_lr", group["lr"])
            group["lr"] = peak * dense["lr"] / dense["initial_lr"]
        rows.step()
        rows.zero_grad()


def _refuse_what_memory_cannot_follow(args: Any, finder: Finder | None) -> None:
    for name in _REFUSED:
        if getattr(args, name, None):
            raise ConfigError(f"{name} cannot go with references that rows read: set it to False")
    if finder is not None and getattr(args, "completion_only_loss", True) is False:
        raise ConfigError(
            "completion_only_loss=False hides where prompts end, from which pieces are counted: "
            "leave it True, or name the references in the rows"
        )
    if getattr(args, "truncation_mode", "keep_start") != "keep_start":
        raise ConfigError("truncation_mode must be 'keep_start': text is read from its beginning")


def _found(dataset: Dataset, finder: Finder) -> Dataset:
    """The dataset with the references of all rows, and what their pieces read of them."""
    named = REFERENCES in dataset.column_names
    references: list[Any] = list(dataset[REFERENCES]) if named else [None] * len(dataset)
    pieces: list[Any] = [None] * len(dataset)
    wanted = [at for at, texts in enumerate(references) if texts is None]
    prompts, completions = [], []
    for at in wanted:
        row = dataset[at]
        length = prompt_tokens(row)
        if not length:
            raise DataError(f"row {at + 1} has no prompt, so nothing to search with")
        # Two answers read alike, whatever they would find.
        ids = row["prompt_ids"] if "prompt_ids" in row else row["input_ids"]
        prompts.append(ids[:length])
        completions.append(ids[length:])
    for at, found in zip(wanted, finder.find(prompts, completions), strict=True):
        references[at], pieces[at] = found.references, found.pieces
    if named:
        dataset = dataset.remove_columns(REFERENCES)
    return dataset.add_column(REFERENCES, references).add_column(PIECES, pieces)


def _save_rows(rows: RowOptimizer, path: Path) -> None:
    state = rows.state_dict()
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, entries in state["state"].items()
        for name, tensor in entries.items()
    }
    save_file(tensors, path, metadata={"steps": str(state["steps"])})


def _load_rows(rows: RowOptimizer, path: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            steps = int((file.metadata() or {})["steps"])
            for key in file.keys():  # noqa: SIM118 (not a dict)
                number, _, name = key.partition(".")
                state.setdefault(int(number), {})[name] = file.get_tensor(key)
        groups = rows.state_dict()["param_groups"]
        rows.load_state_dict({"state": state, "param_groups": groups, "steps": steps})
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, error) from None


def _load_weights(model: Any, folder: Path) -> None:
    """Copy what save_pretrained wrote; a tied weight is there under one of its names."""
    own = model.state_dict(keep_vars=True)
    loaded: set[int] = set()
    for path in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(path)
        model.load_state_dict(tensors, strict=False)
        loaded |= {id(own[name]) for name in tensors if name in own}
    missing = [name for name, tensor in own.items() if id(tensor) not in loaded]
    if missing:
        raise ValueError(f"it lacks the weight {missing[0]}")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    checkpoint = path if path.is_dir() else path.parent
    return CheckpointError(
        f"{path} cannot be used ({' '.join(str(error).split())[:300]}): delete {checkpoint} to go "
        "on from an earlier checkpoint, or start over with --fresh"
    )

"""Recipes of fine-tuning: what is trained on what, and how; everything that decides a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from strata.config import FrozenConfig
from strata.explicit.settings import ExplicitMemoryConfig
from strata.models import ModelConfig
from strata.train.optim import OptimConfig

# What may differ when a run goes on, beside what `strata.train.recipe` allows a pretraining run.
MAY_DIFFER_ON_RESUME = frozenset(
    {
        "name",
        "data.train",
        "data.validation",
        "reading.bank",
        "run.dir",
        "run.device",
        "run.threads",
        "run.log_every",
        "run.validate_every",
        "run.checkpoint_every",
        "run.keep_checkpoints",
    }
)


class PairsConfig(FrozenConfig):
    """The rows of a run: prompts with completions, or with a chosen and a rejected answer.

    Attributes:
        train: a jsonl (plain, gz, zst) or parquet file, or a folder of these.
        validation: the same, held out; None for a share of `train`.
        validation_fraction: of `train`, drawn by a hash of each row, where `validation` is None; 0
            for no validation.
        batch_size: rows a micro-batch; a step reads `run.accumulate` of them.
        sequence_tokens: what stands behind these tokens of a row is cut off; a row whose prompt
            alone fills them is left out.
        turns: of `messages`: train on the `last` answer, or on `every` one, each with what stands
            before it as its prompt.
    """

    train: Path
    validation: Path | None = None
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    batch_size: PositiveInt = 8
    sequence_tokens: int = Field(default=2048, ge=2)
    turns: Literal["last", "every"] = "last"

    @model_validator(mode="after")
    def _one_way_to_validate(self) -> PairsConfig:
        if self.validation is not None and self.validation_fraction:
            raise ValueError("give validation or validation_fraction, not both")
        return self


class TuneReading(FrozenConfig):
    """References are encoded within the step and read beside the row, as `attach` reads them.

    References that a row names are read by all of its tokens. Those found in `bank` are read piece
    by piece: what each `chunk_tokens` of the prompt find, counted from its end, they read; the
    first `chunk_tokens` of the completion read what the prompt's last piece reads; each further
    `chunk_tokens` what those before them find. In DPO the whole completion reads what the prompt's
    last piece reads, lest answers be told apart by what they find.

    Attributes:
        memory: what a reference becomes; the settings to write the model's banks with.
        bank: find the references of rows that have none here; also whose ids rows may name. Of any
            model: only its texts are read.
        by: how it is searched; None for hybrid, or text where it has no vectors.
        top_k: references that a piece finds, at most.
        min_score: leave out what scores less.
        chunk_tokens: tokens of a piece.
        max_references: of one row, once long ones are cut; more are refused.
        encode_batch: references encoded at once.
        detach: no gradients to how memories are written: less memory, half the time of encoding.

    Source: "Memory3" (arXiv 2407.01178), section 3.
    """

    memory: ExplicitMemoryConfig = Field(default_factory=ExplicitMemoryConfig)
    bank: Path | None = None
    by: Literal["vector", "text", "hybrid"] | None = None
    top_k: PositiveInt = 5
    min_score: float | None = None
    chunk_tokens: PositiveInt = 64
    max_references: PositiveInt = 16
    encode_batch: PositiveInt = 32
    detach: bool = False


class TuneSchedule(FrozenConfig):
    """How the learning rate moves; the value tables' follows the dense part's.

    Attributes:
        kind: after the warmup; `cosine` and `linear` fall to 0 at the end of the run.
        warmup_fraction: of the run's updates, over which the rate rises linearly.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)


class TuneRun(FrozenConfig):
    """How long a run is, where and how it computes, and what it writes.

    Attributes:
        dir: the run folder; None is `runs/NAME`.
        epochs: times that the rows are gone through.
        steps: optimizer updates instead; None for `epochs`.
        accumulate: micro-batches added up to one update.
        precision: `fp32`, or `bf16` for autocast over fp32 weights.
        device: `auto` takes a GPU if there is one; else `cpu` or `cuda`.
        threads: CPU threads within an operation; None leaves torch's own choice.
        clip_norm: largest gradient norm of the dense part; None does not clip.
        clip_norm_values: the same for the value tables, which are clipped apart.
        log_every: steps between records.
        validate_every: steps between validations; there is one before the first step and one after
            the last in any case.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: newest checkpoints to keep; None keeps all.
    """

    dir: Path | None = None
    epochs: PositiveFloat = 3.0
    steps: PositiveInt | None = None
    accumulate: PositiveInt = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    clip_norm: PositiveFloat | None = 1.0
    clip_norm_values: PositiveFloat | None = 1.0
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 100
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt | None = 2


class TuneRecipe(FrozenConfig):
    """What both kinds of fine-tuning share.

    Attributes:
        name: names the run and, by default, its folder.
        seed: of data order and dropout.
        model: the decoder; always a trained one (`path`), with its tokenizer beside it.
        data: the rows.
        reading: references beside them; None trains plainly, whatever the rows name.
        optim: rates and rules of the two optimizers.
        schedule: how both rates move.
        run: length, place, precision and output.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    seed: int = Field(default=42, ge=0, lt=2**32)
    model: ModelConfig
    data: PairsConfig
    reading: TuneReading | None = None
    optim: OptimConfig
    schedule: TuneSchedule = Field(default_factory=TuneSchedule)
    run: TuneRun = Field(default_factory=TuneRun)

    @field_validator("name", mode="before")
    @classmethod
    def _name_is_text(cls, name: Any) -> Any:
        # YAML reads `name: 373` as a number.
        return str(name) if isinstance(name, int) and not isinstance(name, bool) else name

    @model_validator(mode="after")
    def _model_is_trained(self) -> TuneRecipe:
        if self.model.path is None:
            raise ValueError("fine-tuning begins with a trained model: give model.path")
        return self

    @property
    def run_dir(self) -> Path:
        """The run folder: `run.dir`, or `runs/NAME`."""
        return self.run.dir if self.run.dir is not None else Path("runs") / self.name


class SFTRecipe(TuneRecipe):
    """Supervised fine-tuning: loss on completions only.

    Attributes:
        optim: AdamW at 5e-5 with weight decay 0.1 unless given.

    Source: "Memory3" (arXiv 2407.01178), section on fine-tuning and alignment.
    """

    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=5e-5, value_lr=5e-4))


class DPORecipe(TuneRecipe):
    """Direct preference optimization; the reference model is the one that the run begins with.

    Attributes:
        beta: how strongly the policy is held to the reference model.
        optim: AdamW at 4e-6 unless given.

    Source: "Direct Preference Optimization" (arXiv 2305.18290), equation 7; "Memory3"
    (arXiv 2407.01178) for the numbers.
    """

    beta: PositiveFloat = 0.01
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=4e-6, value_lr=4e-5))

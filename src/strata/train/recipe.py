"""A training recipe: everything that decides a run, in one validated, frozen object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from strata.config import FrozenConfig
from strata.data.loader import LoaderConfig
from strata.errors import ConfigError
from strata.explicit.attach.pieces import Query
from strata.explicit.settings import ExplicitMemoryConfig
from strata.layers import MemoryLayerConfig
from strata.models import ModelConfig
from strata.train.optim import OptimConfig
from strata.train.schedule import ScheduleConfig
from strata.train.world import DistributedConfig

RECIPE_NAME = "recipe.yaml"
MAX_SHOWN = 8  # differing keys named in one line

# What may differ when a run goes on: where things lie, what is logged and kept, and what moves a
# result only by the rounding of another machine. Everything else is the run's identity.
MAY_DIFFER_ON_RESUME = frozenset(
    {
        "name",
        "data.dir",
        "model.attn_implementation",
        "reading.references",
        "distributed.memory_group",
        "distributed.dense",
        "distributed.tensor_group",
        "run.dir",
        "run.device",
        "run.threads",
        "run.compile",
        "run.log_every",
        "run.health_every",
        "run.validate_every",
        "run.validate_batches",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.checkpoint_async",
        "run.tensorboard",
        "run.wandb",
    }
)


class DataConfig(FrozenConfig):
    """What a run reads, and how documents become batches.

    Attributes:
        dir: a folder written by `strata data prepare`.
        batch_size: sequences a micro-batch, over all processes together; a step reads
            `run.accumulate` of them.
        sequence_tokens: tokens a sequence.
        packing: `concat` cuts windows from the stream of documents; `document` starts every
            sequence at a document's beginning and pads the rest.
        document_mask: no attention across the documents that share a sequence.
    """

    dir: Path
    batch_size: PositiveInt = 8
    sequence_tokens: int = Field(default=1024, ge=2)
    packing: Literal["concat", "document"] = "concat"
    document_mask: bool = False

    def loader_config(self, *, seed: int, chunk_tokens: int | None = None) -> LoaderConfig:
        """The loader's own configuration; with `chunk_tokens` its batches name chunks."""
        return LoaderConfig(
            batch_size=self.batch_size,
            sequence_tokens=self.sequence_tokens,
            seed=seed,
            packing=self.packing,
            document_mask=self.document_mask,
            chunk_tokens=chunk_tokens,
        )


class ReadingConfig(FrozenConfig):
    """Continual training: the decoder reads references while it is trained.

    Attributes:
        references: a folder written by `strata data references` for this data.
        memory: what a reference becomes; the settings to write the model's banks with.
        reach: how many chunks' references a chunk reads, its own included.
        query: "own": what was found with a chunk's text is read from its first token on;
            "previous": it is read by the next chunk, as where text is generated. `attach` reads
            prompts so with `prompt_query`.
        encode_batch: references encoded at once.
        detach: no gradients to how memories are written: they are then constants, as a bank's.

    Source: "Memory3" (arXiv 2407.01178), section 3.5.
    """

    references: Path
    memory: ExplicitMemoryConfig = Field(default_factory=ExplicitMemoryConfig)
    reach: int = Field(default=5, ge=1, le=1024)
    query: Query = "own"
    encode_batch: PositiveInt = 32
    detach: bool = False


class RunConfig(FrozenConfig):
    """How long a run is, where and how it computes, and what it writes.

    Attributes:
        dir: the run folder; None is `runs/NAME`.
        steps: optimizer updates.
        accumulate: micro-batches added up to one update.
        precision: `fp32`, or `bf16` for autocast over fp32 weights.
        compile: run the model through `torch.compile`.
        device: `auto` takes a GPU if there is one; else `cpu`, `cuda` or `cuda:1`.
        threads: CPU threads within an operation; None leaves torch's own choice.
        clip_norm: largest gradient norm of the dense part; None does not clip.
        clip_norm_values: the same for the value tables, which are clipped apart.
        log_every, health_every: steps between records, and between records of memory health.
        validate_every: steps between validations over the first `validate_batches` batches of the
            validation split; None never validates.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: newest checkpoints to keep; None keeps all.
        checkpoint_async: copy what is saved to CPU memory and write it beside the steps that
            follow, instead of waiting; takes that memory while it writes.
        tensorboard: also write TensorBoard events (needs tensorboard).
        wandb: also log to this Weights & Biases project (needs wandb).
    """

    dir: Path | None = None
    steps: PositiveInt
    accumulate: PositiveInt = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: PositiveInt | None = None
    clip_norm: PositiveFloat | None = 1.0
    clip_norm_values: PositiveFloat | None = 1.0
    log_every: PositiveInt = 10
    health_every: PositiveInt | None = 100
    validate_every: PositiveInt | None = None
    validate_batches: PositiveInt = 16
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt | None = 2
    checkpoint_async: bool = False
    tensorboard: bool = False
    wandb: str | None = Field(default=None, min_length=1)


class Recipe(FrozenConfig):
    """One pretraining run.

    Attributes:
        name: names the run and, by default, its folder.
        seed: of initial weights, data order and dropout.
        model: the decoder, from scratch or pretrained.
        memory: the memory layers to install; None trains the dense model.
        data: what is read.
        reading: references to read beside it; None reads none. Meant for a decoder that is trained
            already (`model.path`): one from scratch learns to ignore them.
        optim: rates and rules of the two optimizers.
        schedule: how both rates move.
        distributed: how processes share the run, if torchrun started several.
        run: length, place, precision and output.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    seed: int = Field(default=42, ge=0, lt=2**63)
    model: ModelConfig
    memory: MemoryLayerConfig | None = None
    data: DataConfig
    reading: ReadingConfig | None = None
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    run: RunConfig

    @field_validator("name", mode="before")
    @classmethod
    def _name_is_text(cls, name: Any) -> Any:
        # YAML reads `name: 373` as a number.
        return str(name) if isinstance(name, int) and not isinstance(name, bool) else name

    @model_validator(mode="after")
    def _schedule_fits_run(self) -> Recipe:
        steps, warmup = self.run.steps, self.schedule.warmup_steps
        if warmup > steps:
            raise ValueError(
                f"schedule.warmup_steps is {warmup} but run.steps is {steps}: "
                "the warmup must end within the run"
            )
        decay = self.schedule.num_decay_steps(steps)
        if warmup + decay > steps:
            raise ValueError(
                f"schedule: warmup of {warmup} and decay of {decay} updates exceed "
                f"run.steps = {steps}: shorten one of them"
            )
        return self

    @model_validator(mode="after")
    def _sequence_fits_model(self) -> Recipe:
        positions = (self.model.host or {}).get("max_position_embeddings")
        if isinstance(positions, int) and self.data.sequence_tokens > positions:
            raise ValueError(
                f"data.sequence_tokens is {self.data.sequence_tokens} but model.host."
                f"max_position_embeddings is {positions}: lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _attention_isolates_documents(self) -> Recipe:
        flash = (self.model.attn_implementation or "").startswith("flash_attention")
        if self.data.document_mask and flash and self.data.batch_size > 1:
            raise ValueError(
                f"data.document_mask with model.attn_implementation="
                f"{self.model.attn_implementation} isolates documents at data.batch_size 1 only: "
                "set that, or attn_implementation=sdpa"
            )
        return self

    @model_validator(mode="after")
    def _documents_read_in_parallel(self) -> Recipe:
        sequential = self.reading is not None and self.reading.memory.positions == "sequential"
        if self.data.document_mask and sequential:
            raise ValueError(
                "reading.memory.positions=sequential counts the memories of a chunk, of which "
                "data.document_mask lets its documents read different ones: change one of the two"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """The run folder: `run.dir`, or `runs/NAME`."""
        return self.run.dir if self.run.dir is not None else Path("runs") / self.name

    @property
    def tokens_per_step(self) -> int:
        """Token positions one update reads, padding included."""
        return self.data.batch_size * self.data.sequence_tokens * self.run.accumulate


class RunRecipe(Protocol):
    """Any recipe of a run with a folder."""

    @property
    def run_dir(self) -> Path:
        """Where it lives."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The whole recipe as plain values."""


def require_same_run(
    stored: RunRecipe,
    recipe: RunRecipe,
    *,
    may_differ: Set[str] = MAY_DIFFER_ON_RESUME,
    remedy: str = "give back the old values, choose another run.dir, or start over with --fresh",
) -> None:
    """Check that a run may go on under this recipe.

    Args:
        stored: the recipe the run was started with.
        recipe: the recipe given now.
        may_differ: dotted keys that give the same result whatever they hold.
        remedy: what the user can do.

    Raises:
        ConfigError: they differ in a field that changes the result; the line names each.
    """
    before, now = stored.model_dump(mode="json"), recipe.model_dump(mode="json")
    differing = [
        f"{key} was {was}, is {given}"
        for key, was, given in _differences(before, now)
        if key not in may_differ
    ]
    if not differing:
        return
    shown = "; ".join(differing[:MAX_SHOWN])
    more = f"; and {len(differing) - MAX_SHOWN} more" if len(differing) > MAX_SHOWN else ""
    raise ConfigError(f"{recipe.run_dir} holds a run of another recipe ({shown}{more}): {remedy}")


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Dotted key, old and new value of every leaf that differs between two trees."""
    for name in sorted(before.keys() | now.keys()):
        was, given = before.get(name), now.get(name)
        if isinstance(was, Mapping) and isinstance(given, Mapping):
            yield from _differences(was, given, f"{prefix}{name}.")
        elif was != given:
            yield f"{prefix}{name}", _shown(was), _shown(given)


def _shown(value: Any) -> str:
    return "given" if isinstance(value, Mapping) else repr(value)

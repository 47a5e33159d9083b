"""How the reader is taught, stage by stage: one frozen object, in `stages.yaml`.

A stage is a training run. What all runs share stands once, in `common`; a stage says what it reads,
how long and how fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from strata.config import FrozenConfig, load_config, validate
from strata.explicit.settings import ExplicitMemoryConfig
from strata.layers import MemoryLayerConfig
from strata.models import ModelConfig
from strata.reader.layers import read_layer
from strata.train import Recipe

# Keys of a recipe that are each stage's own, or known from the folders.
_OF_STAGES = (
    "name",
    "model",
    "memory",
    "data.dir",
    "data.batch_size",
    "data.sequence_tokens",
    "reading.references",
    "reading.memory.selector",
    "reading.memory.tokens_per_head",
    "optim.lr",
    "optim.value_lr",
    "schedule.warmup_steps",
    "schedule.min_ratio",
    "run.dir",
    "run.steps",
)
Way = Annotated[str, Field(pattern=r"^(none|known|(text|memory)_([1-9]|[1-5]\d|6[0-4]))$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$", max_length=32)]


class Stage(FrozenConfig):
    """One training run.

    Attributes:
        level: folder of the reader's data: `text/...`, references as text, `memory/...`, or `know`,
            facts without a reference among references to read.
        steps: updates; 0 leaves the stage out.
        batch_size, sequence_tokens: rows of a batch, and their tokens.
        lr: peak learning rate of the dense part.
        value_lr: that of the value tables, where there are any; None for a recipe's own.
        warmup: updates over which it rises.
        min_ratio: share of it at the stage's end.
        selector, tokens_per_head: which tokens of a reference a memory head keeps, and how many,
            as in `ExplicitMemoryConfig`; not for text levels.
        memory: memory layers to install into the model that the stage before left; later stages
            keep them. With `freeze_base` the stage trains them only.
    """

    level: str = Field(pattern=r"^((text|memory)/[A-Za-z0-9][A-Za-z0-9._-]*|know)$")
    steps: int = Field(ge=0)
    batch_size: PositiveInt
    sequence_tokens: int = Field(ge=2)
    lr: PositiveFloat
    value_lr: PositiveFloat | None = None
    warmup: int = Field(default=0, ge=0)
    min_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    selector: str | None = None
    tokens_per_head: PositiveInt | None = None
    memory: MemoryLayerConfig | None = None

    @property
    def reads_memories(self) -> bool:
        """Whether references are memories here."""
        return not self.level.startswith("text/")

    @model_validator(mode="after")
    def _text_keeps_nothing(self) -> Stage:
        if not self.reads_memories and (self.selector or self.tokens_per_head):
            raise ValueError("selector and tokens_per_head are not for text levels: drop them")
        return self


class ProbeConfig(FrozenConfig):
    """What the reader is asked meanwhile.

    Attributes:
        every: steps between two looks; None looks at a stage's end only.
        questions: the first so many of the validation questions.
        references: how many are given where others stand beside the one that answers.
        ways: which are asked, as `none`, `text_3`, `memory_10`; None for all of `probe`;
            `known` only where there is something to know.
        memory: what references become, whatever the stages make of them; None for what these do.
        answer_tokens: longest answer.
        batch_size: questions asked at once.
    """

    every: PositiveInt | None = 500
    questions: PositiveInt = 200
    references: int = Field(default=5, ge=2, le=64)
    ways: tuple[Way, ...] | None = Field(default=None, min_length=1)
    memory: ExplicitMemoryConfig | None = None
    answer_tokens: PositiveInt = 12
    batch_size: PositiveInt = 25

    @property
    def asked(self) -> tuple[str, ...]:
        """The ways to ask, in order."""
        several = self.references
        every = ("none", "known", "text_1", f"text_{several}", "memory_1", f"memory_{several}")
        return every if self.ways is None else self.ways


class ReaderTraining(FrozenConfig):
    """All stages of the reader.

    Attributes:
        model: the decoder that the first stage begins with.
        memory: its memory layers; None for none, or where a stage brings them.
        common: what the stages' recipes share: keys of a recipe as in `recipes/`, but those that a
            stage says itself.
        probe: what is asked meanwhile.
        find_layer: memories stand in the one layer that answers best with them, which is found once
            the stages before the first memory stage are done (`layers`); nothing is found where
            common.reading.memory.layers says which.
        stages: by name, in order.
    """

    model: ModelConfig
    memory: MemoryLayerConfig | None = None
    common: dict[str, Any] = Field(default_factory=dict)
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    find_layer: bool = False
    stages: dict[Name, Stage]

    @property
    def finds_layer(self) -> bool:
        """Whether the memory layer is to be found."""
        return self.find_layer and self._common("reading.memory.layers") in (None, ...)

    @model_validator(mode="after")
    def _check(self) -> ReaderTraining:
        if not any(stage.steps for stage in self.stages.values()):
            raise ValueError("no stage has steps: give at least one")
        for key in _OF_STAGES:
            if self._common(key) is not ...:
                raise ValueError(f"common.{key}: each stage has its own, or it follows; drop it")
        bringing = [f"stages.{name}" for name, stage in self.stages.items() if _brings(stage)]
        bringing = ["the first model's", *bringing] if self.memory is not None else bringing
        if len(bringing) > 1:
            raise ValueError(
                f"memory: {' and '.join(bringing)} both install memory layers, which happens once: "
                "drop one"
            )
        positions = (self.model.host or {}).get("max_position_embeddings")
        for name, stage in self.stages.items():
            if isinstance(positions, int) and stage.sequence_tokens > positions:
                raise ValueError(
                    f"stages.{name}.sequence_tokens is {stage.sequence_tokens}, "
                    f"model.host.max_position_embeddings {positions}: lower the first or raise "
                    "the second"
                )
        taught = [stage for stage in self.stages.values() if stage.steps]
        if self.finds_layer and taught[0].reads_memories:
            raise ValueError(
                "find_layer: the first stage reads memories already, and what has learnt nothing "
                "looks nothing up: give common.reading.memory.layers, or drop find_layer"
            )
        return self

    def _common(self, key: str) -> Any:
        """What `common` says of a key with dots; an ellipsis for nothing."""
        node: Any = self.common
        for part in key.split("."):
            node = node.get(part, ...) if isinstance(node, Mapping) else ...
        return node


def _brings(stage: Stage) -> bool:
    return stage.steps > 0 and stage.memory is not None


@dataclass(frozen=True)
class Planned:
    """A stage as the run that it is.

    Attributes:
        name: of the stage.
        number: from 1, those without steps not counted.
        recipe: of the run.
        tokens_before: token positions that all stages before it read.
    """

    name: str
    number: int
    recipe: Recipe
    tokens_before: int

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return self.recipe.run_dir

    @property
    def finished(self) -> bool:
        """Whether its model was written."""
        return self.model_dir.is_dir()

    @property
    def model_dir(self) -> Path:
        """Where its model is written."""
        return self.dir / "model"

    @property
    def memory(self) -> ExplicitMemoryConfig | None:
        """What references become; None where they are text."""
        return None if self.recipe.reading is None else self.recipe.reading.memory


def read_stages(path: Path | None = None, overrides: Sequence[str] = ()) -> ReaderTraining:
    """Stages from a file, those that come with strata by default, with `a.b=c` overrides.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    if path is not None:
        return load_config(ReaderTraining, path, overrides)
    with resources.as_file(resources.files(__package__) / "stages.yaml") as own:
        return load_config(ReaderTraining, own, overrides)


def plan_stages(config: ReaderTraining, *, data: Path, out: Path) -> list[Planned]:
    """The runs of all stages that have steps, in order.

    Until the memory layer is found, where it is to be, memories stand where they do by default.

    Args:
        config: what is taught.
        data: a folder of `strata reader data`.
        out: where the runs' folders go.

    Raises:
        ConfigError: a recipe that no run can follow; the line names the stage and the key.
    """
    if config.finds_layer:
        layer = read_layer(out)
        memory = {"layers": None if layer is None else [layer]}
        common = dict(_merged(config.common, {"reading": {"memory": memory}}))
        config = config.model_copy(update={"common": common})
    planned: list[Planned] = []
    tokens = 0
    for name, stage in config.stages.items():
        if not stage.steps:
            continue
        number = len(planned) + 1
        tree = _recipe(config, name, stage, data=data, before=planned[-1] if planned else None)
        tree["run"]["dir"] = str(out.absolute() / f"{number:02d}-{name}")
        recipe = validate(Recipe, tree, origin=f"stage {name}, its recipe")
        planned.append(Planned(name, number, recipe, tokens))
        tokens += stage.steps * recipe.tokens_per_step
    return planned


def memory_of(plan: Sequence[Planned], number: int) -> ExplicitMemoryConfig | None:
    """What references become when stage `number` is asked to read memories.

    A stage whose references are text is asked with what the next memory stage makes of them, or,
    behind all of these, the last one. None where there is no memory stage.
    """
    before = [stage.memory for stage in plan[: number - 1] if stage.memory is not None]
    after = [stage.memory for stage in plan[number - 1 :] if stage.memory is not None]
    return next(iter([*after, *before[::-1]]), None)


def _recipe(
    config: ReaderTraining, name: str, stage: Stage, *, data: Path, before: Planned | None
) -> dict[str, Any]:
    # What the first stage, or an earlier one, installed is in the model that this one opens.
    memory = stage.memory or (config.memory if before is None else None)
    own: dict[str, Any] = {
        "name": f"reader-{name}",
        "model": config.model.model_dump(mode="json"),
        "memory": None if memory is None else memory.model_dump(mode="json"),
        "data": {
            "dir": str(data / stage.level / "tokens"),
            "batch_size": stage.batch_size,
            "sequence_tokens": stage.sequence_tokens,
        },
        "optim": {"lr": stage.lr},
        "schedule": {"warmup_steps": stage.warmup, "min_ratio": stage.min_ratio},
        "run": {"steps": stage.steps},
    }
    if stage.value_lr is not None:
        own["optim"]["value_lr"] = stage.value_lr
    if before is not None:
        own["model"] |= {"host": None, "path": str(before.model_dir)}
    common = dict(config.common)
    if stage.reads_memories:
        kept = {"selector": stage.selector, "tokens_per_head": stage.tokens_per_head}
        own["reading"] = {
            "references": str(data / stage.level / "references"),
            "memory": {key: value for key, value in kept.items() if value is not None},
        }
    else:
        common.pop("reading", None)
    return dict(_merged(common, own))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Two trees as one; where both have a leaf, the upper one's."""
    for key in {**below, **above}:
        low, high = below.get(key), above.get(key, below.get(key))
        if isinstance(low, Mapping) and isinstance(high, Mapping) and key in above:
            yield key, dict(_merged(low, high))
        else:
            yield key, high

"""Teaching the reader: one training run a stage, each from the model that the last one left.

RUN/stages.yaml       the settings of the newest start
RUN/01-NAME/, ...     a training run each, as `strata train` writes it
RUN/probes.jsonl      what was asked meanwhile, see curves.py
RUN/curves.png        the same as a picture
RUN/layer.json        where memories stand, if that was to be found, see layers.py
RUN/data.json         sha256 of the tokenizer and questions that all stages share

A finished stage is skipped, a begun one goes on from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from strata.config import dump_yaml, load_config
from strata.data.manifest import read_manifest
from strata.data.references import read_references
from strata.errors import ConfigError, DataError
from strata.explicit.encode import Encoder
from strata.explicit.host import Host
from strata.files import storage_errors
from strata.models import build, install, load
from strata.reader.curves import PICTURE_NAME, Look, add_look, read_looks, save_curves
from strata.reader.layers import ask_layers, read_layer, write_layer
from strata.reader.probe import Probe
from strata.reader.stages import Planned, ProbeConfig, ReaderTraining, memory_of, plan_stages
from strata.train import Recipe, StepEvent, train
from strata.train.checkpoint import CheckpointFolder
from strata.train.metrics import read_metrics
from strata.train.recipe import MAY_DIFFER_ON_RESUME, RECIPE_NAME, require_same_run
from strata.train.run import require_one_process

STAGES_NAME = "stages.yaml"
DATA_NAME = "data.json"
_LAYER_QUESTIONS = 100
_SHARED = (
    "tokenizer/tokenizer.json",
    "eval/val/questions.jsonl",
    "eval/val/bank/references.jsonl",
)  # fmt: skip

Say = Callable[[str], None]
Measure = Callable[[PreTrainedModel], Mapping[str, float]]


@dataclass(frozen=True)
class ReaderResult:
    """How far the reader is.

    Attributes:
        stage, step: where it stopped.
        stopped_by: `time`, `SIGTERM` or `SIGINT` where stages are left, else None.
        look: the newest one.
        model_dir: the newest finished model.
    """

    stage: str
    step: int
    stopped_by: str | None
    look: Look | None
    model_dir: Path | None


def train_reader(
    data: Path,
    *,
    out: Path,
    config: ReaderTraining,
    for_s: float | None = None,
    say: Say = lambda line: None,
    progress: bool = True,
    measure: Measure | None = None,
) -> ReaderResult:
    """Teach the reader, from wherever an earlier call with the same settings left it.

    Args:
        data: a folder of `strata reader data`.
        out: the folder for all runs.
        config: what is taught.
        for_s: stop after about so many seconds, saved; a look begun is finished first.
        say: told of stages and looks, a line each.
        progress: show progress of each run on stderr.
        measure: gives further numbers of the model at each look; changes nothing of it.

    Raises:
        ConfigError: the settings do not fit each other, or what is in `out` already.
        DataError: the data cannot be used, or is other data than `out` was begun with.
        CheckpointError: a checkpoint is damaged.
        DivergenceError: the loss or a gradient is not finite.
        StorageError: the disk is full.
    """
    require_one_process("strata reader")
    begin_s = time.monotonic()
    plan = plan_stages(config, data=data, out=out)
    shared = shared_files(data)
    tokenizer = _check_data(data, plan)
    _check_model(config, plan, tokenizer)
    probe = Probe(data / "eval" / "val", config.probe, known=data / "eval" / "know")
    if not out.is_dir() and out.exists():
        raise ConfigError(f"{out} is a file: name a folder, new or a reader's own")
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    _require_same_stages(out, plan)
    keep_shared(out, shared, data)
    with storage_errors(out):
        (out / STAGES_NAME).write_text(dump_yaml(config), encoding="utf-8")

    reader = _Reader(plan, out, probe, tokenizer, config.probe, say, measure)
    reader.layer_known = not config.finds_layer or read_layer(out) is not None
    for number in range(len(plan)):
        if not reader.layer_known and plan[number].memory is not None:
            _find_layer(config, plan[number], data=data, out=out, say=say)
            plan = reader.plan = plan_stages(config, data=data, out=out)
            reader.layer_known = True
        stage = plan[number]
        if not stage.finished:
            left_s = None if for_s is None else max(0.0, for_s - (time.monotonic() - begin_s))
            say(f"stage {stage.number}/{len(plan)}, {stage.name}: {_described(stage)}")
            trained = train(
                stage.recipe, on_step=reader.watch(stage), progress=progress, for_s=left_s
            )
            if trained.model_dir is None:
                return reader.result(stage, trained.steps, stopped_by=trained.stopped_by)
        reader.look_at_end(stage)
    return reader.result(plan[-1], plan[-1].recipe.run.steps, stopped_by=None)


def _find_layer(config: ReaderTraining, stage: Planned, *, data: Path, out: Path, say: Say) -> None:
    """Find where the model that a stage begins with looks answers up."""
    assert stage.memory is not None
    ways = ("memory_1", f"memory_{config.probe.references}")
    asked = {"ways": ways, "questions": min(config.probe.questions, _LAYER_QUESTIONS)}
    probe = Probe(data / "eval" / "val", config.probe.model_copy(update=asked))
    model, tokenizer = load(Path(stage.recipe.model.path or ""))
    shares = ask_layers(model, tokenizer, probe, stage.memory)
    layer = write_layer(out, shares)
    alone = ", ".join(f"{way} {share:.1%}" for way, share in shares[layer].items())
    others = [sum(by.values()) / len(by) for name, by in shares.items() if name != layer]
    most = max(others, default=0.0)
    say(f"memories stand in layer {layer}: {alone}; in any other alone {most:.1%} of both at most")


class _Reader:
    """The reader within and between its stages.

    Attributes:
        plan: of all stages.
        layer_known: whether it says where memories stand; nothing is read from them before.
    """

    def __init__(
        self,
        plan: Sequence[Planned],
        out: Path,
        probe: Probe,
        tokenizer: Any,
        config: ProbeConfig,
        say: Say,
        measure: Measure | None,
    ) -> None:
        self.plan, self._out = plan, out
        self.layer_known = True
        self._probe, self._tokenizer = probe, tokenizer
        self._every, self._memory = config.every, config.memory
        self._say, self._measure = say, measure

    def watch(self, stage: Planned) -> Callable[[StepEvent], None]:
        """An observer of a stage's run that looks now and then; not at its end."""

        def on_step(event: StepEvent) -> None:
            due = self._every is not None and event.step % self._every == 0
            if due and event.step < event.num_steps:
                self._look(stage, event.step, event.model, event.record["loss"])

        return on_step

    def look_at_end(self, stage: Planned) -> None:
        """Look at a finished stage's model, unless that was done."""
        steps = stage.recipe.run.steps
        looks = read_looks(self._out)
        if not any((look.number, look.step) >= (stage.number, steps) for look in looks):
            model, _ = load(stage.model_dir)
            records = read_metrics(stage.dir)
            self._look(stage, steps, model, records[-1]["loss"] if records else None)

    def result(self, stage: Planned, step: int, *, stopped_by: str | None) -> ReaderResult:
        """How far all is."""
        finished = [one for one in self.plan if one.finished]
        looks = read_looks(self._out)
        return ReaderResult(
            stage=stage.name,
            step=step,
            stopped_by=stopped_by,
            look=looks[-1] if looks else None,
            model_dir=finished[-1].model_dir if finished else None,
        )

    def _look(self, stage: Planned, step: int, model: PreTrainedModel, loss: float | None) -> None:
        begin_s = time.perf_counter()
        memory = self._memory
        if memory is None and self.layer_known:
            memory = memory_of(self.plan, stage.number)
        answers = self._probe.ask(model, self._tokenizer, memory)
        also = {} if self._measure is None else dict(self._measure(model))
        kept = None if memory is None else Host(model).memory_shape(memory).tokens
        look = Look(
            number=stage.number,
            stage=stage.name,
            step=step,
            tokens=stage.tokens_before + step * stage.recipe.tokens_per_step,
            loss=loss,
            kept=kept,
            exact={way: result.exact for way, result in answers.items()},
            contains={way: result.contains for way, result in answers.items()},
            num_questions=self._probe.num_questions,
            wall_s=round(time.perf_counter() - begin_s, 2),
            also=also,
        )
        add_look(self._out, look)
        save_curves(read_looks(self._out), self._out / PICTURE_NAME)
        shares = ", ".join(f"{way} {share:.1%}" for way, share in look.exact.items())
        self._say(f"{stage.name}, step {step}: {shares} ({look.wall_s:.0f} s)")


def _described(stage: Planned) -> str:
    recipe = stage.recipe
    said = [f"{recipe.run.steps:,} steps of {recipe.tokens_per_step:,} tokens"]
    if recipe.memory is not None:
        layers = ", ".join(map(str, recipe.memory.layers))
        only = "only " if recipe.memory.freeze_base else ""
        said.append(f"trains {only}memory layers installed at {layers}")
    if stage.memory is None:
        said.append("references as text")
    else:
        kept = stage.memory
        tokens = "all" if kept.selector == "all" else f"{kept.tokens_per_head} ({kept.selector})"
        said.append(f"references as memories of {tokens} tokens a head")
    return ", ".join(said)


def _check_data(data: Path, plan: Sequence[Planned]) -> Any:
    """See that every stage has its data before the first one begins; the tokenizer."""
    for stage in plan:
        read_manifest(stage.recipe.data.dir)
        if stage.recipe.reading is not None:
            read_references(stage.recipe.reading.references)
    try:
        return AutoTokenizer.from_pretrained(data / "tokenizer")
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        message = " ".join(str(error).split())[:200]
        raise DataError(f"no tokenizer can be opened in {data / 'tokenizer'}: {message}") from None


def _check_model(config: ReaderTraining, plan: Sequence[Planned], tokenizer: Any) -> None:
    """See that all memories fit the model, before hours go into the first stage."""
    first = plan[0].recipe
    model = build(first.model, first.memory, device="meta")
    if config.probe.memory is not None:
        Encoder(Host(model), tokenizer, config.probe.memory)
    for stage in plan:
        if stage.number > 1 and stage.recipe.memory is not None:
            install(model, stage.recipe.memory)
        if stage.memory is not None:
            Encoder(Host(model), tokenizer, stage.memory)


def _require_same_stages(out: Path, plan: Sequence[Planned]) -> None:
    """Refuse settings under which what is in the folder would have come out otherwise."""
    remedy = "give back the old values, or choose another --out"
    stages = {stage.dir.name: stage for stage in plan}
    for folder in sorted(out.glob("[0-9][0-9]-*")):
        if not (folder / "model").is_dir() and not CheckpointFolder(folder / "checkpoints").steps():
            continue  # nothing was made there that would be lost
        stage = stages.get(folder.name)
        if stage is None:
            raise ConfigError(
                f"{folder} holds a stage that these settings do not have in that place: {remedy}"
            )
        missing = [before for before in plan[: stage.number - 1] if not before.finished]
        if missing:
            raise ConfigError(
                f"{folder} went on from {missing[-1].model_dir}, which is not there: "
                "give that back, or delete both"
            )
        # Where the model lay that a finished stage began with is of no account.
        may_differ = MAY_DIFFER_ON_RESUME | ({"model.path"} if stage.finished else set())
        stored = load_config(Recipe, folder / RECIPE_NAME)
        require_same_run(stored, stage.recipe, may_differ=may_differ, remedy=remedy)


def shared_files(data: Path) -> dict[str, str]:
    """What all stages share: sha256 by file.

    Raises:
        DataError: a file is missing.
    """
    if not data.is_dir():
        raise DataError(f"no reader's data at {data}: make it with strata reader data --out {data}")
    try:
        return {name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in _SHARED}
    except FileNotFoundError as error:
        raise DataError(
            f"no {error.filename}: make the folder with strata reader data --out {data}"
        ) from None


def keep_shared(out: Path, shared: dict[str, str], data: Path) -> None:
    """Write down what all stages share, or refuse other data.

    Raises:
        DataError: `out` was begun with other data.
    """
    path = out / DATA_NAME
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != shared:
            raise DataError(
                f"{out} was begun with another tokenizer or other validation questions than "
                f"{data} holds: give back its --data, or choose another --out"
            )
        return
    with storage_errors(path):
        path.write_text(json.dumps(shared, indent=1) + "\n", encoding="utf-8")

"""How a small decoder learns to read memories, and what each setting of it is worth.

    python benchmarks/reading_study.py --study stages --data DATA --out OUT
    python benchmarks/reading_study.py --study ablations --data DATA --out OUT --model MODEL \\
        --questions FOLDER --prose FILE [--no-train]

DATA is a folder of `strata reader data`, MODEL a model of `strata reader train`. Every arm is a run
of its own in OUT/arms/ARM/seedN. The same command goes on where it was stopped (`--for-minutes`, a
signal; exit status 75, or 130 by Ctrl-C), finished arms are skipped, and tables and pictures of
what is there are written at every end.

**stages**: does it matter what a decoder reads first? Arms see equally many tokens, in parts of
equal length and at the same learning rates; they differ in the level of each part. Memories hold
all tokens.

**ablations**: from one given model on, each arm continues for a few steps with one setting changed,
and is asked with the same setting. `--no-train` changes it for the questions only. The interval
needs texts with other chunks, which are made from the sources of DATA: give the --questions and
--prose that DATA was made from.

`a.b=c` overrides keys of all arms: those of `strata reader train`, as common.run.precision=bf16;
stages are part1, part2, ... or, of an ablation, arm. The arms stand in `reading_arms.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from reading_arms import (
    ABLATIONS,
    NOTES,
    ROWS_OF_STAGES,
    SHAPES,
    TRAINED_ONLY,
    Arm,
    ablation_arms,
    stage_arms,
)
from reading_rows import Rows
from reading_tables import Result, write_ablations, write_stages
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from strata.config import validate
from strata.errors import ConfigError, DataError, StrataError
from strata.explicit.fingerprint import weights_sha256
from strata.explicit.host import Host
from strata.models import ModelConfig, build
from strata.reader.data import make_data
from strata.reader.probe import Probe
from strata.reader.settings import ReaderData
from strata.reader.stages import Planned, ReaderTraining, plan_stages
from strata.reader.train import shared_files, train_reader
from strata.train import Recipe
from strata.train.recipe import MAY_DIFFER_ON_RESUME

GO_ON = 75  # EX_TEMPFAIL: nothing failed, the same command goes on
INTERRUPTED = 130

Measure = Callable[[Any], Mapping[str, float]]

# Of an arm that is only asked these decide nothing.
_OF_TRAINING = ("steps", "lr", "warmup", "min_ratio")


class Study(ABC):
    """Arms, and how each is run and asked.

    Args:
        options: of the command line.

    Attributes:
        arms: all, whatever was asked for, in order.
        model_sha256: of the weights that all begin with; None where they begin with none.
    """

    arms: list[Arm]
    model_sha256: str | None = None

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data, self.out = Path(options.data), Path(options.out)
        if not (self.data / "eval" / "val").is_dir():
            raise DataError(f"no reader's data at {self.data}: make it with strata reader data")

    @abstractmethod
    def measure(self, arm: Arm, seed: int) -> Measure:
        """What is measured of an arm's model beside the probe."""

    @abstractmethod
    def write(self, header: Mapping[str, Any]) -> list[Path]:
        """Tables and pictures of the arms that are done."""

    def chosen(self) -> list[Arm]:
        """The arms that were asked for, each folder once.

        Raises:
            ConfigError: `--only` names something else.
        """
        only = self.options.only
        names = dict.fromkeys(arm.study for arm in self.arms)
        for name in only:
            if name not in {*names, *(arm.name for arm in self.arms)}:
                few = ", ".join(names)
                raise ConfigError(f"--only {name}: give some of {few}, or one arm as layers/all")
        found: dict[str, Arm] = {}
        for arm in self.arms:
            without = self.options.no_train and arm.study in TRAINED_ONLY
            if not without and (not only or {arm.name, arm.study} & set(only)):
                found.setdefault(arm.folder, arm)
        return list(found.values())

    def train(self, arm: Arm, seed: int, *, for_s: float | None) -> str | None:
        """Train and ask an arm, from where it was; what stopped it, None once it is done."""
        folder = self.out / "arms" / arm.folder / f"seed{seed}"
        config, data = arm.config(seed), self.data_of(arm)
        plan = plan_stages(config, data=data, out=folder)
        identity = self._identity(config, data, plan)
        if _is_done(folder, identity):
            return None
        label = f"{arm.name}, seed {seed}"
        taught = train_reader(
            data,
            out=folder,
            config=config,
            for_s=for_s,
            say=lambda line: print(f"{label}: {line}", flush=True),
            progress=False,
            measure=self.measure(arm, seed),
        )
        if taught.stopped_by is not None:
            return taught.stopped_by
        look = taught.look
        assert look is not None
        result = {
            "seed": seed,
            "trained": True,
            "steps": sum(stage.recipe.run.steps for stage in plan),
            "tokens": look.tokens,
            "loss": look.loss,
            "exact": look.exact,
            "contains": look.contains,
            "also": look.also,
            "questions": look.num_questions,
        }
        _write(folder / "result.json", {**result, **identity})
        for stage in plan:  # they are only there to go on with, and three times the model's size
            shutil.rmtree(stage.dir / "checkpoints", ignore_errors=True)
        return None

    def ask(self, arm: Arm) -> None:
        """Ask the given model with the settings of an arm, untrained."""
        folder = self.out / "arms" / arm.folder / "untrained"
        config, data = arm.config(0), self.data_of(arm)
        if arm.folder != "base":  # what is read as text does not change with memories
            ways = tuple(way for way in config.probe.asked if way.startswith("memory"))
            probe = config.probe.model_copy(update={"ways": ways})
            config = config.model_copy(update={"probe": probe})
        plan = plan_stages(config, data=data, out=folder)
        (stage,) = plan
        identity = self._identity(config, data, plan)
        for key in _OF_TRAINING:
            identity["settings"].pop(f"stages.{stage.name}.{key}")
        if _is_done(folder, identity):
            return
        begin_s = time.monotonic()
        model = build(config.model, config.memory).eval()
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        answers = Probe(data / "eval" / "val", config.probe).ask(model, tokenizer, stage.memory)
        exact = {way: result.exact for way, result in answers.items()}
        result = {
            "seed": None,
            "trained": False,
            "steps": 0,
            "tokens": 0,
            "loss": None,
            "exact": exact,
            "contains": {way: result.contains for way, result in answers.items()},
            "also": dict(self.measure(arm, 0)(model)),
            "questions": len(next(iter(answers.values())).answers),
        }
        _write(folder / "result.json", {**result, **identity})
        shares = ", ".join(f"{way} {share:.1%}" for way, share in exact.items())
        wall_s = time.monotonic() - begin_s
        print(f"{arm.name}, untrained: {shares} ({wall_s:.0f} s)", flush=True)

    def results(self) -> list[Result]:
        """Of all arms that are done, in order."""
        found = []
        for arm in self.arms:
            for path in sorted((self.out / "arms" / arm.folder).glob("*/result.json")):
                tree = json.loads(path.read_text(encoding="utf-8"))
                stages = sorted(path.parent.glob("[0-9][0-9]-*"))
                found.append(Result(arm.name, path.parent, tuple(stages), tree))
        return found

    def data_of(self, arm: Arm) -> Path:
        """The folder of an arm's texts; one with other chunks is made if it is not there.

        Raises:
            DataError: it cannot be made, or asks other questions than DATA.
        """
        if not arm.data_keys:
            return self.data
        name = "-".join(f"{key}{value}" for key, value in arm.data_keys.items())
        folder = self.out / "data" / name
        if not (folder / "report.json").exists():
            self._make_data(folder, arm)
        return folder

    def recipe(self, arm: Arm, seed: int, level: str) -> Recipe:
        """That of a run which reads a level as the arm's last stage, or its probe, reads."""
        config = arm.config(seed)
        last = list(config.stages.values())[-1]
        tree = last.model_dump(mode="json")
        if level != last.level:
            rows, tokens = SHAPES[level]
            tree |= {"level": level, "sequence_tokens": tokens}
            tree["batch_size"] = min(rows, last.batch_size)
            memory = config.probe.memory if level.startswith("memory/") else None
            tree["selector"] = memory and memory.selector
            tree["tokens_per_head"] = memory and memory.tokens_per_head
        whole = config.model_dump(mode="json") | {"stages": {"rows": tree}}
        rows_of = validate(ReaderTraining, whole, origin=f"rows of {arm.name}")
        return plan_stages(rows_of, data=self.data_of(arm), out=self.out)[0].recipe

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """The settings of DATA."""
        for name in ("made_from.yaml", "data.yaml"):
            if (self.data / name).is_file():
                tree = yaml.safe_load((self.data / name).read_text(encoding="utf-8"))
                return dict(tree.get("settings", tree))
        raise DataError(
            f"{self.data} does not say what it was made from: make it with strata reader data"
        )

    def _make_data(self, folder: Path, arm: Arm) -> None:
        tree = json.loads(json.dumps(self.made_with))
        (stage,) = arm.tree["stages"].values()
        tokens = stage["steps"] * stage["batch_size"] * stage["sequence_tokens"]
        for kind in ("text", "memory"):
            for name, level in tree[kind].items():
                same = f"{kind}/{name}" == stage["level"]
                level["tokens"] = min(level["tokens"], 2 * tokens) if same else 0
        print(f"{arm.name}: texts with other chunks, once, in {folder}", flush=True)
        make_data(
            self.options.questions,
            self.options.prose,
            out=folder,
            config=validate(ReaderData, tree | dict(arm.data_keys), origin=f"texts of {arm.name}"),
            tokenizer=self.data / "tokenizer",
            say=lambda line: print(f"{arm.name}: {line}", flush=True),
        )
        made = shared_files(folder)
        for name, sha256 in shared_files(self.data).items():
            if made[name] != sha256:
                (folder / "report.json").unlink()
                raise DataError(
                    f"{folder / name} came out otherwise than that of {self.data}: delete {folder} "
                    "and give the --questions and --prose that DATA was made from"
                )

    def _identity(
        self, config: ReaderTraining, data: Path, plan: Sequence[Planned]
    ) -> dict[str, Any]:
        """What decides an arm's numbers."""
        skip = MAY_DIFFER_ON_RESUME | {f"common.{key}" for key in MAY_DIFFER_ON_RESUME}
        skip |= {"model.path", "probe.batch_size"}
        settings = _leaves(config.model_dump(mode="json"))
        return {
            "settings": {key: value for key, value in settings if key not in skip},
            "rows": self.options.rows,
            "model_sha256": self.model_sha256,
            "data_sha256": data_sha256(data, {_level_of(stage) for stage in plan}),
        }


class Stages(Study):
    """Memories from the first step, after text, or never."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.arms = stage_arms(tokens=options.tokens, overrides=options.overrides)

    def measure(self, arm: Arm, seed: int) -> Measure:
        text, memory = (
            Rows(self.recipe(arm, seed, ROWS_OF_STAGES[kind]), rows=self.options.rows)
            for kind in ("text", "memory")
        )
        return lambda model: (
            _named("text", text.measure(model))
            | _named("memory", memory.measure(model))
            | _named("unread", memory.measure(model, reads=False))
        )

    def write(self, header: Mapping[str, Any]) -> list[Path]:
        return write_stages(self.out, header, self.results())


class Ablations(Study):
    """One setting changed at a time, from a given model on."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        if options.model is None:
            raise ConfigError("--study ablations needs --model: a model of strata reader train")
        levels = [level for level in SHAPES if level.startswith("memory/")]
        if options.level not in levels:
            raise ConfigError(f"--level {options.level}: give one of {', '.join(levels)}")
        model = build(ModelConfig(path=str(options.model)), None)
        self.model_sha256 = weights_sha256(model)
        self.arms = ablation_arms(
            model=options.model,
            num_layers=Host(model).num_layers,
            level=options.level,
            steps=options.steps,
            lr=options.lr,
            made_with=self.made_with,
            overrides=options.overrides,
        )

    def measure(self, arm: Arm, seed: int) -> Measure:
        level = next(iter(arm.tree["stages"].values()))["level"]
        rows = Rows(self.recipe(arm, seed, level), rows=self.options.rows)
        return lambda model: (
            _named("rows", rows.measure(model)) | _named("unread", rows.measure(model, reads=False))
        )

    def write(self, header: Mapping[str, Any]) -> list[Path]:
        return write_ablations(self.out, header, self.results(), ABLATIONS, NOTES)


def data_sha256(data: Path, levels: set[str]) -> str:
    """Of the tokenizer, the questions and the manifests of some levels, which hash the rest."""
    names = [f"{level}/tokens/manifest.json" for level in sorted(levels)]
    names += [f"{x}/references/manifest.json" for x in sorted(levels) if x.startswith("memory/")]
    digests = shared_files(data) | {name: _sha256(data / name) for name in names}
    whole = "\n".join(f"{name} {sha256}" for name, sha256 in digests.items())
    return hashlib.sha256(whole.encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise DataError(f"no {path}: make the folder with strata reader data") from None


def _is_done(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether an arm has its result.

    Raises:
        ConfigError: it was begun with other settings.
    """
    path = folder / "arm.json"
    if not path.exists():
        _write(path, identity)
    before, now = (dict(_leaves(tree)) for tree in (json.loads(path.read_text()), identity))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} was begun with {key} {before.get(key)!r}, now it is {now.get(key)!r}: "
                "give back the old value, or choose another --out"
            )
    return (folder / "result.json").exists()


def _level_of(stage: Planned) -> str:
    folder = stage.recipe.data.dir.parent
    return f"{folder.parent.name}/{folder.name}"


def _named(prefix: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": number for name, number in numbers.items()}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def run(options: argparse.Namespace) -> int:
    """Run what is left of the arms that were asked for; the exit status."""
    study: Study = {"stages": Stages, "ablations": Ablations}[options.study](options)
    arms = study.chosen()
    for arm in arms:  # what is wrong with one is said before the first begins
        plan = plan_stages(arm.config(0), data=study.data, out=study.out)
    if plan[0].recipe.run.threads is not None:
        torch.set_num_threads(plan[0].recipe.run.threads)
    begin_s = time.monotonic()
    stopped: str | None = None
    seeds = [None] if options.no_train else options.seeds
    for seed, arm in [(seed, arm) for seed in seeds for arm in arms]:
        left_s = None
        if options.for_minutes is not None:
            left_s = 60 * options.for_minutes - (time.monotonic() - begin_s)
        if left_s is not None and left_s <= 0:
            stopped = "time"
        elif seed is None:
            study.ask(arm)
        else:
            stopped = study.train(arm, seed, for_s=left_s)
        if stopped is not None:
            break
    print("\n".join(f"wrote {path}" for path in study.write(_header(study))))
    if stopped is None:
        return 0
    print(f"{stopped}: stopped, run the same command to go on")
    return INTERRUPTED if stopped == "SIGINT" else GO_ON


def _header(study: Study) -> dict[str, Any]:
    """What the results are of; commands are kept from one call to the next."""
    path = study.out / "commands.txt"
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    command = shlex.join(["python", "benchmarks/reading_study.py", *study.options.command])
    commands = list(dict.fromkeys([*before, command]))
    study.out.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(commands) + "\n", encoding="utf-8")
    return {
        "study": study.options.study,
        "commands": commands,
        "model_sha256": study.model_sha256,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: a number that is not allowed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", choices=["stages", "ablations"], required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="that all ablations begin with")
    parser.add_argument("--level", default="memory/level3", help="of the ablations' texts")
    parser.add_argument("--steps", type=int, default=300, help="of an ablation")
    parser.add_argument("--lr", type=float, default=3e-4, help="of an ablation, at most")
    parser.add_argument("--tokens", type=int, default=24_000_000, help="of a stages arm")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="some ablations or arms, with commas")
    parser.add_argument("--no-train", action="store_true", help="change what is asked only")
    parser.add_argument("--rows", type=int, default=32, help="validation rows at a look")
    parser.add_argument("--for-minutes", type=float)
    parser.add_argument("--questions", type=Path, help="of DATA, for other chunks")
    parser.add_argument("--prose", type=Path, action="append", default=[], help="the same")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args(arguments)
    for name in ("steps", "tokens", "rows", "lr", "for_minutes"):
        given = getattr(options, name)
        if given is not None and not 0 < given < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {given}: give more than 0")
    if options.no_train and options.study == "stages":
        raise ConfigError("--no-train is for ablations: stages are about training")
    try:
        options.seeds = list(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    except ValueError:
        raise ConfigError(f"--seeds {options.seeds}: give numbers with commas, as 0,1,2") from None
    options.only = [name for name in options.only.split(",") if name]
    options.command = list(arguments)
    return options


def main() -> None:
    """Run the command line; wrong input is one line."""
    transformers_logging.disable_progress_bar()
    try:
        code = run(parse(sys.argv[1:]))
    except StrataError as error:
        print(f"reading_study: error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted, run the same command to go on", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()

"""How many bits of knowledge a model learns: dense, MoE, PEER, memory layers and Memory+.

    python benchmarks/capacity_study.py --out OUT            all of it, some hours on two cores
    python benchmarks/capacity_study.py --out OUT --quick    a quarter of an hour

Every arm is told of the same made-up people (`strata.data.facts.biographies`) equally often, with
equal active FLOPs but where its name says otherwise, and is then asked every fact in a wording that
the fact never had. What counts are bits (`strata.evals.learned_bits`). The seed draws people,
weights and order. Each run lies in OUT/arms/ARM/seedN and its numbers in its `result.json`.

The same command goes on where it was stopped (`--for-minutes`, a signal; exit status 75, or 130 by
Ctrl-C): finished runs are skipped, one under way goes on from its checkpoint. Tables and pictures
of what is there are written at every end. Runs go by seed, so that the first of three seeds is
whole before the second begins.

`a.b=c` overrides keys of `CapacityConfig`. Arms and what is compared with what stand in
`capacity_arms.py`, how long they take in docs/capacity.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from capacity_arms import ARMS, QUICK, SEQUENCE_TOKENS, STUDIES, Arm, Shape
from capacity_tables import Result, write_results
from pydantic import Field
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from strata.cli.allocator import keep_freed_memory
from strata.config import FrozenConfig, apply_override, validate
from strata.data import Loader, PrepareConfig, TokenDataset, read_manifest
from strata.data.facts.biographies import (
    NUM_TOLD,
    Biographies,
    save_word_tokenizer,
    vocabulary,
)
from strata.data.prepare import prepare
from strata.errors import GO_ON, ConfigError, DivergenceError, StrataError
from strata.evals.learned_bits import ask_people
from strata.models import load
from strata.train import Recipe, train
from strata.train.recipe import MAY_DIFFER_ON_RESUME, DataConfig

INTERRUPTED = 130
GRACE_S = 60.0  # for runs to save themselves once they are told to stop


class CapacityConfig(FrozenConfig):
    """What all arms have in common.

    Attributes:
        shape: of the models.
        people: how many there are to know.
        name_words: first (middle) and last names.
        batch_size: rows of 64 tokens in a step.
        lr: of the dense part.
        value_lr: of the value tables, by row-wise Adagrad; arms with another rule have their own.
        warmup: share of the steps.
        asked: people asked about, evenly spread; None asks about all.
        precision: as in `RunConfig`.
        checkpoint_every: steps.
    """

    shape: Shape = Field(default_factory=Shape)
    people: int = Field(default=4000, ge=1)
    name_words: tuple[int, ...] = (100, 200)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    value_lr: float = Field(default=0.02, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    asked: int | None = Field(default=None, ge=1)
    precision: str = "bf16"
    checkpoint_every: int = Field(default=500, ge=1)


QUICK_CONFIG = CapacityConfig(people=2400)


def people_of(config: CapacityConfig, seed: int) -> Biographies:
    """Those that all arms of a seed are told of."""
    return Biographies(config.people, seed=seed, name_words=config.name_words)


def make_data(folder: Path, people: Biographies) -> Path:
    """The people's statements as tokens, made once; the folder of tokens."""
    tokens = folder / "tokens"
    if (folder / "done").exists():
        return tokens
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "told.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(said)) + "\n" for said in people.statements())
    save_word_tokenizer(folder / "tokenizer", name_words=people.name_words)
    prepare(
        [folder / "told.jsonl"],
        out=tokens,
        tokenizer=folder / "tokenizer",
        config=PrepareConfig(memory_gb=1.0, seed=people.seed, append_eos=False),
    )
    (folder / "told.jsonl").unlink()
    (folder / "done").touch()
    return tokens


def recipe_of(arm: Arm, config: CapacityConfig, seed: int, *, tokens: Path, out: Path) -> Recipe:
    """The run of an arm.

    Raises:
        ConfigError: a setting is not allowed, or the arm cannot have the FLOPs asked for.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokens.parent / "tokenizer")
    model, _ = arm.sized(config.shape, len(tokenizer))
    data = {
        "dir": str(tokens),
        "batch_size": config.batch_size,
        "sequence_tokens": SEQUENCE_TOKENS,
        "packing": "document",
        "document_mask": True,
    }
    memory = arm.memory_config(config.shape)
    steps = num_steps(tokens, data, seed=seed, exposures=arm.exposures)
    tree = {
        "name": arm.name,
        "seed": seed,
        "model": model.model_dump(mode="json"),
        "memory": None if memory is None else memory.model_dump(mode="json"),
        "data": data,
        "optim": {"lr": config.lr, "value_lr": config.value_lr, **arm.optim},
        "schedule": {"kind": "linear", "warmup_steps": round(config.warmup * steps)},
        "run": {
            "dir": str(out),
            "steps": steps,
            "precision": config.precision,
            "device": "cpu",
            "threads": 1,
            "log_every": 50,
            "health_every": None,
            "checkpoint_every": config.checkpoint_every,
            "keep_checkpoints": 1,
        },
    }
    return validate(Recipe, tree, origin=f"arm {arm.name}")


def num_steps(tokens: Path, data: Mapping[str, Any], *, seed: int, exposures: int) -> int:
    """Steps in which each fact is told so often: an epoch tells it in `NUM_TOLD` wordings."""
    dataset = TokenDataset.open(tokens, split="train")
    rows = Loader(dataset, DataConfig(**data).loader_config(seed=seed)).num_rows
    return max(1, math.ceil(rows * exposures / NUM_TOLD / data["batch_size"]))


def run_arm(
    arm: Arm, config: CapacityConfig, seed: int, *, out: Path, for_s: float | None = None
) -> str | None:
    """Train and ask an arm, from where it was; what stopped it, None once it is done.

    Raises:
        StrataError: a setting is wrong, or the run was begun with others.
    """
    folder, people = run_folder(out, arm, seed), people_of(config, seed)
    recipe, identity = planned(arm, config, seed, out=out)
    if is_done(folder, identity):
        return None
    begin_s = time.monotonic()
    trained = train(recipe, progress=False, for_s=for_s)
    if trained.model_dir is None:
        return trained.stopped_by
    model, tokenizer = load(trained.model_dir)
    bits = ask_people(model, people, tokenizer=tokenizer, max_asked=config.asked)
    _, counts = arm.sized(config.shape, len(tokenizer))
    tree = {
        "arm": arm.name,
        "seed": seed,
        "exposures": arm.exposures,
        "bits": bits.total,
        "share": bits.share,
        "bits_a_person": dict(bits.by_part),
        "people": bits.num_people,
        "asked": bits.num_asked,
        "loss": trained.loss,
        "steps": trained.steps,
        "tokens": trained.steps * recipe.tokens_per_step,
        "train_s": trained.wall_s,
        "last_call_s": time.monotonic() - begin_s,
        "tokens_per_s": trained.tokens_per_s,
        "counts": counts.as_dict(),
        "num_rows": 0 if recipe.memory is None else recipe.memory.num_rows,
        **identity,
    }
    write_json(folder / "result.json", tree)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "run" / "model", ignore_errors=True)  # 70 MB with most rows
    return None


def planned(
    arm: Arm, config: CapacityConfig, seed: int, *, out: Path
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run, its data made if need be, and what decides the run's numbers."""
    tokens = make_data(data_folder(out, config, seed), people_of(config, seed))
    folder = run_folder(out, arm, seed)
    recipe = recipe_of(arm, config, seed, tokens=tokens, out=folder / "run")
    return recipe, identity_of(recipe, config, tokens)


def data_folder(out: Path, config: CapacityConfig, seed: int) -> Path:
    """Where the tokens of a seed's people lie."""
    names = "x".join(map(str, config.name_words))
    return out / "data" / f"seed{seed}-{config.people}-{names}"


def run_folder(out: Path, arm: Arm, seed: int) -> Path:
    """Where a run lies."""
    return out / "arms" / arm.name / f"seed{seed}"


def identity_of(recipe: Recipe, config: CapacityConfig, tokens: Path) -> dict[str, Any]:
    """What decides a run's numbers."""
    leaves = _leaves(recipe.model_dump(mode="json"))
    settings = {key: value for key, value in leaves.items() if key not in MAY_DIFFER_ON_RESUME}
    told = read_manifest(tokens).splits["train"].model_dump_json()  # it hashes all tokens
    return {
        "settings": settings | {"asked": config.asked},
        "data_sha256": hashlib.sha256(told.encode()).hexdigest(),
    }


def is_done(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a run has its result.

    Raises:
        ConfigError: it was begun with other settings.
    """
    path = folder / "arm.json"
    if not path.exists():
        write_json(path, identity)
    before, now = (_leaves(tree) for tree in (json.loads(path.read_text()), identity))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} was begun with {key} {before.get(key)!r}, now it is {now.get(key)!r}: "
                "give back the old value, or choose another --out"
            )
    return (folder / "result.json").exists()


def results(out: Path) -> list[Result]:
    """Of all runs that are done, by arm and seed."""
    found = []
    for arm in ARMS.values():
        for path in sorted((out / "arms" / arm.name).glob("seed*/result.json")):
            found.append(Result.of(json.loads(path.read_text(encoding="utf-8"))))
    return found


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


# The command


class Stop:
    """Remembers the signal that asked the study to stop, and hands it on to runs under way."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.children: list[subprocess.Popen[bytes]] = []
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.end_children()

    def end_children(self) -> None:
        """Let runs save themselves; those that do not are killed."""
        for child in self.children:
            child.terminate()
        until_s = time.monotonic() + GRACE_S
        for child in self.children:
            try:
                child.wait(timeout=max(0.1, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self.children = []

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
        for child in self.children:
            child.terminate()


def run(options: argparse.Namespace) -> int:
    """Run what is left of the arms that were asked for; the exit status."""
    vocab_size = 4 + len(vocabulary(options.config.name_words))
    for arm in options.arms:  # what is wrong with one is said before the first begins
        arm.sized(options.config.shape, vocab_size)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [(arm, seed) for seed in options.seeds for arm in by_cost(options, vocab_size)]
    do = run_here if options.workers == 1 else run_beside
    stopped, failed = do(runs, options)
    if not options.no_tables:
        written = write_results(options.out, header_of(options), results(options.out))
        print("\n".join(f"wrote {path}" for path in written))
    if stopped is not None:
        print(f"{stopped}: stopped, run the same command to go on", flush=True)
        return INTERRUPTED if stopped == "SIGINT" else GO_ON
    for name in failed:
        print(f"capacity_study: {name} failed, its error stands above", file=sys.stderr)
    return 1 if failed else 0


Runs = Sequence[tuple[Arm, int]]
Ended = tuple[str | None, list[str]]  # what stopped it, and which runs failed


def by_cost(options: argparse.Namespace, vocab_size: int) -> list[Arm]:
    """The longest first, so that two workers end together."""

    def cost(arm: Arm) -> float:
        _, counts = arm.sized(options.config.shape, vocab_size)
        return arm.exposures * counts.flops_per_token

    return sorted(options.arms, key=cost, reverse=True)


def run_here(runs: Runs, options: argparse.Namespace) -> Ended:
    """One after the other, in this process."""
    failed = []
    for arm, seed in runs:
        left_s = options.left_s()
        if left_s is not None and left_s <= 0:
            return "time", failed
        try:
            stopped = run_arm(arm, options.config, seed, out=options.out, for_s=left_s)
        except DivergenceError as error:
            print(f"capacity_study: error: {error}", file=sys.stderr)
            failed.append(label_of(arm, seed))
            continue
        if stopped is not None:
            return stopped, failed
        say_result(arm, seed, options.out)
    return None, failed


def run_beside(runs: Runs, options: argparse.Namespace) -> Ended:
    """Several at once, each in a process of one thread."""
    waiting, failed = list(runs), []
    under_way: dict[subprocess.Popen[bytes], str] = {}
    with Stop() as stop:
        while waiting or under_way:
            left_s = options.left_s()
            if left_s is not None and left_s <= 0 and stop.reason is None:
                stop.reason = "time"
            while waiting and len(under_way) < options.workers and stop.reason is None:
                arm, seed = waiting.pop(0)
                # Here, so that no two runs make the data of a seed, and other settings are refused
                # before hours are spent.
                _, identity = planned(arm, options.config, seed, out=options.out)
                if is_done(run_folder(options.out, arm, seed), identity):
                    continue
                child = subprocess.Popen(child_command(arm, seed, options), env=child_environment())
                under_way[child] = label_of(arm, seed)
                stop.children.append(child)
            if stop.reason is not None:
                break
            time.sleep(0.2)
            for child in [child for child in under_way if child.poll() is not None]:
                name = under_way.pop(child)
                stop.children.remove(child)
                if child.returncode == GO_ON and left_s is not None:
                    stop.reason = "time"
                elif child.returncode != 0:
                    failed.append(name)
    return stop.reason, failed


def child_command(arm: Arm, seed: int, options: argparse.Namespace) -> list[str]:
    """This script for one run."""
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out)]
    command += ["--only", arm.name, "--seeds", str(seed), "--workers", "1", "--no-tables"]
    left_s = options.left_s()
    if left_s is not None:
        command += ["--for-minutes", str(max(left_s, 1.0) / 60)]
    return [*command, *(["--quick"] if options.quick else []), *options.overrides]


def child_environment() -> dict[str, str]:
    """One thread each: more would wait for one another on the same cores."""
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    return {**os.environ, **one, "TOKENIZERS_PARALLELISM": "false"}


def label_of(arm: Arm, seed: int) -> str:
    """A run in words."""
    return f"{arm.name}, seed {seed}"


def say_result(arm: Arm, seed: int, out: Path) -> None:
    """A line for a run that is done."""
    tree = json.loads((run_folder(out, arm, seed) / "result.json").read_text(encoding="utf-8"))
    print(
        f"{label_of(arm, seed)}: {tree['bits']:,.0f} bits, {tree['share']:.1%} "
        f"({tree['train_s']:.0f} s)",
        flush=True,
    )


def header_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the results are of; commands are kept from one call to the next."""
    path = options.out / "commands.txt"
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    command = shlex.join(["python", "benchmarks/capacity_study.py", *options.command])
    commands = list(dict.fromkeys([*before, command]))
    path.write_text("\n".join(commands) + "\n", encoding="utf-8")
    people = people_of(options.config, 0)
    settings = {key: str(value) for key, value in options.config.model_dump().items()}
    settings["bits to know"] = f"{people.num_people * people.bits_per_person:,.0f}"
    return {"commands": commands, "settings": settings, "torch": torch.__version__}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: an arm, a number or a key that there is not.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few arms, few people, one seed")
    parser.add_argument("--seeds", help="0,1,2 unless given; 0 with --quick")
    parser.add_argument("--only", default="", help="some studies or arms, with commas")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--for-minutes", type=float)
    parser.add_argument("--no-tables", action="store_true", help="leave tables to another call")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args(arguments)
    options.command = list(arguments)
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: give 1 or more")
    if options.for_minutes is not None and not 0 < options.for_minutes < float("inf"):
        raise ConfigError(f"--for-minutes {options.for_minutes}: give more than 0")
    seeds = options.seeds if options.seeds is not None else ("0" if options.quick else "0,1,2")
    try:
        options.seeds = list(dict.fromkeys(int(seed) for seed in seeds.split(",")))
    except ValueError:
        raise ConfigError(f"--seeds {seeds}: give numbers with commas, as 0,1,2") from None
    options.arms = chosen([name for name in options.only.split(",") if name], quick=options.quick)
    tree = (QUICK_CONFIG if options.quick else CapacityConfig()).model_dump(mode="json")
    for override in options.overrides:
        apply_override(tree, override)
    options.config = validate(CapacityConfig, tree, origin="settings of the study")
    begin_s = time.monotonic()

    def left_s() -> float | None:
        if options.for_minutes is None:
            return None
        return 60 * options.for_minutes - (time.monotonic() - begin_s)

    options.left_s = left_s
    return options


def chosen(only: Sequence[str], *, quick: bool) -> list[Arm]:
    """The arms that were asked for, by arm or by study.

    Raises:
        ConfigError: there is no such arm or study.
    """
    if not only:
        return [ARMS[name] for name in (QUICK if quick else ARMS)]
    names: dict[str, None] = {}
    for name in only:
        if name in ARMS:
            names[name] = None
        elif name in STUDIES:
            names |= dict.fromkeys(STUDIES[name].values())
        else:
            raise ConfigError(
                f"--only {name}: give some of {', '.join(STUDIES)}, or arms: {', '.join(ARMS)}"
            )
    return [ARMS[name] for name in names]


def main() -> None:
    """Run the command line; wrong input is one line."""
    transformers_logging.disable_progress_bar()
    keep_freed_memory()
    try:
        code = run(parse(sys.argv[1:]))
    except StrataError as error:
        print(f"capacity_study: error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted, run the same command to go on", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()

"""The quickstart, read top to bottom: facts, tokens, two models, one comparison.

Two small decoders see the same sentences about the world's countries in the same order. One has
memory layers, its dense twin has feed-forward networks of the same cost. Both are then asked
every fact in a wording that the fact never had in training.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from strata.config import dump_yaml, load_config, validate
from strata.data.facts.factbook import Statement, load_facts, question, training_statements
from strata.data.prepare import PrepareConfig, prepare
from strata.data.tokenizer import train_tokenizer
from strata.evals.questions import Question
from strata.evals.recall import recall
from strata.models import count, load
from strata.quickstart.answers import pick_examples, written_answers
from strata.quickstart.report import Contestant, Outcome, Point, print_report, save_plot, write_json
from strata.train import StepEvent, train
from strata.train.recipe import Recipe

KINDS = ("dense", "memory")  # the order of training
NUM_PROBES = 10  # looks at recall during training, for the plot
BATCH_SIZE = 128  # questions asked at once


def quickstart(
    out: str | Path = "runs/quickstart",
    *,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Outcome:
    """Train both models, ask them, and write tables, plot and `report.json` into a folder.

    An interrupted quickstart goes on where it was; a finished one starts over.

    Args:
        out: the folder for everything that is made.
        overrides: `a.b=c` for the recipe of both models, for instance `run.steps=400`.
        console: where to print; the terminal by default.

    Returns:
        What was measured, also written to `out/report.json`.

    Raises:
        StrataError: an override is wrong, or something in the folder cannot be used.
    """
    console = console or Console()
    out = Path(out)
    start_s = time.perf_counter()
    if (out / "report.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    recipe = read_recipe(out, overrides)

    console.rule("1/4  Facts about the world's countries")
    tokenizer, questions = make_tokens(out, recipe)
    console.print(
        f"{len(questions):,} facts from the CIA World Factbook, each told in four wordings and "
        f"asked in a fifth that it never had in training, such as\n  [italic]{questions[0].prompt}"
    )
    contestants = {}
    for number, kind in enumerate(KINDS, start=2):
        console.rule(f"{number}/4  Training the {kind} model")
        contestants[kind] = compete(kind, recipe, out, questions, tokenizer, console)

    console.rule("4/4  The same questions to both")
    outcome = Outcome(
        **contestants,
        examples=written_answers(pick_examples(questions), out, KINDS),
        num_questions=len(questions),
        wall_s=time.perf_counter() - start_s,
        threads=torch.get_num_threads(),
        precision=recipe.run.precision,
    )
    save_plot(outcome, out / "recall.png")
    print_report(outcome, out, console)
    write_json(outcome, out / "report.json")
    return outcome


def read_recipe(out: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of the memory model; a run under way keeps the one it was started with."""
    with resources.as_file(resources.files(__package__) / "recipe.yaml") as path:
        recipe = load_config(Recipe, path, [f"data.dir={out / 'tokens'}", *overrides])
    if not any(override.startswith("run.precision") for override in overrides):
        recipe = _override(recipe, run={"precision": faster_precision()})
    kept = out / "recipe.yaml"
    if kept.exists() and not overrides:
        return load_config(Recipe, kept)
    kept.write_text(dump_yaml(recipe), encoding="utf-8")
    return recipe


def make_tokens(out: Path, recipe: Recipe) -> tuple[PreTrainedTokenizerBase, list[Question]]:
    """Write the facts as sentences, train a tokenizer on them, and tokenise them."""
    facts = load_facts()
    asked = [question(fact) for fact in facts]
    _write_lines(out / "train.jsonl", training_statements(facts))
    _write_lines(out / "questions.jsonl", asked)
    assert recipe.model.host is not None
    if not (out / "tokenizer").exists():
        train_tokenizer(
            [out / "train.jsonl"],
            out=out / "tokenizer",
            vocab_size=recipe.model.host["vocab_size"],
        )
    config = PrepareConfig(memory_gb=1.0, seed=recipe.seed)
    prepare([out / "train.jsonl"], out=recipe.data.dir, tokenizer=out / "tokenizer", config=config)
    questions = [
        Question(
            id=f"{fact.relation} of {fact.country}",
            prompt=statement.prompt,
            answers=(fact.answer,),
            completions=(statement.completion,),
        )
        for fact, statement in zip(facts, asked, strict=True)
    ]
    return AutoTokenizer.from_pretrained(out / "tokenizer"), questions


def compete(
    kind: str,
    recipe: Recipe,
    out: Path,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> Contestant:
    """Train one of the two models, looking at its recall now and then, and ask it everything."""
    changes = {"memory": None} if kind == "dense" else {}
    recipe = _override(recipe, name=kind, run={"dir": str(out / kind)}, **changes)
    curve = Curve(out / f"{kind}-curve.jsonl")

    def probe(event: StepEvent) -> None:
        if event.step % max(1, event.num_steps // NUM_PROBES) and event.step != event.num_steps:
            return
        seen = recall(event.model, questions, tokenizer=tokenizer, batch_size=BATCH_SIZE)
        curve.add(Point(step=event.step, loss=event.record["loss"], recall=seen.exact))
        console.print(f"  step {event.step:>4}  recall {seen.exact:6.1%}", highlight=False)

    trained = train(recipe, on_step=probe)
    if trained.model_dir is None:
        raise KeyboardInterrupt
    model, tokenizer = load(trained.model_dir)
    return Contestant(
        kind=kind,
        steps=trained.steps,
        tokens_per_s=trained.tokens_per_s or 0.0,
        counts=count(model, sequence_tokens=recipe.data.sequence_tokens),
        recall=recall(model, questions, tokenizer=tokenizer, batch_size=BATCH_SIZE),
        curve=curve.points(),
    )


class Curve:
    """Recall over steps, kept in a file so that an interrupted run does not lose it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, point: Point) -> None:
        """Append a point; points a resumed run passes again are replaced."""
        points = [kept for kept in self.points() if kept.step < point.step]
        lines = [json.dumps(vars(p)) + "\n" for p in [*points, point]]
        self.path.write_text("".join(lines), encoding="utf-8")

    def points(self) -> list[Point]:
        """All points so far, by step."""
        if not self.path.exists():
            return []
        return [Point(**json.loads(line)) for line in self.path.read_text("utf-8").splitlines()]


def faster_precision() -> str:
    """bf16 where this machine multiplies it faster than fp32, measured; old CPUs emulate it."""
    if torch.cuda.is_available():
        return "bf16"
    wide = torch.randn(2048, 512)
    half = wide.bfloat16()
    times_s = {"fp32": [], "bf16": []}  # type: dict[str, list[float]]
    for _ in range(5):
        for name, matrix in (("fp32", wide), ("bf16", half)):
            start_s = time.perf_counter()
            matrix @ matrix.T
            times_s[name].append(time.perf_counter() - start_s)
    return min(times_s, key=lambda name: sorted(times_s[name])[2])


def _override(recipe: Recipe, **changes: object) -> Recipe:
    tree = recipe.model_dump(mode="json")
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree[key], dict):
            tree[key].update(value)
        else:
            tree[key] = value
    return validate(Recipe, tree, origin="quickstart recipe")


def _write_lines(path: Path, statements: Sequence[Statement]) -> None:
    lines = [json.dumps(vars(s), ensure_ascii=False) + "\n" for s in statements]
    path.write_text("".join(lines), encoding="utf-8")

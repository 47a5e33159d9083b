"""The quickstart, read top to bottom: facts, tokens, two models, one comparison.

Two small decoders see the same sentences about the world's countries in the same order. One has
memory layers, its dense twin has feed-forward networks of the same cost. Both are then asked
every fact in a wording that the fact never had in training. Last, articles become a bank of
explicit memories, and a reader, a third decoder that comes trained, is asked with it about
countries that it was taught nothing of.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from strata.config import dump_yaml, load_config, validate
from strata.data.facts.factbook import load_facts, question, training_statements
from strata.data.prepare import PrepareConfig, prepare
from strata.data.tokenizer import train_tokenizer
from strata.evals.questions import Question
from strata.evals.recall import RecallResult, recall
from strata.models import count, load
from strata.quickstart.answers import pick_examples, written_answers
from strata.quickstart.bank import answer_from_bank
from strata.quickstart.decoder import PACKED
from strata.quickstart.report import (
    Contestant,
    Outcome,
    answers,
    comparison,
    print_end,
    save_plot,
    write_json,
)
from strata.quickstart.watch import Watch
from strata.train import train
from strata.train.recipe import Recipe

KINDS = ("dense", "memory")  # the order of training
BATCH_SIZE = 128  # questions asked at once


def quickstart(
    out: str | Path = "runs/quickstart",
    *,
    overrides: Sequence[str] = (),
    reader: Path | None = None,
    console: Console | None = None,
) -> Outcome:
    """Train both models, ask them, and write tables, plot and `report.json` into a folder.

    An interrupted quickstart goes on where it was; a finished one starts over.

    Args:
        out: the folder for everything that is made.
        overrides: `a.b=c` for the recipe of both models, for instance `run.steps=400`.
        reader: folder of the decoder that the bank is for; None for the one that comes with strata.
        console: where to print; the terminal by default.

    Returns:
        What was measured, also written to `out/report.json`.

    Raises:
        StrataError: an override is wrong, or something in the folder cannot be used.
    """
    console = console or Console()
    start_s = time.perf_counter()
    out = fresh_folder(Path(out))
    recipe = read_recipe(out, overrides)

    console.rule("1/5  Facts about the world's countries")
    tokenizer, questions = make_tokens(out, recipe)
    console.print(
        f"{len(questions):,} facts from the CIA World Factbook, each told in four wordings and "
        f"asked in a fifth that it never had in training, such as\n  [italic]{questions[0].prompt}"
    )
    contestants = {}
    for number, kind in enumerate(KINDS, start=2):
        console.rule(f"{number}/5  Training the {kind} model")
        contestants[kind] = compete(kind, recipe, out, questions, tokenizer, console)

    console.rule("4/5  The same questions to both")
    examples = written_answers(pick_examples(questions), out, KINDS)
    console.print(comparison(contestants["memory"], contestants["dense"]))
    console.print(answers(examples))

    console.rule("5/5  A bank of articles on countries")
    outcome = Outcome(
        **contestants,
        examples=examples,
        bank=answer_from_bank(out, reader or PACKED, console),
        num_questions=len(questions),
        wall_s=time.perf_counter() - start_s,
        threads=torch.get_num_threads(),
        precision=recipe.run.precision,
    )
    save_plot(outcome, out / "recall.png")
    print_end(outcome, out, console)
    write_json(outcome, out / "report.json")
    return outcome


def fresh_folder(out: Path) -> Path:
    """Make the folder, emptied if a finished quickstart is in it."""
    if (out / "report.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


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
    _write_lines(out / "train.jsonl", [vars(told) for told in training_statements(facts)])
    _write_lines(
        out / "questions.jsonl",
        [{"prompt": statement.prompt, "answer": statement.completion} for statement in asked],
    )
    assert recipe.model.host is not None
    if not (out / "tokenizer").exists():
        train_tokenizer(
            [out / "train.jsonl"],
            out=out / "tokenizer",
            vocab_size=recipe.model.host["vocab_size"],
            # One first token for all sentences: without it the memory model recalled half as much.
            add_bos=True,
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
    """Train one of the two models, watching its recall, and ask it everything."""
    changes = {"memory": None} if kind == "dense" else {}
    recipe = _override(recipe, name=kind, run={"dir": str(out / kind)}, **changes)

    def ask(model: PreTrainedModel) -> RecallResult:
        return recall(model, questions, tokenizer=tokenizer, batch_size=BATCH_SIZE)

    with Watch(
        kind, console=console, ask=lambda model: ask(model).exact, curve=out / f"{kind}-curve.jsonl"
    ) as watch:
        trained = train(recipe, on_step=watch.on_step, progress=False)
    if trained.model_dir is None:
        console.print(f"{trained.stopped_by}: saved, run the same command to go on")
        raise SystemExit(0 if trained.stopped_by == "SIGTERM" else 130)
    model, _ = load(trained.model_dir)
    return Contestant(
        kind=kind,
        steps=trained.steps,
        tokens_per_s=trained.tokens_per_s or 0.0,
        counts=count(model, sequence_tokens=recipe.data.sequence_tokens),
        recall=ask(model),
        curve=watch.points(),
    )


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


def _write_lines(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")

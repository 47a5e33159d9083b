"""Memory layers and a bank in one reader: what each knows, and what changing the bank changes.

    strata reader data --out DATA
    strata reader train --data DATA --out RUN
    strata reader pack --run RUN --data DATA --out READER
    python benchmarks/both_memories.py READER DATA --out OUT

READER says how it reads memories, and the bank is written so (OUT/bank; run again, it is gone on
with): of the references of DATA/eval/test/bank, whose facts no training text holds.
DATA/eval/test/questions.jsonl asks for these, DATA/eval/know/questions.jsonl for facts that the
memory layers were taught.

knowledge   both sets of questions, given nothing and given the bank, with the memory layers as they
            are and with all of them adding nothing. The bank's memories stay those that were
            written with the memory layers on.
changes     one record after another of the bank is removed, put back with another answer, and put
            back as it was; its question is asked before and after each change, in one process, with
            one open model that is never detached from the bank.

Writes OUT/both_memories.json, every answer of `changes` included, and OUT/both_memories.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import strata
from strata.errors import DataError, ModelError, StrataError
from strata.evals.memory import eval_memory
from strata.evals.questions import (
    Question,
    contains_answer,
    exact_match,
    normalise_answer,
    read_questions,
)
from strata.explicit.documents import read_documents
from strata.explicit.source import open_retriever
from strata.quickstart.decoder import Reader, open_reader

ANSWER_TOKENS = 16
FORMATS = ("none", "explicit")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reader", type=Path, help="a packed reader with memory layers")
    parser.add_argument("data", type=Path, help="folder of strata reader data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300, help="first questions of each set")
    parser.add_argument("--changes", type=int, default=150, help="records to change")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--embedder", default="minilm", help="none: search by words alone")
    options = parser.parse_args(arguments)
    for name in ("limit", "changes", "top_k"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    try:
        run(options)
    except StrataError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """Measure everything and write both files."""
    reader = open_reader(options.reader, options.out / "reader")
    if not reader.learned:
        raise ModelError(
            f"{options.reader} is no packed reader: make one with strata reader pack --out READER"
        )
    model, tokenizer = reader.model, reader.tokenizer
    with layers_off(model):
        pass  # a model without them is refused before anything is made
    test = options.data / "eval" / "test"
    cases = read_cases(test / "questions.jsonl", test / "bank" / "references.jsonl")
    sets = {"know": options.data / "eval" / "know" / "questions.jsonl"}
    sets["test"] = test / "questions.jsonl"
    asked = {name: read_questions(path)[: options.limit] for name, path in sets.items()}
    bank = make_bank(options, reader, test / "bank")
    report = {
        "reader": str(options.reader),
        "memory": reader.memory.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "references": len(bank),
        "top_k": options.top_k,
        "knowledge": knowledge(model, tokenizer, bank, asked, top_k=options.top_k),
    }
    with strata.attach(model, bank, tokenizer=tokenizer, top_k=options.top_k) as session:
        changed = change_records(
            bank, cases[: options.changes], lambda text: answer(model, tokenizer, session, text)
        )
    report["changes"] = {**tally(changed), "records": [asdict(one) for one in changed]}
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (options.out / "both_memories.json").write_text(text + "\n", encoding="utf-8")
    page = markdown(report)
    (options.out / "both_memories.md").write_text(page, encoding="utf-8")
    print(page)


def make_bank(options: argparse.Namespace, reader: Reader, references: Path) -> strata.Bank:
    """The test references as memories; a bank that was begun is finished."""
    path = options.out / "bank"
    options.out.mkdir(parents=True, exist_ok=True)
    if (path / "bank.json").exists():
        bank = strata.Bank.open(path).use(reader.model, reader.tokenizer)
    else:
        bank = strata.Bank.create(
            path,
            model=reader.model,
            tokenizer=reader.tokenizer,
            config=reader.memory,
            embedder=None if options.embedder == "none" else options.embedder,
        )
    bank.add(list(read_documents([references], id_field="id")))
    return bank


# knowledge


@contextmanager
def layers_off(model: torch.nn.Module) -> Iterator[None]:
    """Let all memory layers add nothing meanwhile.

    Raises:
        ModelError: there are none.
    """

    def nothing(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(out)

    kinds = (strata.ProductKeyMemory, strata.PEER)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if not layers:
        raise ModelError("this model has no memory layers: give a reader that was taught with some")
    handles = [layer.register_forward_hook(nothing) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def knowledge(
    model: Any,
    tokenizer: Any,
    bank: strata.Bank,
    asked: Mapping[str, Sequence[Question]],
    *,
    top_k: int,
) -> list[dict[str, Any]]:
    """Shares of exact answers: a row for each set of questions and state of the memory layers."""
    retriever = open_retriever(bank)
    rows = []
    for name, questions in asked.items():
        for layers in ("on", "off"):
            with layers_off(model) if layers == "off" else nullcontext():
                result = eval_memory(
                    model,
                    tokenizer,
                    bank,
                    questions,
                    retriever=retriever,
                    formats=FORMATS,
                    top_k=top_k,
                    max_new_tokens=ANSWER_TOKENS,
                )
            rows.append(
                {
                    "questions": name,
                    "num_questions": len(questions),
                    "memory_layers": layers,
                    "found": result.found,
                    "accuracy": {score.format: score.accuracy for score in result.scores},
                    "nats": {score.format: score.nats_per_answer for score in result.scores},
                }
            )
    return rows


# changes


@dataclass(frozen=True)
class Case:
    """A record to change.

    Attributes:
        source: of the record.
        text: of it, and `edited` the same with another answer.
        old, new: accepted answers before, and the other one.
    """

    prompt: str
    source: str
    text: str
    edited: str
    old: tuple[str, ...]
    new: str


@dataclass(frozen=True)
class Told:
    """An answer.

    Attributes:
        text: its first line.
        given: ids of the memories that were read, best first.
        cited: id of the first of these that says what was written; None where none does.
    """

    text: str
    given: tuple[str, ...]
    cited: str | None


@dataclass(frozen=True)
class Changed:
    """One record's question before and after each change.

    Attributes:
        ids: of the record as it was, and as it was edited.
        before, removed, edited, restored: answers.
        change_ms: of the three changes, until they were committed.
    """

    source: str
    old: tuple[str, ...]
    new: str
    ids: tuple[str, str]
    before: Told
    removed: Told
    edited: Told
    restored: Told
    change_ms: tuple[float, float, float]


def read_cases(questions: Path, references: Path) -> list[Case]:
    """All questions whose record can be edited, with another answer of the same relation.

    Raises:
        DataError: a file is missing or damaged.
    """
    asked = read_questions(questions)
    try:
        rows = [json.loads(line) for line in references.read_text(encoding="utf-8").splitlines()]
        texts = {str(row["id"]): str(row["text"]) for row in rows}
        lines = questions.read_text(encoding="utf-8").splitlines()
        relations = [json.loads(line).get("relation") for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{references} is missing or no JSON lines of id and text") from None
    of_relation: dict[Any, list[str]] = defaultdict(list)
    for question, relation in zip(asked, relations, strict=True):
        of_relation[relation].append(question.answers[0])
    cases = []
    for place, (question, relation) in enumerate(zip(asked, relations, strict=True)):
        text = texts.get(question.source or "", "")
        pool = of_relation[relation]
        others = [pool[(place + n) % len(pool)] for n in range(len(pool))]
        new = next((other for other in others if _differs(other, question, text)), None)
        if question.source is None or question.answers[0] not in text or new is None:
            continue
        edited = text.replace(question.answers[0], new)
        cases.append(Case(question.prompt, question.source, text, edited, question.answers, new))
    return cases


def _differs(other: str, question: Question, text: str) -> bool:
    """Whether this may stand in an answer's place and be told from it."""
    apart = not any(contains_answer(other, (a,)) or contains_answer(a, (other,))
                    for a in question.answers)  # fmt: skip
    return apart and not contains_answer(text, (other,))


def change_records(
    bank: strata.Bank, cases: Sequence[Case], ask: Callable[[str], Told]
) -> list[Changed]:
    """Change one record after the other, and ask its question at once."""
    changed = []
    for case in cases:
        first = record(bank, case.source, case.old)
        before = ask(case.prompt)
        remove_ms = milliseconds(bank.remove, [case.source])
        removed = ask(case.prompt)
        edit_ms = milliseconds(bank.add, [strata.Document(case.edited, case.source)])
        second = record(bank, case.source, (case.new,))
        edited = ask(case.prompt)
        restore_ms = milliseconds(bank.add, [strata.Document(case.text, case.source)])
        changed.append(
            Changed(
                source=case.source,
                old=case.old,
                new=case.new,
                ids=(first, second),
                before=before,
                removed=removed,
                edited=edited,
                restored=ask(case.prompt),
                change_ms=(remove_ms, edit_ms, restore_ms),
            )
        )
    return changed


def record(bank: strata.Bank, source: str, answers: tuple[str, ...]) -> str:
    """The id of a source's record that holds an answer.

    Raises:
        DataError: none does.
    """
    for hit in bank.of_source(source):
        if contains_answer(hit.text, answers):
            return hit.id
    raise DataError(f"no record of {source!r} in bank {bank.path} holds {answers[0]!r}")


def milliseconds(change: Callable[..., object], *given: object) -> float:
    """How long a change takes, until it is committed."""
    begin_s = time.perf_counter()
    change(*given)
    return (time.perf_counter() - begin_s) * 1e3


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, session: Any, prompt: str) -> Told:
    """What an attached model writes, greedily, and from what."""
    session.used.clear()
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(
        **given,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    new = written[0, given["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).strip().partition("\n")[0].strip()
    memories = {memory.id: memory.text for used in session.used for memory in used.memories}
    cited = next((name for name, said in memories.items() if says(said, text)), None)
    return Told(text, tuple(memories), cited)


def says(text: str, written: str) -> bool:
    """Whether a text holds what was written, as words of its own."""
    words = normalise_answer(written)
    return bool(words) and f" {words} " in f" {normalise_answer(text)} "


def tally(changed: Sequence[Changed]) -> dict[str, Any]:
    """Counts, over all records and over those whose question was answered right before."""

    def share(records: Sequence[Changed], holds: Callable[[Changed], bool]) -> float | None:
        return sum(map(holds, records)) / len(records) if records else None

    right = [one for one in changed if exact_match(one.before.text, one.old)]
    counts: dict[str, Any] = {"num_records": len(changed), "num_right": len(right)}
    for name, records in (("all", changed), ("right", right)):
        counts[name] = {
            "removed: the old answer is gone": share(
                records, lambda one: not exact_match(one.removed.text, one.old)
            ),
            "removed: the record is read no more": share(
                records, lambda one: one.ids[0] not in one.removed.given
            ),
            "edited: the new answer is given": share(
                records, lambda one: exact_match(one.edited.text, (one.new,))
            ),
            "edited: the old answer is still given": share(
                records, lambda one: exact_match(one.edited.text, one.old)
            ),
            "edited: the edited record is cited": share(
                records, lambda one: one.edited.cited == one.ids[1]
            ),
            "restored: the old answer is given again": share(
                records, lambda one: exact_match(one.restored.text, one.old)
            ),
            "restored: the record is cited again": share(
                records, lambda one: one.restored.cited == one.ids[0]
            ),
        }
    counts["change_ms"] = {
        name: statistics.median(one.change_ms[n] for one in changed) if changed else None
        for n, name in enumerate(("remove", "edit", "restore"))
    }
    return counts


# the page


def markdown(report: Mapping[str, Any]) -> str:
    """Both parts as tables."""
    lines = [
        f"{report['parameters'] / 1e6:.1f}M parameters, {report['threads']} threads, a bank of "
        f"{report['references']:,} references, {report['top_k']} read with each question.",
        "",
        "| questions | memory layers | given nothing | given the bank | found in it |",
        "|---|---|---:|---:|---:|",
    ]
    for row in report["knowledge"]:
        right = row["accuracy"]
        lines.append(
            f"| {row['num_questions']} of {row['questions']} | {row['memory_layers']} | "
            f"{right['none']:.1%} | {right['explicit']:.1%} | {row['found']:.1%} |"
        )
    changes = report["changes"]
    lines += [
        "",
        f"| after a change | of {changes['num_records']} records | "
        f"of the {changes['num_right']} answered right before |",
        "|---|---:|---:|",
    ]
    for name, share in changes["all"].items():
        cells = ["" if s is None else f"{s:.1%}" for s in (share, changes["right"][name])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    times = ", ".join(f"{n} {ms:.0f}" for n, ms in changes["change_ms"].items() if ms is not None)
    lines += ["", f"A change, ms (median): {times}. The next question reads it."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""What a plan of formats costs, measured: beside the same references all in one format.

    strata reader data --out DATA bank_references=5000 questions=5000 --questions ... --prose ...
    python benchmarks/plan_cost.py READER DATA/eval/test/bank \
        --questions DATA/eval/test/questions.jsonl --out OUT

READER is a packed reader, or any decoder's folder; CORPUS holds references whose rows have an `id`;
a question names by `source` the row that answers it. Questions are asked by Zipf's law, their ranks
drawn by the seed. One such log says what was read (OUT/log.jsonl, the references found for each
question) and is planned for; another of the same law is asked, which the plan never saw.

probe    a few references are encoded and a few questions asked in both formats: seconds and FLOPs
         to write a memory, and to read either
plan     references are placed by these (--by seconds or flops), under the budgets (OUT/plan)
execute  the plan's explicit references become a bank (OUT/planned), all references another
         (OUT/all); both are timed as they are written. What is searched is a bank of text
         (OUT/text, kept), whose vectors are made once and count for nobody
ask      each question with the references that are found for it, in the format that the plan gives
         each, and all in one format, one right after the other. A question that is asked n times
         is asked once, and counts n times. Searching is timed once and counts for all alike

cost a question = (what was written + what all questions took) / questions. FLOPs are torch's count
of matrix products and attention, of --flop-questions drawn from the log; a causal mask saves none.

Training on references is not run here: "parameters" is the model asked with nothing, plus the
computed cost of training once on each reference, and no plan here places anything there. Prints and
writes OUT/plan_cost.md and OUT/plan_cost.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import StoppingCriteriaList

import strata
from strata.cli.cost_plan import parse_bytes
from strata.errors import DataError, StrataError
from strata.evals.memory import _FirstLine, _Given, _greedy
from strata.evals.questions import Question, contains_answer, exact_match, read_questions
from strata.evals.scoring import RefuseNaN, context_limit, encode_prompt, evaluation_mode
from strata.explicit.cut import Tokens, cut
from strata.explicit.documents import Document, read_documents
from strata.explicit.embed import make_embedder
from strata.explicit.hits import Hit
from strata.explicit.memories import Reference
from strata.explicit.sizes import vector_bytes
from strata.explicit.source import open_retriever
from strata.quickstart.decoder import Reader, open_reader
from strata.theory.cost import FORMATS, Costs, flops
from strata.theory.plan_files import read_formats, reference_ids, write_plan
from strata.theory.planner import Budgets, make_plan
from strata.theory.setting import CostSetting, make_setting, read_shape
from strata.theory.uses import count_uses, zipf_uses


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reader", type=Path, help="a packed reader, or a decoder's folder")
    parser.add_argument("corpus", type=Path, help="file or folder of references")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--id-field", default="id")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--asked", type=int, default=5000, help="questions, in each of both logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by", choices=("seconds", "flops"), default="seconds")
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--embedder", default="minilm", help="none: search by words alone")
    parser.add_argument("--oracle", action="store_true", help="give the reference that answers")
    parser.add_argument("--budget-disk", help="for text and memories, as 100MB")
    parser.add_argument("--probes", type=int, default=40, help="questions and references probed")
    parser.add_argument("--flop-questions", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    options = parser.parse_args(arguments)
    for name in ("asked", "top_k", "probes", "flop_questions", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    if options.oracle and options.top_k > 1:
        parser.error("--oracle gives one reference: leave --top-k at 1")
    try:
        print(run(options))
    except StrataError as error:
        sys.exit(f"error: {error}")


@dataclass(frozen=True)
class Answered:
    """One question, asked once.

    Attributes:
        seconds: from the prompt to the last token; loading memories included, searching not.
        flops: of the same; None where they were not counted.
        exact, found: it is right; the references given hold an accepted answer.
    """

    seconds: float
    flops: float | None
    exact: bool
    found: bool


@dataclass(frozen=True)
class Measured:
    """One plan.

    Attributes:
        name: "planned" or a format.
        references: in each format.
        write_s, write_gflops: of all references.
        read_s, read_gflops: a question, searching included in the seconds.
        seconds, gflops: a question, with its share of what was written.
        accuracy, found: share of questions.
        computed: whether writing was computed, not measured.
    """

    name: str
    references: dict[str, int]
    write_s: float
    write_gflops: float
    read_s: float
    read_gflops: float
    seconds: float
    gflops: float
    accuracy: float
    found: float
    computed: bool = False


def run(options: argparse.Namespace) -> str:
    """Probe, plan, execute and ask; the page."""
    options.out.mkdir(parents=True, exist_ok=True)
    reader = open_reader(options.reader, options.out / "reader")
    references = corpus(options, reader)
    ids = reference_ids(references)
    by_id = dict(zip(ids, references, strict=True))
    asked = answerable(read_questions(options.questions), references, ids)
    forecast, log = draw_logs(options, asked)
    bank = make_bank(options.out / "all", by_id, reader)
    timed = Asker(options, reader, bank.bank)
    searched = search(options, by_id, [asked[one][1] for one in (*forecast, *log)])
    given = {one: given_ids(asked[one], searched) for one in {*forecast, *log}}
    hits = {one: [h for name in given[one] for h in bank.bank.of_source(name)] for one in set(log)}
    probed = probe(options, timed, hits, asked, bank)

    setting = cost_setting(options, reader)
    tokens_n = [len(one) for one in Tokens(reader.tokenizer).ids([r.text for r in references])]
    costs = measured_costs(probed, setting, tokens_n, by=options.by)
    rows = ({"used": [{"source": name} for name in given[one]]} for one in forecast)
    log_path = options.out / "log.jsonl"
    log_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [replace(one, source=name) for one, name in zip(references, ids, strict=True)]
    uses_n = count_uses(log_path, named).uses_n
    plan = make_plan(
        setting,
        tokens_n,
        [len(one.text.encode("utf-8")) for one in references],
        uses_n,
        Budgets(disk_bytes=parse_bytes("--budget-disk", options.budget_disk), ram_bytes=0),
        costs=costs,
    )
    shutil.rmtree(options.out / "plan", ignore_errors=True)
    write_plan(
        options.out / "plan", plan, references, tokens_n=np.array(tokens_n), uses_n=uses_n,
        setting=setting, more={"by": options.by, "probed": probed},
    )  # fmt: skip
    formats = read_formats(options.out / "plan")
    explicit = {name: by_id[name] for name in ids if formats[name] == "explicit"}
    planned = make_bank(options.out / "planned", explicit, reader) if explicit else None

    count = Counter(log)
    search_s = statistics.mean(found.seconds for found in searched.values()) if searched else 0.0
    ways = {
        "planned": (planned, formats),
        "explicit": (bank, dict.fromkeys(ids, "explicit")),
        "text": (None, dict.fromkeys(ids, "text")),
        "parameters": (None, dict.fromkeys(ids, "parameters")),
    }
    askers = {
        name: Asker(options, reader, (written or bank).bank) for name, (written, _) in ways.items()
    }
    sample = random.Random(options.seed).choices(log, k=options.flop_questions)
    answers: dict[str, dict[int, Answered]] = {name: {} for name in ways}
    for number, one in enumerate(sorted(count)):
        for turn in range(len(ways)):  # none always follows the same one
            name = list(ways)[(number + turn) % len(ways)]
            answers[name][one] = askers[name](
                asked[one][1], hits[one], ways[name][1], count_flops=one in sample
            )
        print(f"\r{number + 1} of {len(count)} questions", end="", file=sys.stderr)
    print(file=sys.stderr)
    results = [
        replace(
            sum_up(name, written, answers[name], count, sample, search_s, probed["write_gflops"]),
            references=dict(Counter(chosen.values())),
        )
        for name, (written, chosen) in ways.items()
    ]
    train = flops(setting, tokens_n).write_m[FORMATS.index("parameters")].sum() * 1e3
    rate = probed["write_gflops"] / probed["write_s"]
    results[-1] = with_training(results[-1], train, train / rate, len(log))
    report = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "threads": torch.get_num_threads(),
        "references": len(references),
        "asked": len(log),
        "distinct": len(count),
        "probed": probed,
        "plan": plan.to_json(),
        "measured": [asdict(result) for result in results],
    }
    (options.out / "plan_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    page = markdown(report, results)
    (options.out / "plan_cost.md").write_text(page)
    return page


def corpus(options: argparse.Namespace, reader: Reader) -> list[Reference]:
    """The references, as a bank cuts them; of equal texts the first."""
    documents = read_documents([options.corpus], id_field=options.id_field)
    found: dict[str, Reference] = {}
    for document in documents:
        for reference in cut(document, reader.tokenizer, reader.memory):
            found.setdefault(reference.text, reference)
    return list(found.values())


def answerable(
    questions: Sequence[Question], references: Sequence[Reference], ids: Sequence[str]
) -> list[tuple[str, Question]]:
    """Each question with the reference that answers it: the first of its source that says so."""
    of_source: dict[str, list[int]] = {}
    for number, reference in enumerate(references):
        of_source.setdefault(reference.source, []).append(number)
    found = []
    for question in questions:
        for number in of_source.get(question.source or "", []):
            if contains_answer(references[number].text, question.answers):
                found.append((ids[number], question))
                break
    if not found:
        raise DataError(
            "no question names, as its source, a row of the corpus that holds its answer: give the "
            "corpus' own questions, and its --id-field"
        )
    return found


def draw_logs(
    options: argparse.Namespace, asked: Sequence[tuple[str, Question]]
) -> tuple[list[int], list[int]]:
    """Two logs of one law: what to plan for, and what is asked; positions in `asked`."""
    rng = random.Random(options.seed)
    order = list(range(len(asked)))
    rng.shuffle(order)
    weights = zipf_uses(len(asked), exponent=options.zipf, total=1.0).tolist()
    first, second = (rng.choices(order, weights, k=options.asked) for _ in range(2))
    return first, second


# execute


@dataclass(frozen=True)
class Written:
    """A bank of memories, and the seconds that encoding and storing them took."""

    bank: strata.Bank
    seconds: float
    references: int


def make_bank(path: Path, by_id: dict[str, Reference], reader: Reader) -> Written:
    """References as memories, each a document under its id; made anew, to be timed."""
    shutil.rmtree(path, ignore_errors=True)
    bank = strata.Bank.create(
        path, model=reader.model, tokenizer=reader.tokenizer, config=reader.memory
    )
    documents = [Document(one.text, name) for name, one in by_id.items()]
    begin_s = time.perf_counter()
    bank.add(documents)
    return Written(bank, time.perf_counter() - begin_s, len(documents))


@dataclass(frozen=True)
class Found:
    """Ids that a search found, and how long it took."""

    ids: list[str]
    seconds: float


def search(
    options: argparse.Namespace, by_id: dict[str, Reference], questions: Sequence[Question]
) -> dict[str, Found]:
    """Each distinct question's references, from a bank of text that is kept."""
    if options.oracle:
        return {}
    path = options.out / "text"
    if (path / "bank.json").exists():
        bank = strata.Bank.open(path)
    else:
        embedder = None if options.embedder == "none" else options.embedder
        bank = strata.Bank.create(path, embedder=embedder)
    bank.add(
        [Document(one.text, name) for name, one in by_id.items()],
        cut=lambda one: [Reference(one.text, one.source, 0, len(one.text))],
        embedder=None if bank.embedder_name is None else make_embedder(bank.embedder_name),
    )
    if len(bank) != len(by_id):
        raise DataError(f"{path} holds another corpus: delete it, or give another --out")
    retriever = open_retriever(bank)
    found = {}
    for question in {one.prompt: one for one in questions}.values():
        begin_s = time.perf_counter()
        hits = retriever.search([question.prompt], options.top_k)[0]
        found[question.prompt] = Found([h.source for h in hits], time.perf_counter() - begin_s)
    return found


def given_ids(one: tuple[str, Question], searched: dict[str, Found]) -> list[str]:
    """What a question is given: what was found, or by the oracle the reference that answers."""
    return searched[one[1].prompt].ids if searched else [one[0]]


# ask


class Asker:
    """Asks one model, with references in whatever format each has."""

    def __init__(self, options: argparse.Namespace, reader: Reader, bank: strata.Bank) -> None:
        self._options, self._reader, self._bank = options, reader, bank

    def __call__(
        self, question: Question, hits: Sequence[Hit], formats: dict[str, str], *, count_flops: bool
    ) -> Answered:
        model, tokenizer = self._reader.model, self._reader.tokenizer
        texts = [hit.text for hit in hits if formats[hit.source] == "text"]
        read = [hit for hit in hits if formats[hit.source] == "explicit"]
        prompt = encode_prompt(tokenizer, "\n\n".join([*texts, question.prompt]))
        new, limit = self._options.max_new_tokens, context_limit(model)
        if limit is not None and len(prompt) + new > limit:
            raise DataError(
                f"question {question.id}: {len(prompt)} tokens and {new} new ones do not fit the "
                f"model's context of {limit}: lower --top-k"
            )
        reading: Any = nullcontext()
        if read:  # a server attaches once: not timed
            source = _Given(read, self._bank.load)
            reading = strata.attach(
                model, source, tokenizer=tokenizer, config=self._reader.memory, top_k=len(read)
            )
        counted = None
        with evaluation_mode(model), _greedy(model), reading:
            if count_flops:  # counting slows down, so this is another run; it also warms up
                with counting() as counter:
                    self._generate(prompt)
                counted = float(counter.get_total_flops())
            begin_s = time.perf_counter()
            text = self._generate(prompt)
            seconds = time.perf_counter() - begin_s
        return Answered(
            seconds=seconds,
            flops=counted,
            exact=exact_match(text, question.answers),
            found=any(contains_answer(hit.text, question.answers) for hit in hits),
        )

    def _generate(self, prompt: Sequence[int]) -> str:
        model, tokenizer = self._reader.model, self._reader.tokenizer
        ids = torch.tensor([prompt], device=model.device)
        end = tokenizer.eos_token_id
        written = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._options.max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
            stopping_criteria=StoppingCriteriaList([_FirstLine(tokenizer, len(prompt))]),
            logits_processor=[RefuseNaN()],
        )
        text = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
        return str(text).strip().partition("\n")[0].strip()


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Torch's counter, which does not know the CPU's fused attention by itself."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={packet: attention}) as counter:
        yield counter


# plan


def probe(
    options: argparse.Namespace,
    ask: Asker,
    hits: dict[int, list[Hit]],
    asked: Sequence[tuple[str, Question]],
    written: Written,
) -> dict[str, float]:
    """Seconds and GFLOPs to write a memory, and to read a reference in either format."""
    some = sorted(hits)[: options.probes]
    texts = [asked[one][1] for one in some]
    pieces = list({hit.id: hit.text for one in some for hit in hits[one]}.values())
    with counting() as counter:
        written.bank.encoder.encode(pieces)
    found = {"write_s": written.seconds / written.references}
    found["write_gflops"] = counter.get_total_flops() / 1e9 / max(1, len(pieces))
    spent: dict[str, list[Answered]] = {}
    for name in ("parameters", "explicit", "text"):  # parameters: with nothing
        spent[name] = [
            ask(question, hits[one], {hit.source: name for hit in hits[one]}, count_flops=True)
            for one, question in zip(some, texts, strict=True)
        ]
    given = max(1, sum(len(hits[one]) for one in some) / len(some))
    for what, unit, middle, scale in (
        ("seconds", "s", statistics.median, 1.0),
        ("flops", "gflops", statistics.mean, 1e-9),
    ):
        # Above the cheapest way: answers to the question alone may be longer, and which format a
        # reference gets hangs on the difference only.
        took = {
            way: middle(getattr(one, what) for one in answers) for way, answers in spent.items()
        }
        for name in ("explicit", "text"):
            found[f"read_{name}_{unit}"] = (took[name] - min(took.values())) / given * scale
    return found


def measured_costs(
    probed: dict[str, float], setting: CostSetting, tokens_n: Sequence[int], *, by: str
) -> Costs:
    """What was probed, as costs of every reference; training is computed."""
    count = len(tokens_n)
    unit = "s" if by == "seconds" else "gflops"
    train = flops(setting, tokens_n).write_m[FORMATS.index("parameters")] * 1e3
    if by == "seconds":
        train = train * probed["write_s"] / probed["write_gflops"]
    nothing = np.zeros(count)
    return Costs(
        "s" if by == "seconds" else "GFLOPs",
        np.stack([train, np.full(count, probed[f"write_{unit}"]), nothing]),
        np.stack(
            [nothing, *(np.full(count, probed[f"read_{m}_{unit}"]) for m in ("explicit", "text"))]
        ),
    )


def cost_setting(options: argparse.Namespace, reader: Reader) -> CostSetting:
    """The reader's shape and memory."""
    shape = read_shape(options.reader)
    memory = strata.Bank.open(options.out / "all").settings
    assert memory.fingerprint is not None
    layers = memory.fingerprint.layers
    return make_setting(
        shape=shape,
        memory={
            "num_layers": len(layers),
            "depth": max(layers) + 1,
            "num_heads": len(memory.fingerprint.heads),
            "tokens": memory.fingerprint.tokens,
            "reference_tokens": memory.config.reference_tokens,
        },
        bytes={"per_number": 4.0, "per_vector": stored_bytes(reader, shape)},
    )


def stored_bytes(reader: Reader, shape: dict[str, Any]) -> float:
    """Of a key or value, in the bank's code."""
    return vector_bytes(reader.memory.codec, head_dim=shape["head_dim"])


# report


def sum_up(
    name: str,
    written: Written | None,
    answers: dict[int, Answered],
    count: Counter[int],
    sample: Sequence[int],
    search_s: float,
    write_gflops: float,
) -> Measured:
    """Means over the log, each distinct question as often as it was asked."""
    total = sum(count.values())
    gflops = statistics.mean(answers[one].flops or 0.0 for one in sample) / 1e9
    looked_s = 0.0 if name == "parameters" else search_s
    read_s = sum(answers[one].seconds * n for one, n in count.items()) / total + looked_s
    write_s = 0.0 if written is None else written.seconds
    write_g = 0.0 if written is None else written.references * write_gflops
    return Measured(
        name=name,
        references={},
        write_s=write_s,
        write_gflops=write_g,
        read_s=read_s,
        read_gflops=gflops,
        seconds=read_s + write_s / total,
        gflops=gflops + write_g / total,
        accuracy=sum(answers[one].exact * n for one, n in count.items()) / total,
        found=sum(answers[one].found * n for one, n in count.items()) / total,
    )


def with_training(one: Measured, gflops: float, seconds: float, asked: int) -> Measured:
    """The computed cost of training, at the rate at which memories were encoded."""
    return replace(
        one,
        write_s=seconds,
        write_gflops=gflops,
        seconds=one.read_s + seconds / asked,
        gflops=one.read_gflops + gflops / asked,
        computed=True,
    )


def markdown(report: dict[str, Any], results: Sequence[Measured]) -> str:
    """A row a plan."""
    probed = ", ".join(f"{name} {value:.4g}" for name, value in report["probed"].items())
    lines = [
        f"{report['references']:,} references, {report['asked']:,} questions asked "
        f"({report['distinct']:,} distinct), planned by another log of the same law; "
        f"{report['threads']} threads.",
        f"Probed, a reference: {probed}.",
        "",
        "| all in | explicit | text | written, s | a question, ms | with its share, ms | "
        "GFLOPs a question | with its share | right | found |",
        "|---|" + "---|" * 9,
    ]
    for one in results:
        mark = " (computed)" if one.computed else ""
        lines.append(
            f"| {one.name}{mark} | {one.references.get('explicit', 0):,} | "
            f"{one.references.get('text', 0):,} | {one.write_s:,.1f} | {one.read_s * 1e3:,.1f} | "
            f"{one.seconds * 1e3:,.1f} | {one.read_gflops:,.2f} | {one.gflops:,.2f} | "
            f"{one.accuracy:.1%} | {one.found:.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

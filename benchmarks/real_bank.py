"""A bank of real references, measured: written, searched, read, and used while a decoder generates.

    strata tokenizer train DATA/corpora/wiki_en-00.parquet --out tokenizer --vocab-size 8192 \
        --add-bos --sample-fraction 0.3
    strata data prepare DATA/corpora/wiki_en-*.parquet --out tokens --tokenizer tokenizer \
        --val-fraction 0.005
    strata train benchmarks/real_bank.yaml data.dir=tokens run.dir=run
    python benchmarks/real_bank.py DATA --model run/model --bank bank --references 20000

DATA holds `qa/squad_dev_v1.jsonl.gz` and `corpora/wiki_en-*.parquet` (id, title, text). The bank
gets paragraphs of SQuAD, one question about each, and Wikipedia articles drawn by a seed until it
has so many references; articles of the same titles as SQuAD's are left out. It is made by
`Bank.create`, `train` and `add` with vectors (MiniLM) and memories in the default quantizer
("faiss"), and kept: run again, `--parts make` goes on where it was (`--for-s` ends a run early)
and the other parts use what is there.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from encode_throughput import compare
from planted import COLUMNS, lines, paragraphs, recall_row
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

import strata  # noqa: F401 - registers its models with transformers
from strata.explicit.attach import attach
from strata.explicit.bank import Bank
from strata.explicit.cache import MemoryCache
from strata.explicit.cut import cut
from strata.explicit.documents import Document, ReadReport, read_documents
from strata.explicit.embed import make_embedder
from strata.explicit.encode import Encoder
from strata.explicit.fingerprint import fingerprint
from strata.explicit.host import Host
from strata.explicit.retrieve import (
    HybridRetriever,
    KeyRetriever,
    QueryRetriever,
    Retriever,
    TextRetriever,
    VectorRetriever,
)
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.source import BankKeys, BankSource

PARTS = ("make", "encode", "recall", "latency", "trace")
PIECE = 64  # tokens between two refreshes
Item = TypeVar("Item")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained decoder")
    parser.add_argument("--bank", type=Path, required=True, help="folder to make, or made so")
    parser.add_argument("--references", type=int, default=20_000)
    parser.add_argument("--planted", type=int, default=1000, help="paragraphs, a question each")
    parser.add_argument("--share", type=float, default=0.07, help="of the articles, at most")
    parser.add_argument("--codec", default="faiss")
    parser.add_argument("--embedder", default="minilm")
    parser.add_argument("--for-s", type=float, default=float("inf"), help="of one run")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--queries", type=int, default=300, help="timed by `latency`")
    parser.add_argument("--articles", type=int, default=14, help="read by `trace`")
    parser.add_argument("--prefetch", type=int, nargs="+", default=[0, 16, 48])
    parser.add_argument("--rounds", type=int, default=7, help="of `encode`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    bench = Bench(options)
    for part in PARTS:
        if part in options.parts:
            print(f"\n## {part}\n", flush=True)
            getattr(bench, part)()


class Bench:
    """The model, what is read, and the bank."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begun_s = options, time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(options.model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.config = ExplicitMemoryConfig(codec=options.codec)
        self.encoder = Encoder(Host(self.model), self.tokenizer, self.config)
        self.embedder = make_embedder(options.embedder)
        rng = random.Random(options.seed)
        squad = options.data / "qa" / "squad_dev_v1.jsonl.gz"
        planted = list(islice(paragraphs(squad, rng), options.planted))
        self.planted = [Document(context, question.source) for context, question in planted]
        self.questions = [question for _, question in planted]
        self.titles = {row["title"].replace("_", " ").casefold() for row in lines(squad)}
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        shape = self.encoder.shape
        print(
            f"{parameters:.1f}M parameters, {torch.get_num_threads()} threads; "
            f"{len(shape.layers)} memory layers, {len(shape.heads)} memory heads of "
            f"{shape.head_dim}, {shape.tokens} tokens a head"
        )

    def articles(self, *, inside: bool) -> Iterator[Document]:
        """Wikipedia's, those drawn for the bank or the others."""
        rng = random.Random(self.options.seed)
        paths = sorted((self.options.data / "corpora").glob("wiki_en-*.parquet"))
        for document in read_documents(paths, id_field="id", report=ReadReport()):
            drawn = rng.random() < self.options.share
            if drawn == inside and document.metadata["title"].casefold() not in self.titles:
                yield document

    def open(self) -> Bank:
        """The bank, checked against the model."""
        bank = Bank.open(self.options.bank)
        shape = self.encoder.shape
        bank.check(fingerprint(self.model, self.tokenizer, self.config, shape))
        return bank

    # make

    def make(self) -> None:
        """Fill the bank and say where the time went; run again, it goes on."""
        options = self.options
        if not (options.bank / "bank.json").exists():
            shape = self.encoder.shape
            Bank.create(
                options.bank,
                config=self.config,
                embedder=self.embedder,
                shape=shape,
                fingerprint=fingerprint(self.model, self.tokenizer, self.config, shape),
            )
        bank = self.open()
        assert bank.codec is not None
        cut_it: Callable[[Any], Any] = partial(cut, tokenizer=self.tokenizer, config=self.config)
        if not bank.codec.trained:
            sample = [*self.planted, *islice(self.articles(inside=True), 200)]
            started_s = time.perf_counter()
            used = bank.train(sample, cut=cut_it, encoder=self.encoder, memories=1024)
            print(f"codec trained on {used} references in {time.perf_counter() - started_s:.0f} s")
        clock, count = Clock(options.bank.with_suffix(".times.json")), len(bank)
        started_s = time.perf_counter()

        def counted(document: Any) -> Any:
            nonlocal count
            references = cut_it(document)
            count += len(references)
            return references

        def wanted() -> Iterator[Any]:
            for document in chain(self.planted, self.articles(inside=True)):
                if count >= options.references:
                    return
                if time.perf_counter() - self.begun_s > options.for_s:
                    return
                yield document

        with ExitStack() as stack:
            for owner, method, stage in (
                (self.encoder, "_keep", "select"),
                (self.encoder, "encode", "encode"),
                (self.embedder, "embed_documents", "embed"),
                (bank.codec, "encode", "code"),
            ):
                stack.enter_context(clock.watching(owner, method, stage))
            report = bank.add(
                clock.reading(wanted()),
                cut=clock.timed("cut", counted),
                encoder=self.encoder,
                embedder=self.embedder,
            )
        clock.seconds["all"] += time.perf_counter() - started_s
        clock.save()
        print(f"{report.references:,} references added, {report.unchanged:,} documents were there")
        if count < options.references:
            print(f"{count:,} of {options.references:,} references: run `make` again to go on")
            return
        bank.compact(keep_s=0)
        self._say_made(bank, clock)

    def _say_made(self, bank: Bank, clock: Clock) -> None:
        stats = bank.stats()
        texts = (text for b in bank._store.scan(["text"]) for text in b["text"].to_pylist())
        tokens = sum(
            len(ids)
            for part in iter(lambda: list(islice(texts, 512)), [])
            for ids in self.tokenizer(part, add_special_tokens=False)["input_ids"]
        )
        print(
            f"{stats.references:,} references of {stats.sources:,} documents, {tokens:,} tokens "
            f"({tokens / stats.references:.0f} each), {stats.cold} cold; on disk "
            f"{stats.disk_bytes / 2**20:,.0f} MiB, {stats.disk_bytes / stats.references:,.0f} "
            f"bytes a reference, of which codes {stats.memory_bytes:,}; in {stats.files} files, "
            f"vector index: {stats.vector_index}\n"
        )
        seconds = dict(clock.seconds)
        total_s = seconds.pop("all")
        encode_s = seconds["encode"]
        seconds["encode"] -= seconds["select"]
        seconds["write"] = total_s - sum(seconds.values())
        print("| stage | seconds | share | references/s |\n|---|---:|---:|---:|")
        for stage in ("read", "cut", "embed", "encode", "select", "code", "write"):
            s = seconds[stage]
            rate = f"{stats.references / s:,.0f}"
            print(f"| {stage} | {s:.1f} | {100 * s / total_s:.1f}% | {rate} |")
        print(f"| all | {total_s:.1f} | | {stats.references / total_s:,.0f} |")
        both_s = encode_s + seconds["code"]
        print(
            f"\nencoder (encode and select): {tokens / encode_s:,.0f} tokens/s; with the codes "
            f"{tokens / both_s:,.0f}"
        )

    # encode

    def encode(self) -> None:
        """The encoder against the same layers alone, on references of this bank."""
        bank = self.open()
        codec = bank.codec
        assert codec is not None
        ids = random.Random(self.options.seed).sample(self._ids(bank), 256)
        texts = [record.text for record in bank.take(ids)]
        for batch_size in (32, 64):
            encode = partial(self.encoder.encode, texts, batch_size=batch_size)
            compare(
                self.encoder,
                self.tokenizer,
                texts,
                {"attention": encode, "and codes": lambda encode=encode: codec.encode(encode())},
                batch_size=batch_size,
                rounds=self.options.rounds,
            )

    @staticmethod
    def _ids(bank: Bank) -> list[str]:
        return [name for batch in bank._store.scan(["id"]) for name in batch["id"].to_pylist()]

    # recall

    def recall(self) -> None:
        """Whether a question finds its paragraph, by every retriever."""
        bank = self.open()
        pieces = sum(source.references for source in bank.ls() if "squad#" in source.source)
        chance = self.options.top_k * pieces / len(self.planted) / len(bank)
        print(
            f"{len(self.questions)} questions, {len(bank):,} references, {pieces:,} of them of the "
            f"{len(self.planted):,} paragraphs; by chance {100 * chance:.2f}%\n"
        )
        print(COLUMNS)
        for name, retriever in self.retrievers(bank).items():
            print(recall_row(name, retriever, self.questions, self.options.top_k), flush=True)

    def retrievers(self, bank: Bank, known: Known | None = None) -> dict[str, Retriever]:
        """By name; with `known`, queries are not embedded again."""
        vector = VectorRetriever(bank, known or self.embedder)
        words = TextRetriever(bank)
        keys = BankKeys(bank)
        return {
            "BM25": words,
            self.options.embedder: vector,
            "hybrid": HybridRetriever([vector, words]),
            "own queries": QueryRetriever(keys, known or self.encoder),
            "own keys": KeyRetriever(keys, known or self.encoder),
        }

    # latency

    def latency(self) -> None:
        """Search, load and decode of the best few, one query at a time, all of it warm."""
        bank, top_k = self.open(), self.options.top_k
        codec = bank.codec
        assert codec is not None
        known = Known(self.embedder, self.encoder)
        retrievers = self.retrievers(bank, known)
        texts = islice(self.pieces(), 40, 40 + 3 * self.options.queries, 3)
        queries = [pieces[8] for pieces in texts]
        times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in retrievers}
        embed = {
            self.options.embedder: lambda q: known.embed(q),
            "hybrid": lambda q: known.embed(q),
            "own queries": lambda q: known.ask(q),
            "own keys": lambda q: known.keep(q),
        }
        # One retriever after the other, as each would be used: in turns, the keys and vectors of
        # one push those of the others out of the caches.
        for name, retriever in retrievers.items():
            for number, query in enumerate([*queries[:5], *queries]):  # the first five warm up
                clock = times[name] if number >= 5 else defaultdict(list)
                if name in embed:
                    timed(clock["embed"], lambda n=name, q=query: embed[n](q))
                hits = timed(clock["search"], partial(retriever.search, [query], top_k))[0]
                ids = [hit.id for hit in hits]
                blobs = timed(clock["load"], partial(bank.blobs, ids))
                wanted = [blobs[name] for name in ids]
                timed(clock["decode"], partial(codec.decode, wanted))
        print(f"{len(queries)} queries of {PIECE} tokens, top {top_k}; ms, p50 / p95\n")
        print("| retriever | query embedding | search | load | decode | the three together |")
        print("|---|---:|---:|---:|---:|---:|")
        for name, clock in times.items():
            parts = [clock[stage] for stage in ("search", "load", "decode")]
            together = np.sum(parts, axis=0)
            embedding = spread(clock["embed"]) if clock["embed"] else "-"
            cells = [embedding, *map(spread, parts), spread(together)]
            print(f"| {name} | {' | '.join(cells)} |")

    def pieces(self) -> Iterator[list[str]]:
        """Beginnings of articles that are not in the bank, cut as a session cuts its text."""
        for document in self.articles(inside=False):
            text = document.text[: 12 * 16 * PIECE]
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= 16 * PIECE:
                starts = range(0, 16 * PIECE, PIECE)
                yield [self.tokenizer.decode(ids[start : start + PIECE]) for start in starts]

    # trace

    def trace(self) -> None:
        """Articles that are not in the bank, generated token by token with memory attached."""
        options = self.options
        bank, retriever = self.open(), None
        retriever = self.retrievers(bank)["hybrid"]
        retriever.search(["warm"], 1)
        texts = ["".join(p) for p in islice(self.pieces(), 1, 1 + 5 * options.articles, 5)]
        asked: dict[int, list[Any]] = {}
        totals: dict[str, Totals] = defaultdict(Totals)
        for text in texts:
            ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=1000)
            for ahead in options.prefetch:
                source = BankSource(bank, retriever, encoder=self.encoder)
                with attach(
                    self.model,
                    source,
                    tokenizer=self.tokenizer,
                    top_k=options.top_k,
                    chunk_tokens=PIECE,
                    prefetch_tokens=ahead,
                ) as session:
                    totals[f"prefetch {ahead}"].add(self._read(ids["input_ids"]), session.stats)
                asked.setdefault(ahead, []).extend(session.used)
            totals["no memory"].add(self._read(ids["input_ids"]), None)
        print(
            f"{len(texts)} articles, {len(asked[options.prefetch[0]])} refreshes of {PIECE} tokens "
            f"by hybrid search, {options.top_k} memories each\n"
        )
        print("| | tokens/s | search | load | waited for | to positions | hidden |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for name, total in totals.items():
            print(f"| {name} | {total.row()} |")
        print("\n| cache, memories | MiB | hit rate |\n|---:|---:|---:|")
        for count in (5, 10, 25, 50, 100, 1000):
            self._replay(bank, asked[options.prefetch[0]], count)

    def _read(self, ids: torch.Tensor) -> tuple[int, float]:
        """Let the model write this very text behind its first piece; tokens, seconds."""
        written = ids.shape[1] - PIECE
        started_s = time.perf_counter()
        out = self.model.generate(
            ids[:, :PIECE],
            attention_mask=torch.ones(1, PIECE, dtype=torch.long),
            max_new_tokens=written,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([Dictated(ids)]),
        )
        assert torch.equal(out, ids)
        return written, time.perf_counter() - started_s

    def _replay(self, bank: Bank, used: Sequence[Any], count: int) -> None:
        """What a cache of so many memories would have kept of what a session read."""
        one = MemoryCache(bank.load, capacity_bytes=2**30)
        one.get([next(memory.id for row in used for memory in row.memories)])
        capacity = count * one.stats().num_bytes
        cache = MemoryCache(bank.load, capacity_bytes=capacity)
        for row in used:
            if row.memories:
                cache.get([memory.id for memory in row.memories])
        rate = 100 * cache.stats().hit_rate
        print(f"| {count:,} | {capacity / 2**20:.1f} | {rate:.1f}% |", flush=True)


class Clock:
    """Seconds by stage, kept in a file from one run to the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = defaultdict(float)
        if path.exists():
            self.seconds.update(json.loads(path.read_text()))

    def save(self) -> None:
        """For the next run."""
        self._path.write_text(json.dumps(self.seconds))

    def timed(self, stage: str, act: Callable[..., Item]) -> Callable[..., Item]:
        """The same function, its time counted."""

        def counted(*args: Any, **kwargs: Any) -> Item:
            started_s = time.perf_counter()
            try:
                return act(*args, **kwargs)
            finally:
                self.seconds[stage] += time.perf_counter() - started_s

        return counted

    @contextmanager
    def watching(self, owner: Any, method: str, stage: str) -> Iterator[None]:
        """Count the time of one method of one object meanwhile."""
        setattr(owner, method, self.timed(stage, getattr(owner, method)))
        try:
            yield
        finally:
            delattr(owner, method)

    def reading(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items, the time to get each counted as reading."""
        iterator = iter(items)
        take = self.timed("read", lambda: next(iterator, None))
        while (item := take()) is not None:
            yield item


class Known:
    """An embedder and a model's queries that answer at once what they were told before."""

    def __init__(self, embedder: Any, encoder: Encoder) -> None:
        self.name, self.width = embedder.name, embedder.width
        self._embedder, self._encoder = embedder, encoder
        self._vectors: dict[str, Any] = {}
        self._queries: dict[str, Any] = {}
        self._keys: dict[str, Any] = {}

    def embed(self, text: str) -> None:
        """By the embedder."""
        self._vectors[text] = self._embedder.embed_queries([text])[0]

    def ask(self, text: str) -> None:
        """By the model."""
        self._queries[text] = self._encoder.queries([text])[0]

    def keep(self, text: str) -> None:
        """By the model, as a memory."""
        self._keys[text] = self._encoder.keys([text])[0]

    def embed_queries(self, texts: Sequence[str]) -> Any:
        return np.stack([self._vectors[text] for text in texts])

    def queries(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([self._queries[text] for text in texts])

    def keys(self, texts: Sequence[str]) -> torch.Tensor:
        if not set(texts) <= self._keys.keys():  # references, for their mean
            return self._encoder.keys(texts)
        return torch.stack([self._keys[text] for text in texts])


class Dictated(LogitsProcessor):
    """Lets a model write one given text, token by token."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self._ids[:, input_ids.shape[1]]
        return torch.full_like(scores, -torch.inf).scatter_(1, wanted[:, None], 0.0)


class Totals:
    """What sessions of one kind came to."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.stats = 0, 0.0, list[Any]()

    def add(self, read: tuple[int, float], stats: Any) -> None:
        """One session."""
        self.tokens += read[0]
        self.seconds += read[1]
        self.stats += [] if stats is None else [stats]

    def row(self) -> str:
        """Tokens/s, and ms a refresh."""
        rate = f"{self.tokens / self.seconds:.0f}"
        if not self.stats:
            return f"{rate} | - | - | - | - | -"
        refreshes = sum(stats.refreshes for stats in self.stats)

        def each(name: str) -> float:
            return sum(getattr(stats, name) for stats in self.stats) / refreshes

        names = ("search_ms", "load_ms", "wait_ms", "inject_ms")
        cells = [f"{each(name):.1f} ms" for name in names]
        work, waited = each("search_ms") + each("load_ms"), each("wait_ms")
        hidden = f"{100 * (1 - waited / work):.0f}%" if waited else "-"
        return f"{rate} | {' | '.join(cells)} | {hidden}"


def timed(into: list[float], act: Callable[[], Item]) -> Item:
    """A result; its milliseconds go into a list."""
    started_s = time.perf_counter()
    result = act()
    into.append(1e3 * (time.perf_counter() - started_s))
    return result


def spread(times_ms: Sequence[float]) -> str:
    """p50 / p95."""
    return f"{np.percentile(times_ms, 50):.1f} / {np.percentile(times_ms, 95):.1f}"


if __name__ == "__main__":
    main()

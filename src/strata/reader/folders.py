"""One folder of rows after the other: written, prepared as tokens, their references beside them.

Each draws from its own seed, so that a folder that is there already changes no other.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from strata.data.facts.entities import EntityFact, EntitySplits
from strata.data.prepare import PrepareConfig, prepare
from strata.data.references import Chosen, ReferencesConfig
from strata.data.tokenizer import train_tokenizer
from strata.data.write_references import write_references
from strata.files import replacing, storage_errors
from strata.reader.countries import Articles, CountryWriter, read_articles
from strata.reader.draw import Draw
from strata.reader.knowing import known_row
from strata.reader.prose import Prose, Split
from strata.reader.rows import Row, memory_row, prose_row, text_row
from strata.reader.settings import Knowing, Level, ReaderData
from strata.reader.writing import Count, ToldBy, Writer, count_with


@dataclass(frozen=True)
class FolderReport:
    """One level: rows by kind, tokens, questions' references and chunks that have one."""

    rows: dict[str, int]
    tokens: int
    val_tokens: int
    references: int


def levels(config: ReaderData) -> Iterator[tuple[str, str, Level]]:
    """Stage, name and settings of the levels that are made."""
    for stage, levels in (("text", config.text), ("memory", config.memory)):
        yield from ((stage, name, level) for name, level in levels.items() if level.tokens)


class Folders:
    """Makes the folders of one run, each from draws of its own; those that are there are kept.

    Args:
        out: the folder to make them in.
        config: how.
        splits: the facts to write about.
        articles: prose to stand among them.
    """

    def __init__(
        self, out: Path, config: ReaderData, splits: EntitySplits, articles: Prose
    ) -> None:
        self._out = out
        self._config = config
        self._splits = splits
        self._articles = articles
        self._fillers: dict[str, list[str]] = {}
        self._countries: dict[str, Articles] = {}
        self._count: Count = _guess

    def tokenizer(self, given: Path | None) -> None:
        """Take the given tokenizer, or train one on rows of every level, unless it is there."""
        folder = self._out / "tokenizer"
        if not folder.exists() and given is not None:
            temporary = folder.with_name("tokenizer.tmp")
            with storage_errors(folder):
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(given, temporary)
                temporary.rename(folder)
        elif not folder.exists():
            sample = self._out / "tokenizer-rows.jsonl"
            with storage_errors(sample), replacing(sample) as file:
                for stage, name, level in levels(self._config):
                    rows = self._rows(stage, name, level, "train", purpose="tokenizer")
                    for row in islice(rows, self._config.tokenizer_rows):
                        texts = [row.text, *(own.text for own in row.own if own)]
                        lines = (json.dumps({"text": text}) + "\n" for text in texts)
                        file.writelines(line.encode() for line in lines)
            train_tokenizer([sample], out=folder, vocab_size=self._config.vocab_size, add_bos=True)
        self._count = count_with(Tokenizer.from_file(str(folder / "tokenizer.json")))

    def level(self, stage: str, name: str, level: Level) -> FolderReport:
        """Write and prepare one level, and its references where it has them."""

        def rows(split: Split) -> Iterator[Row]:
            return self._rows(stage, name, level, split)

        return self._folder(self._out / stage / name, rows, level, reads_memories=stage == "memory")

    def know(self, facts: Sequence[EntityFact]) -> FolderReport:
        """Write and prepare what is to be known."""

        def rows(split: Split) -> Iterator[Row]:
            return self._known_rows(facts, split)

        return self._folder(self._out / "know", rows, self._config.know, reads_memories=True)

    def _folder(
        self,
        base: Path,
        rows: Callable[[Split], Iterator[Row]],
        given: Level | Knowing,
        *,
        reads_memories: bool,
    ) -> FolderReport:
        sides: tuple[Split, ...] = ("train", "val")
        files = {split: base / "rows" / f"{split}.jsonl" for split in sides}
        for split, path in files.items():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_rows(
                    path,
                    rows(split),
                    with_own=reads_memories,
                    max_rows=self._config.val_rows if split == "val" else None,
                    max_tokens=given.tokens,
                )
        manifest = prepare(
            [files["train"]],
            val_sources=[files["val"]],
            out=base / "tokens",
            tokenizer=self._out / "tokenizer",
            config=PrepareConfig(shuffle=False, seed=self._config.seed),
        )
        num_references = 0
        if reads_memories:
            num_references = write_references(
                base / "tokens",
                out=base / "references",
                own={str(split): _read_own(path) for split, path in files.items()},
                origin={"rows": _identity(self._config, given)},
                config=ReferencesConfig(chunk_tokens=self._config.chunk_tokens),
            ).count("num_references")
        kinds = Counter(_read(files["train"], "kind"))
        return FolderReport(
            rows=dict(sorted(kinds.items())),
            tokens=manifest.splits["train"].num_tokens,
            val_tokens=manifest.splits["val"].num_tokens,
            references=num_references,
        )

    def writer(self, split: Split, *, true: bool = False) -> Writer:
        """A writer of a split's facts and prose."""
        if split not in self._fillers:
            self._fillers[split] = self._articles.fillers(split)
        facts: list[EntityFact] = getattr(self._splits, split)
        return Writer(
            facts,
            fillers=self._fillers[split],
            config=self._config,
            count=self._count,
            true=true,
        )

    def countries(self, split: Split) -> Articles:
        """Articles of the countries to train with, or of those held out."""
        if split not in self._countries:
            self._countries[split] = read_articles(
                split,
                AutoTokenizer.from_pretrained(self._out / "tokenizer"),
                reference_tokens=self._config.reference_tokens,
            )
        return self._countries[split]

    def _rows(
        self, stage: str, name: str, level: Level, split: Split, *, purpose: str = "rows"
    ) -> Iterator[Row]:
        """Rows without end.

        What came later draws `aside`: a level without countries and questions that nothing answers
        is as it was before there were any.
        """
        config, writer = self._config, self.writer(split)
        if purpose == "tokenizer":
            level = level.model_copy(update={"countries": 0.0, "unanswerable": 0.0})
        of_countries: CountryWriter | None = None
        if level.countries:
            of_countries = CountryWriter(self.countries(split), config=config, count=self._count)
        paragraphs = self._endless_paragraphs(split)
        texts = list(config.text.values())
        plain = config.plain if self._articles else 0.0
        number = 0
        while True:
            draw = Draw(config.seed, purpose, stage, name, split, number)
            aside = Draw(config.seed, purpose, "aside", stage, name, split, number)
            told_by: ToldBy = writer
            about = ""
            if of_countries and aside.chance(level.countries):
                told_by, about = of_countries, "country_"
            if draw.chance(plain):
                yield prose_row(writer, paragraphs, level)
            elif stage == "text":
                yield text_row(told_by, draw, level, aside, kind=f"{about}text")
            elif texts and draw.chance(config.as_text / (1 - plain)):
                as_text = _as_text(texts[-1], level)
                yield text_row(told_by, draw, as_text, aside, kind=f"{about}text")
            else:
                references = f"{split}.{number}"
                kind = f"{about}memory"
                yield memory_row(told_by, draw, level, aside, references, kind=kind)
            number += 1

    def _known_rows(self, facts: Sequence[EntityFact], split: Split) -> Iterator[Row]:
        """Rows without end: to be known, and to be read, by their shares of the tokens."""
        know, writer = self._config.know, self.writer(split)
        reading = self._reading_rows(split)
        tokens = read = number = 0
        while True:
            if know.reading and read <= know.reading * tokens:
                row = next(reading)
                read += row.num_tokens
            else:
                draw = Draw(self._config.seed, "know", split, number)
                row = known_row(writer, draw, facts, held_out=split != "train")
                number += 1
            tokens += row.num_tokens
            yield row

    def _reading_rows(self, split: Split) -> Iterator[Row]:
        """Rows without end: of the last memory level and the text levels, by turns."""
        config = self._config

        def rows(stage: str, levels: Mapping[str, Level]) -> list[Iterator[Row]]:
            size = {"row_tokens": config.know.row_tokens}
            return [
                self._rows(stage, name, level.model_copy(update=size), split, purpose="know")
                for name, level in levels.items()
                if level.tokens
            ]

        memory, texts = rows("memory", config.memory)[-1], rows("text", config.text)
        for number in count():
            yield next(memory)
            if texts:
                yield next(texts[number % len(texts)])

    def _endless_paragraphs(self, split: Split) -> Iterator[list[str]]:
        while True:
            yield from self._articles.paragraphs(split)


def _as_text(level: Level, among: Level) -> Level:
    """A level of references as text, else like the rows among which it stands."""
    taken = ("row_tokens", "countries", "unanswerable")
    return level.model_copy(update={name: getattr(among, name) for name in taken})


def _guess(texts: Sequence[str]) -> list[int]:
    """About how many tokens texts have, before there is a tokenizer."""
    return [len(text) // 3 + 1 for text in texts]


def _write_rows(
    path: Path, rows: Iterator[Row], *, with_own: bool, max_rows: int | None, max_tokens: int
) -> None:
    """Write rows until there are so many rows, or else so many tokens."""
    tokens = 0
    with storage_errors(path), replacing(path) as file:
        for num_rows, row in enumerate(rows, start=1):
            tree: dict[str, Any] = {"text": row.text, "kind": row.kind}
            if with_own:
                tree["own"] = [one and {"id": one.id, "text": one.text} for one in row.own]
            file.write(json.dumps(tree, ensure_ascii=False).encode() + b"\n")
            tokens += row.num_tokens
            if num_rows == max_rows or (max_rows is None and tokens >= max_tokens):
                return


def _identity(config: ReaderData, given: Level | Knowing) -> str:
    text = f"{config.model_dump_json()}\n{given.model_dump_json()}"
    return hashlib.sha256(text.encode()).hexdigest()


def _read_own(path: Path) -> Iterator[list[Chosen | None]]:
    for own in _read(path, "own"):
        yield [one and Chosen(one["id"], "reader", one["text"]) for one in own]


def _read(path: Path, field: str) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)[field]

"""From questions and articles to everything that the reader is taught and asked with.

OUT/made_from.yaml                the settings, and the sources
OUT/tokenizer/                    trained on the texts, or the one that was given
OUT/text/LEVEL/tokens/            stage 1, prepared: references stand in the text
OUT/memory/LEVEL/tokens/          stage 2, prepared: references are memories
OUT/memory/LEVEL/references/      and those
OUT/know/                         what is to be known, among references to read; as a memory level
OUT/.../rows/                     each of these as JSON lines, for the eye
OUT/eval/{val,test}/              a bank's documents and questions
OUT/eval/know/                    questions without a bank
OUT/report.json                   what was made
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from strata.config import FrozenConfig, dump_yaml, load_config
from strata.data.facts.entities import (
    EntityFact,
    EntitySplits,
    Names,
    load_facts,
    question_files,
    split_facts,
)
from strata.data.sources import SourceEntry, find_sources
from strata.errors import ConfigError, DataError
from strata.files import replace_text, storage_errors
from strata.reader.evaluation import write_evaluation
from strata.reader.folders import FolderReport, Folders, levels
from strata.reader.knowing import choose_known, write_known
from strata.reader.prose import Prose, Split
from strata.reader.settings import ReaderData

ORIGIN_NAME = "made_from.yaml"
REPORT_NAME = "report.json"
EXTRACT = ("val_share=0.06", "bank_references=600", "questions=300", "know.facts=500")

Say = Callable[[str], None]


@dataclass(frozen=True)
class DataReport:
    """What was made.

    Attributes:
        facts: by split; `known` are those to know, `countries` those about countries that are
            trained with, `countries_held_out` the others.
        left_out: facts whose names are too long or give the answer away.
        in_train: subjects of the dev file left out because they are subjects in the train file.
        named_in_train: further ones left out because a training fact names them.
        folders: by "stage/level", and "know".
        banks: references and questions, by split.
    """

    facts: dict[str, int]
    left_out: int
    in_train: int
    named_in_train: int
    folders: dict[str, FolderReport]
    banks: dict[str, tuple[int, int]]


class _MadeFrom(FrozenConfig):
    """Everything that decides the bytes of the folder."""

    questions: tuple[SourceEntry, ...]
    prose: tuple[SourceEntry, ...]
    settings: ReaderData
    tokenizer: str | None = None  # sha256 of the one that was given


def read_settings(overrides: Sequence[str] = (), *, extract: bool = False) -> ReaderData:
    """The settings that come with strata, with `a.b=c` overrides.

    Args:
        overrides: these win.
        extract: for the extract of questions that comes with strata, whose bank is smaller.
    """
    with resources.as_file(resources.files(__package__) / "data.yaml") as path:
        return load_config(ReaderData, path, [*(EXTRACT if extract else ()), *overrides])


def make_data(
    questions: Path | None,
    prose: Sequence[Path],
    *,
    out: Path,
    config: ReaderData,
    tokenizer: Path | None = None,
    say: Say = lambda line: None,
) -> DataReport:
    """Make all texts, a folder at a time; finished folders of the same settings are kept.

    Args:
        questions: the folder of EntityQuestions' train and dev files; None takes the extract that
            comes with strata.
        prose: files or folders of articles, as for `strata data prepare`; none for texts of
            facts alone.
        out: the folder to make.
        config: how.
        tokenizer: a folder of `strata reader data` or `strata tokenizer train`, for texts that a
            trained model should read; None trains one.
        say: told what was done, a line a folder.

    Raises:
        DataError: a source cannot be used.
        ConfigError: `out` was made from other settings or sources, or holds other files.
        StorageError: the disk is full or `out` cannot be written.
    """
    out = Path(out)
    articles = find_sources(prose) if prose else []
    made_from = _MadeFrom(
        questions=tuple(file.entry for file in question_files(questions)),
        prose=tuple(file.entry for file in articles),
        settings=config,
        tokenizer=None if tokenizer is None else _tokenizer_sha256(tokenizer),
    )
    splits, left_out = _read_splits(questions, config)
    _keep_origin(out, made_from)
    say(
        f"{len(splits.train):,} facts to train on, {len(splits.val):,} for validation, "
        f"{len(splits.test):,} for the test"
    )
    avoid = Names({fact.subject for fact in (*splits.val, *splits.test)})
    maker = Folders(out, config, splits, Prose(articles, avoid=avoid, seed=config.seed))
    maker.tokenizer(tokenizer)
    banks: dict[str, tuple[int, int]] = {}
    held: tuple[tuple[Split, float], ...] = (("val", 0.25), ("test", 1.0))
    for split, share in held:
        facts = getattr(splits, split)
        writer = maker.writer(split, true=True)
        bank = write_evaluation(out / "eval" / split, writer, facts, split=split, share=share)
        banks[split] = (bank.references, bank.questions)
        say(f"eval/{split}: {bank.references:,} references, {bank.questions:,} questions")
    known: list[EntityFact] = []
    if config.know.tokens:
        left = {fact.subject for fact in bank.left}
        asked = {fact.subject for fact in (*splits.val, *splits.test)} - left
        known = choose_known(bank.left, config, asked=Names(asked))
    folders = {}
    for stage, name, level in levels(config):
        folders[f"{stage}/{name}"] = made = maker.level(stage, name, level)
        say(f"{stage}/{name}: {made.tokens:,} tokens in {sum(made.rows.values()):,} rows")
    if known:
        folders["know"] = made = maker.know(known)
        number = write_known(out / "eval" / "know" / "questions.jsonl", known)
        say(
            f"know: {made.tokens:,} tokens in {sum(made.rows.values()):,} rows, {number:,} "
            "facts and questions"
        )
    report = DataReport(
        facts={
            **{name: len(getattr(splits, name)) for name in ("train", "val", "test")},
            "known": len(known),
            "countries": len(maker.countries("train").facts),
            "countries_held_out": len(maker.countries("val").facts),
        },
        left_out=left_out,
        in_train=splits.in_train,
        named_in_train=splits.named_in_train,
        folders=folders,
        banks=banks,
    )
    (out / REPORT_NAME).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


def _read_splits(questions: Path | None, config: ReaderData) -> tuple[EntitySplits, int]:
    train, dev, left_out = load_facts(questions, max_bytes=config.max_name_bytes)
    splits = split_facts(train, dev, val_share=config.val_share, seed=config.seed)
    for name in ("train", "val", "test"):
        if not getattr(splits, name):
            raise DataError(f"no facts for {name}: give more questions, or a larger val_share")
    return splits, left_out


def _tokenizer_sha256(folder: Path) -> str:
    try:
        return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    except OSError:
        raise DataError(
            f"no tokenizer.json in {folder}: give the folder of a tokenizer, as DATA/tokenizer"
        ) from None


def _keep_origin(out: Path, given: _MadeFrom) -> None:
    """Write down what a folder is made from, or refuse one that was made from something else."""
    path = out / ORIGIN_NAME
    with storage_errors(out):
        if path.exists():
            there = load_config(_MadeFrom, path)
            differing = [name for name, value in given if value != getattr(there, name)]
            if differing:
                raise ConfigError(
                    f"{out} was made from other {' and '.join(differing)} ({path} says which): "
                    "give another --out or delete it"
                )
            return
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"{out} exists and holds other files: give an empty or new --out")
        with storage_errors(path):
            replace_text(path, dump_yaml(given))

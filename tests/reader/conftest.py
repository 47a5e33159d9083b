"""Data that several files look at, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from reader_texts import settings, write_prose

from strata.data.facts.entities import EntitySplits, load_facts, split_facts
from strata.reader.data import DataReport, make_data


@pytest.fixture(scope="session")
def splits() -> EntitySplits:
    train, dev, _ = load_facts(max_bytes=settings().max_name_bytes)
    return split_facts(train, dev, val_share=settings().val_share, seed=settings().seed)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory, splits: EntitySplits) -> Path:
    held = [fact.subject for fact in (*splits.val, *splits.test)]
    return write_prose(tmp_path_factory.mktemp("prose") / "articles.jsonl", held)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> tuple[Path, DataReport]:
    out = tmp_path_factory.mktemp("reader") / "data"
    return out, make_data(None, [prose], out=out, config=settings())

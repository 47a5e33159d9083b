"""A tokenizer, documents and prepared folders, all tiny."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_documents import Prepare, make_texts, write_jsonl

from strata.data import prepare as prepare_file
from strata.data.manifest import TokenManifest
from strata.data.prepare import MemoryPlan, PrepareConfig, prepare
from strata.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE of 320 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    source = write_jsonl(folder / "texts.jsonl", make_texts(200))
    train_tokenizer([source], out=folder / "bpe", vocab_size=320)
    return folder / "bpe"


@pytest.fixture
def tight_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, runs and ranges so small that a hundred documents need many of each."""
    plan = MemoryPlan(
        batch_bytes=500, max_document_bytes=100_000, run_bytes=4_000, range_bytes=6_000
    )
    monkeypatch.setattr(prepare_file, "plan_memory", lambda *_, **__: plan)


@pytest.fixture
def prepare_to(tokenizer: Path) -> Prepare:
    """`prepare_to(out, source, ..., seed=7)`: prepare with the tiny tokenizer."""

    def run(
        out: Path, *sources: Path, val_sources: Sequence[Path] = (), **options: object
    ) -> TokenManifest:
        config = PrepareConfig.model_validate(options)
        return prepare(
            list(sources), out=out, tokenizer=tokenizer, config=config, val_sources=val_sources
        )

    return run

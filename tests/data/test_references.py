"""References of chunks: the best that gives nothing away, written so that a kill is harmless."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_documents import Prepare, folder_bytes, make_texts, write_jsonl
from tokenizers import Tokenizer

from strata.data.dataset import TokenDataset
from strata.data.find_references import find_references
from strata.data.leaks import leaks
from strata.data.references import ChunkReferences, ReferencesConfig, read_references
from strata.errors import DataError

CONFIG = ReferencesConfig(chunk_tokens=8, candidates=3, part_chunks=40)
SEARCHED = {"bank": "abc", "by": "text"}


@dataclass(frozen=True)
class Hit:
    id: str
    text: str
    source: str = "shelf.txt"


class Shelf:
    """Finds, for a text, the text itself and one or two others, drawn by its letters."""

    def __init__(self, *, kill_at: int | None = None) -> None:
        self.asked: list[str] = []
        self._kill_at = kill_at

    def __call__(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        if self._kill_at is not None and len(self.asked) + len(queries) > self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked += queries
        return [self._hits(query)[:top_k] for query in queries]

    @staticmethod
    def _hits(query: str) -> list[Hit]:
        draw = sum(map(ord, query))
        hits = [Hit(f"own {query}", query), Hit(f"{draw % 7}", f"{draw % 7} tells of another sky")]
        return [] if draw % 5 == 0 else hits if draw % 3 else hits[:1]


@pytest.fixture
def tokens(tmp_path: Path, prepare_to: Prepare) -> Path:
    texts = write_jsonl(tmp_path / "a.jsonl", make_texts(60, max_words=25))
    prepare_to(tmp_path / "tokens", texts, shard_tokens=500, val_fraction=0.2)
    return tmp_path / "tokens"


def find(tokens: Path, out: Path, shelf: Any = None, **options: Any) -> Any:
    config = CONFIG.model_copy(update=options)
    return find_references(tokens, out=out, find=shelf or Shelf(), searched=SEARCHED, config=config)


def test_each_chunk_gets_the_best_that_is_no_leak(tokens: Path, tmp_path: Path) -> None:
    shelf = Shelf()
    manifest = find(tokens, tmp_path / "out", shelf)
    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer" / "tokenizer.json"))
    num_leaks = 0
    for split in ("train", "val"):
        dataset = TokenDataset.open(tokens, split=split)
        references = ChunkReferences.open(tmp_path / "out", tokens=tokens, split=split)
        assert len(manifest.splits[split]) > 2 if split == "train" else True
        at = 0
        for number in range(dataset.num_documents):
            document = dataset.document(number)
            seen = set()
            for start in range(0, len(document), 8):
                text = tokenizer.decode(document[start : start + 8].tolist())
                expected = None
                for hit in Shelf._hits(text) if text.strip() else []:
                    ids = tokenizer.encode(hit.text, add_special_tokens=False).ids
                    if leaks(ids, document, threshold=0.9):
                        seen.add(hit.id)
                    elif expected is None:
                        expected = hit
                (chosen,) = references.numbers(np.array([at])).tolist()
                assert (chosen >= 0) == (expected is not None)
                if expected is not None:
                    found = references[chosen]
                    assert (found.id, found.text, found.source) == (
                        expected.id, expected.text, expected.source,
                    )  # fmt: skip
                at += 1
            num_leaks += len(seen)
        assert references.num_chunks == at
        everything = references.numbers(np.arange(at).reshape(1, at))
        assert everything.shape == (1, at) and (everything >= 0).any() and (everything < 0).any()
        assert references.numbers(np.array([-1, 0])).tolist() == [-1, everything[0, 0]]
    assert manifest.count("num_leaks") == num_leaks > 10


def test_a_threshold_of_one_drops_nothing(tokens: Path, tmp_path: Path) -> None:
    manifest = find(tokens, tmp_path / "out", leak_threshold=1.0)
    assert manifest.count("num_leaks") == 0
    references = ChunkReferences.open(tmp_path / "out", tokens=tokens)
    chosen = references.numbers(np.arange(references.num_chunks))
    names = {references[n].id for n in chosen.tolist() if n >= 0}
    assert all(name.startswith("own") for name in names)


def test_how_it_is_cut_in_parts_changes_no_choice(tokens: Path, tmp_path: Path) -> None:
    chosen = []
    for part_chunks in (1, 40, 10**6):
        out = tmp_path / f"{part_chunks}"
        find(tokens, out, part_chunks=part_chunks)
        references = ChunkReferences.open(out, tokens=tokens)
        numbers = references.numbers(np.arange(references.num_chunks)).tolist()
        chosen.append([None if n < 0 else references[n].id for n in numbers])
    assert chosen[0] == chosen[1] == chosen[2]


def test_killed_and_run_again_it_is_the_same_folder(tokens: Path, tmp_path: Path) -> None:
    whole = Shelf()
    find(tokens, tmp_path / "whole", whole)
    want = folder_bytes(tmp_path / "whole")
    for kill_at in (0, len(whole.asked) // 3, len(whole.asked) - 1):
        out = tmp_path / f"killed {kill_at}"
        child = os.fork()
        if not child:
            try:
                find(tokens, out, Shelf(kill_at=kill_at))
            finally:
                os._exit(7)  # not reached: it is killed before
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        with pytest.raises(DataError, match="is unfinished"):
            read_references(out)
        rest = Shelf()
        find(tokens, out, rest)
        assert folder_bytes(out) == want
        if kill_at > 100:
            assert len(rest.asked) < len(whole.asked)
    again = Shelf()
    find(tokens, tmp_path / "whole", again)
    assert not again.asked


def test_what_is_wrong_is_said_in_one_line(
    tokens: Path, tmp_path: Path, prepare_to: Prepare
) -> None:
    out = tmp_path / "out"
    find(tokens, out)
    with pytest.raises(DataError, match=r"leak_threshold was 0\.9, now 0\.5"):
        find(tokens, out, leak_threshold=0.5)
    with pytest.raises(DataError, match="by was 'text', now 'hybrid'"):
        find_references(
            tokens, out=out, find=Shelf(), searched=SEARCHED | {"by": "hybrid"}, config=CONFIG
        )
    with pytest.raises(DataError, match=r"no manifest\.json"):
        find(tmp_path / "nowhere", tmp_path / "other")
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="holds other files"):
        find(tokens, filled)
    with pytest.raises(DataError, match=r"run strata data references"):
        ChunkReferences.open(tmp_path / "nowhere", tokens=tokens)
    texts = write_jsonl(tmp_path / "b.jsonl", make_texts(20))
    prepare_to(tmp_path / "others", texts)
    with pytest.raises(DataError, match="references for other data"):
        ChunkReferences.open(out, tokens=tmp_path / "others")
    find(tmp_path / "others", tmp_path / "for others")
    with pytest.raises(DataError, match="references for other data than val"):
        ChunkReferences.open(tmp_path / "for others", tokens=tmp_path / "others", split="val")


@pytest.mark.parametrize("kind", ["chunks.npy", "lines.npy", "references.jsonl"])
@pytest.mark.parametrize("how", ["missing", "short", "other"])
def test_damage_is_refused(tokens: Path, tmp_path: Path, kind: str, how: str) -> None:
    out = tmp_path / "out"
    find(tokens, out)
    path = out / "train" / f"00000.{kind}"
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:-40] + b"\x7f" * 40)
    with pytest.raises(DataError, match=r"damaged|cannot be read") as error:
        references = ChunkReferences.open(out, tokens=tokens)
        for number in references.numbers(np.arange(references.num_chunks)):
            if number >= 0:
                references[int(number)]
    assert "\n" not in str(error.value)


def test_a_damaged_manifest_is_refused(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    find(tokens, out)
    tree = json.loads((out / "manifest.json").read_text())
    for change in ({"format": "strata-tokens"}, {"splits": {"train": [{}]}}):
        (out / "manifest.json").write_text(json.dumps({**tree, **change}))
        with pytest.raises(DataError, match="damaged or of another kind"):
            read_references(out)

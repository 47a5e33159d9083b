"""References whose chunks are known, written and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_documents import Prepare, folder_bytes, make_texts, write_jsonl

from strata.data.dataset import TokenDataset
from strata.data.references import Chosen, ChunkReferences, ReferencesConfig
from strata.data.write_references import part_ends, write_references
from strata.errors import DataError

CONFIG = ReferencesConfig(chunk_tokens=8, part_chunks=20)
ORIGIN = {"rows": "abc"}
Own = dict[str, list[list[Chosen | None]]]


@pytest.fixture
def tokens(tmp_path: Path, prepare_to: Prepare) -> Path:
    texts = write_jsonl(tmp_path / "a.jsonl", make_texts(40, max_words=25))
    prepare_to(tmp_path / "tokens", texts, shard_tokens=300, val_fraction=0.2)
    return tmp_path / "tokens"


@pytest.fixture
def own(tokens: Path) -> Own:
    """Every third chunk without a reference, every fifth with one that others have too."""
    given: Own = {}
    for split in ("train", "val"):
        number, given[split] = 0, []
        for length in TokenDataset.open(tokens, split=split).document_lengths().tolist():
            chunks: list[Chosen | None] = []
            for _ in range(-(-length // 8)):
                name = "shared" if number % 5 == 0 else f"{split} {number}"
                one = Chosen(name, "somewhere", f"what {name} says, é")
                chunks.append(None if number % 3 == 0 else one)
                number += 1
            given[split].append(chunks)
    return given


def test_every_chunk_gets_its_own(tokens: Path, own: Own, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = write_references(tokens, out=out, own=own, origin=ORIGIN, config=CONFIG)
    assert len(manifest.splits["train"]) > 2
    for split in ("train", "val"):
        wanted = [one for chunks in own[split] for one in chunks]
        references = ChunkReferences.open(out, tokens=tokens, split=split)
        numbers = references.numbers(np.arange(len(wanted)))
        assert references.num_chunks == len(wanted)
        assert [None if n < 0 else references[int(n)] for n in numbers] == wanted
    parts = manifest.splits["train"]
    assert sum(part.num_references for part in parts) < sum(part.num_found for part in parts)


def test_a_finished_folder_is_left_and_another_origin_refused(
    tokens: Path, own: Own, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_references(tokens, out=out, own=own, origin=ORIGIN, config=CONFIG)
    before = folder_bytes(out)
    write_references(tokens, out=out, own=own, origin=ORIGIN, config=CONFIG)
    assert folder_bytes(out) == before
    with pytest.raises(DataError, match="rows was 'abc', now 'abd'"):
        write_references(tokens, out=out, own=own, origin={"rows": "abd"}, config=CONFIG)


def test_an_unfinished_folder_is_written_anew(tokens: Path, own: Own, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_references(tokens, out=whole, own=own, origin=ORIGIN, config=CONFIG)
    short = {**own, "val": own["val"][:-1]}
    with pytest.raises(DataError, match="not those of"):
        write_references(tokens, out=broken, own=short, origin=ORIGIN, config=CONFIG)
    with pytest.raises(DataError, match="has no manifest"):
        ChunkReferences.open(broken, tokens=tokens)
    write_references(tokens, out=broken, own=own, origin=ORIGIN, config=CONFIG)
    assert folder_bytes(broken) == folder_bytes(whole)


def test_references_of_other_documents_are_refused(tokens: Path, own: Own, tmp_path: Path) -> None:
    def refused(**changes: list[list[Chosen | None]]) -> str:
        given = {**own, **changes}
        with pytest.raises(DataError) as error:
            write_references(tokens, out=tmp_path / "out", own=given, origin=ORIGIN, config=CONFIG)
        return str(error.value)

    longer = [[*own["train"][0], None], *own["train"][1:]]
    assert "not those of" in refused(train=longer)
    assert "more documents" in refused(train=[*own["train"], [None]])
    with pytest.raises(DataError, match="references for train given"):
        write_references(
            tokens, out=tmp_path / "out", own={"train": own["train"]}, origin=ORIGIN, config=CONFIG
        )


def test_parts_hold_whole_documents() -> None:
    counts = np.array([3, 3, 9, 1, 1, 4])
    assert list(part_ends(counts, 6)) == [2, 3, 6]
    assert list(part_ends(np.array([], np.int64), 6)) == []

"""Near duplicates go, the first in the order of the sources stays, in any memory and any runs."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from test_prepare import texts_in
from tiny_documents import WORDS, Prepare, folder_bytes, write_jsonl

from strata.data import bands as bands_file
from strata.data.bands import Bands
from strata.data.near_duplicates import BandHasher, near_duplicates
from strata.data.spill import RunEntry
from strata.errors import DataError

pytest.importorskip("rensa")

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_words(count: int, rng: random.Random) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=5)) for _ in range(count)]


def similar_pair(rng: random.Random, similarity: float, num_words: int = 200) -> tuple[str, str]:
    """Two texts that share about this part of their runs of five words."""
    words = make_words(num_words, rng)
    # Common runs / all runs = (n - x) / (n + x), where x is how many runs each has for itself.
    own = round(num_words * (1 - similarity) / (1 + similarity))
    return " ".join(words), " ".join(words[: num_words - own] + make_words(own, rng))


# Hashes


def test_bands_are_chosen_by_the_threshold() -> None:
    for threshold in (0.1, 0.5, 0.8, 0.95, 1.0):
        chosen = near_duplicates(threshold)
        assert chosen.found(threshold) >= 0.9
        assert chosen.bands * chosen.rows <= 128
        more_rows = chosen.model_copy(
            update={"rows": chosen.rows + 1, "bands": 128 // (chosen.rows + 1)}
        )
        assert chosen.rows == 128 or more_rows.found(threshold) < 0.9
    shown = near_duplicates(0.8)
    assert (shown.bands, shown.rows) == (16, 8)
    assert [round(shown.found(s), 2) for s in (0.8, 0.7, 0.5)] == [0.95, 0.61, 0.06]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_pairs_are_found_as_often_as_said(similarity: float) -> None:
    rng = random.Random(0)
    hasher = BandHasher(near_duplicates(0.8))
    pairs = [similar_pair(rng, similarity) for _ in range(200)]
    first = hasher.hash([pair[0] for pair in pairs])
    second = hasher.hash([pair[1] for pair in pairs])
    found = (first == second).any(axis=1).mean()
    expected = hasher.settings.found(similarity)
    # Four standard deviations of 200 draws, and what the similarity is rounded by.
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 200) ** 0.5 + 0.02


def test_hashes_are_of_the_words_alone() -> None:
    hasher = BandHasher(near_duplicates(0.8))
    text = "The river runs to the sea, from a hill."
    alike = ["the RIVER\nruns to the sea from a hill", "The river runs -- to the sea: from a hill!"]
    others = ["The sea runs to the river, from a hill.", "", "!", "?", "The river", "the  river"]
    hashes = hasher.hash([text, *alike, *others])
    assert (hashes[0] == hashes[1]).all() and (hashes[0] == hashes[2]).all()
    assert (hashes[-1] == hashes[-2]).all()
    distinct = [hashes[index] for index in (0, 3, 4, 5, 6, 7)]
    for index, one in enumerate(distinct):
        for other in distinct[:index]:
            assert not (one == other).all()
    # In scripts without spaces a character counts as a word.
    long, changed = (
        "河流向大海奔去山上的石头在雪下等待春天" * 3,
        "河流向大海奔去山上的石头在雪下等待春天" * 2,
    )
    one, two = hasher.hash([long, changed + "江流向大海奔去"])
    assert (one == two).any() and not (one == two).all()


def test_hashes_do_not_depend_on_the_batch() -> None:
    rng = random.Random(1)
    hasher = BandHasher(near_duplicates(0.8))
    texts = [" ".join(make_words(rng.randint(1, 300), rng)) for _ in range(300)]
    together = hasher.hash(texts)
    assert together.dtype == np.uint64 and together.shape == (300, 16)
    assert np.array_equal(together, np.concatenate([hasher.hash([text]) for text in texts]))
    assert np.array_equal(together, hasher.hash(texts[::-1])[::-1])
    assert hasher.hash([]).shape == (0, 16)
    assert len(np.unique(together)) == together.size


# Matching


@pytest.mark.parametrize("num_runs", [1, 7])
@pytest.mark.parametrize("range_bytes", [500, 10**6])
def test_matching_is_what_a_table_in_memory_finds(
    tmp_path: Path, num_runs: int, range_bytes: int
) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, size=(400, 3), dtype=np.uint64)
    # Many equal hashes, at both ends of what there is too, and one that half of the documents have.
    hashes[rng.integers(0, 400, 150), 0] = hashes[rng.integers(0, 60, 150), 0]
    hashes[::2, 1] = 2**64 - 1
    hashes[5:400:7, 2] = 0
    seen: set[tuple[int, int]] = set()
    expected = []
    for row in hashes.tolist():
        keys = set(enumerate(row))
        expected.append(bool(keys & seen))
        seen |= keys
    bands = Bands(tmp_path, num_bands=3)
    bands.cut_to([])
    runs, orders = [], []
    for part in np.array_split(np.arange(400), num_runs):
        order = rng.permutation(len(part))
        bands.append_run(hashes[part], order)
        orders.append(part[order])
        runs.append(RunEntry(num_documents=len(part), num_val=0, num_tokens=0, num_val_tokens=0))
    dropped = tmp_path / "dropped"
    count = bands.match(runs, dropped, range_bytes=range_bytes, progress=False)
    found = np.empty(400, bool)
    found[np.concatenate(orders)] = np.fromfile(dropped, np.uint8) == 1
    assert found.tolist() == expected and count == sum(expected) > 200
    # What a killed process had begun is cut off.
    bands.append_run(hashes[:20], np.arange(20))
    bands.cut_to(runs)
    assert bands.match(runs, dropped, range_bytes=range_bytes, progress=False) == count


def make_corpus(tmp_path: Path) -> tuple[list[str], list[str], Path]:
    """Texts with near copies among them, those that should stay, and the file of all."""
    rng = random.Random(2)
    texts, stay = [], []
    for number in range(70):
        words = rng.choices(WORDS, k=150) + [str(number)] * 5 + make_words(60, rng)
        texts.append(" ".join(words))
        stay.append(texts[-1])
        if number % 3 == 0:
            texts.append(texts[-1])  # the same
        if number % 5 == 0:
            texts.insert(rng.randrange(len(texts)), "")
        if number % 4 == 0:  # one word is another, and a copy of an early one
            texts.append(" ".join([*words[:100], "other", *words[101:]]))
            texts.append(stay[number // 2])
    return texts, stay, write_jsonl(tmp_path / "a.jsonl", texts)


def test_the_first_of_near_copies_stays(
    tmp_path: Path, prepare_to: Prepare, tight_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, stay, source = make_corpus(tmp_path)
    options = {"near_duplicates": 0.8, "shard_tokens": 3000}
    manifest = prepare_to(tmp_path / "out", source, shuffle=False, **options)
    assert texts_in(tmp_path / "out") == stay
    num_texts = sum(map(bool, texts))
    assert manifest.num_dropped == {"near_duplicates": num_texts - len(stay)}
    assert manifest.num_documents == len(stay)
    settings = manifest.prepared_from.near_duplicates
    assert settings is not None and settings.algorithm.startswith("rensa R-MinHash")
    with pytest.raises(DataError, match=r"near_duplicates were .*0.8.*, now none"):
        prepare_to(tmp_path / "out", source, shuffle=False, shard_tokens=3000)
    prepare_to(tmp_path / "shuffled", source, val_fraction=0.3, **options)
    both = texts_in(tmp_path / "shuffled") + texts_in(tmp_path / "shuffled", "val")
    assert sorted(both) == sorted(stay) and both != stay


def test_memory_does_not_change_what_stays(
    tmp_path: Path,
    prepare_to: Prepare,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, source = make_corpus(tmp_path)
    options = {"near_duplicates": 0.8, "val_fraction": 0.2, "shard_tokens": 3000}
    prepare_to(tmp_path / "roomy", source, **options)
    request.getfixturevalue("tight_memory")
    monkeypatch.setattr(bands_file, "_MATCH_BYTES", 500)
    prepare_to(tmp_path / "tight", source, **options)
    assert folder_bytes(tmp_path / "roomy") == folder_bytes(tmp_path / "tight")


def test_a_split_that_is_all_copies(tmp_path: Path, prepare_to: Prepare) -> None:
    texts, _, source = make_corpus(tmp_path)
    copies = write_jsonl(tmp_path / "b.jsonl", [text for text in texts if text][:40])
    manifest = prepare_to(tmp_path / "out", source, val_sources=[copies], near_duplicates=0.8)
    assert manifest.splits["val"].num_documents == 0


def test_without_the_library_one_line_says_so(
    tmp_path: Path, prepare_to: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(DataError, match=r'pip install "strata-lm\[dedup\]"'):
        prepare_to(tmp_path / "out", source, near_duplicates=0.8)

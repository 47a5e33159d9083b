"""The bank: what goes in comes out, found, changed, removed, exported, and checked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strata.errors import BankError
from strata.explicit.bank import Bank, vectors
from strata.explicit.bank.store import Store
from strata.explicit.codec import make_codec
from strata.explicit.retrieve import HybridRetriever, TextRetriever, VectorRetriever
from strata.explicit.settings import ExplicitMemoryConfig
from tiny_bank import (
    CONFIG,
    SHAPE,
    Doc,
    TinyEmbedder,
    TinyEncoder,
    add,
    create,
    cut,
    documents,
    fingerprint,
    reopen,
)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Thirty documents, seventy-three references."""
    made = create(tmp_path / "bank")
    report = add(made, documents(30))
    assert (report.documents, report.references, report.commits) == (30, 73, 2)
    return made


def all_ids(bank: Bank) -> list[str]:
    return [hit.id for hit in bank.search(TinyEmbedder().embed_documents(["x"])[0], 10_000)]


def test_what_goes_in_comes_out(bank: Bank) -> None:
    """Text, span, metadata, vector and codes of every record, after opening again."""
    again = Bank.open(bank.path)
    assert len(again) == 73 and again.digest() == bank.digest()
    encoder, embedder, codec = TinyEncoder(), TinyEmbedder(), make_codec("int8", SHAPE)
    by_source = {d.source: d for d in documents(30)}
    seen = set()
    for record in again.take(all_ids(again)):
        document = by_source[record.source]
        assert document.text[record.start : record.end] == record.text
        assert record.metadata == document.metadata
        assert np.array_equal(record.vector, embedder.embed_documents([record.text])[0])
        assert record.codes == codec.encode(encoder.encode([record.text]))[0]
        seen.add((record.source, record.start))
    assert seen == {(r.source, r.start) for d in documents(30) for r in cut(d)}
    ids = all_ids(again)[:5]
    loaded = again.load([ids[3], ids[0], ids[3]])
    texts = [again.take([i])[0].text for i in (ids[3], ids[0], ids[3])]
    want = codec.decode(codec.encode(encoder.encode(texts)))
    assert torch.equal(loaded.keys_nstd, want.keys_nstd)
    assert torch.equal(loaded.kept_n, want.kept_n)


def test_search_by_vector_is_cosine(bank: Bank) -> None:
    query = TinyEmbedder().embed_documents(["the heron and the plum"])[0]
    hits = bank.search(query, 7)
    records = bank.take(all_ids(bank))
    vectors = np.stack([record.vector for record in records])
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    want = sorted(cosines, reverse=True)[:7]
    np.testing.assert_allclose([hit.score for hit in hits], want, atol=1e-5)
    assert hits[0].text == records[int(cosines.argmax())].text or cosines.max() - want[1] < 1e-6


def test_search_by_words(bank: Bank) -> None:
    hits = bank.search("ravens 7 OTTER", 5)
    assert hits and all(h.score > 0 for h in hits)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert "otter" in hits[0].text or " 7 " in hits[0].text
    for odd in ("", "(", '"unclosed', "text:x AND *", "'; DROP TABLE x", "word " * 1000):
        bank.search(odd, 3)  # no syntax, so nothing is wrong with it
    assert bank.search("nowherefound", 5) == []


def test_metadata_conditions(bank: Bank) -> None:
    """All must hold; what looks like SQL is a value like any other."""
    query = TinyEmbedder().embed_documents(["stone"])[0]
    blue = 'it\'s "blue"; --'
    hits = bank.search(query, 100, {"colour": blue, "n": 2})
    want = [r for d in documents(30) for r in cut(d)]
    want = [r for r in want if r.metadata == {"colour": blue, "n": 2}]
    assert want and {(h.source, h.start) for h in hits} == {(r.source, r.start) for r in want}
    assert {h.id for h in bank.search("stone", 100, {"colour": blue, "n": 2})} == {
        h.id for h in hits
    }
    assert len(bank.search(query, 100, {"n": 2.0})) == len(bank.search(query, 100, {"n": 2}))
    for nothing in ({"n": "2"}, {"n') OR true --": 2}, {"colour": "' OR '1'='1"}, {"n": None}):
        assert bank.search(query, 100, nothing) == []
    with pytest.raises(BankError, match="metadata keys are strings, given 3"):
        bank.search(query, 5, {3: 4})
    with pytest.raises(BankError, match="is no JSON object"):
        bank.search(query, 5, {"n": {1, 2}})


def test_the_same_again_changes_nothing(bank: Bank) -> None:
    before = bank.digest(), bank.version
    encoder = TinyEncoder()
    report = add(bank, documents(30), encoder=encoder)
    assert (report.unchanged, report.references, encoder.calls) == (30, 0, 0)
    assert (bank.digest(), bank.version) == before


def test_duplicates_are_stored_once_and_reported(bank: Bank) -> None:
    copy = [Doc(d.text, f"copy/{d.source}", {"other": 1}) for d in documents(3)]
    report = add(bank, copy)
    assert report.num_duplicates == 3 and len(bank) == 73
    assert report.duplicates[1] == ("copy/stones/1.txt", "stones/1.txt")
    twins = [Doc("A new text.", "a"), Doc("A new text.", "b")]
    report = add(bank, twins)
    assert (report.documents, report.duplicates) == (1, (("b", "a"),))


def test_a_changed_document_is_replaced_in_one_commit(bank: Bank) -> None:
    """A version has the old text or the new one, whole."""
    versions = bank.version
    report = add(bank, [Doc("The first. The second. The third.", "stones/3.txt", {"n": 1})])
    assert (report.replaced, report.references_removed, report.references) == (1, 4, 3)
    assert bank.version == versions + 1
    texts = [r.text for r in bank.take(all_ids(bank)) if r.source == "stones/3.txt"]
    assert sorted(t.strip() for t in texts) == ["The first.", "The second.", "The third."]
    old = Bank.open(bank.path, version=versions)
    assert sum(i.references for i in old.ls() if i.source == "stones/3.txt") == 4
    assert len(bank) == 72 and len(old) == 73
    # Metadata alone changes a document too; an empty text takes its references out.
    assert add(bank, [Doc("The first. The second. The third.", "stones/3.txt")]).replaced == 1
    assert add(bank, [Doc("", "stones/3.txt")]).empty == 1
    assert len(bank) == 69
    # One source twice in a run: the later text stays.
    add(bank, [Doc("Once.", "twice"), Doc("And again.", "twice")])
    assert [r.text for r in bank.take(all_ids(bank)) if r.source == "twice"] == ["And again."]


def test_a_text_moves_when_its_source_changes(bank: Bank) -> None:
    """What another source holds is no duplicate any more once that one says something else."""
    add(bank, [Doc("Shared.", "a"), Doc("Shared.", "b")])
    report = add(bank, [Doc("Own.", "a"), Doc("Shared.", "b")])
    assert (report.documents, report.num_duplicates) == (2, 0)
    assert {i.source for i in bank.ls()} >= {"a", "b"}


def test_removing(bank: Bank) -> None:
    assert bank.remove(["stones/3.txt", "stones/4.txt"]) == 5
    assert len(bank) == 68
    with pytest.raises(BankError, match=r"no source 'stones/4.txt' in bank"):
        bank.remove(["stones/5.txt", "stones/4.txt"])
    assert len(bank) == 68
    assert bank.remove([]) == 0
    add(bank, documents(30))
    assert len(bank) == 73


def test_removed_text_is_gone_after_a_purge(tmp_path: Path) -> None:
    bank = create(tmp_path / "bank")
    secret = "The password is xyzzyplugh"
    add(bank, [Doc(f"{secret}.", "secret"), *documents(5)])

    def on_disk() -> bool:
        files = (p for p in bank.path.rglob("*") if p.is_file())
        return any(b"xyzzyplugh" in p.read_bytes() for p in files)

    assert on_disk()
    bank.remove(["secret"])
    assert on_disk()
    report = bank.compact(purge=True)
    assert not on_disk() and report.versions_removed >= 2
    assert len(bank) == 11 and bank.verify().faults == ()


def test_compaction_changes_no_content(tmp_path: Path) -> None:
    bank = create(tmp_path / "bank")
    for first in range(0, 40, 4):
        add(bank, documents(4, start=first))
    bank.remove(["stones/7.txt"])
    before, vector = bank.digest(), TinyEmbedder().embed_documents(["moss"])[0]
    hits = bank.search("moss raven", 9), bank.search(vector, 9)
    old = Bank.open(bank.path)
    stray = bank.path / "references.lance" / "data" / "left-by-a-killed-writer.lance"
    stray.write_bytes(b"half")
    report = bank.compact(keep_s=0)
    assert (report.files_before, report.files_after) == (10, 1) and not stray.exists()
    assert bank.digest() == before and bank.verify().faults == ()
    assert [h.id for h in bank.search("moss raven", 9)] == [h.id for h in hits[0]]
    found = [h.score for h in bank.search(vector, 9)]
    np.testing.assert_allclose(found, [h.score for h in hits[1]], atol=1e-6)
    assert bank.stats().unindexed == 0
    assert [v.version for v in bank.versions()] == [bank.version]
    with pytest.raises(BankError, match="was removed by a compaction meanwhile: open the bank"):
        old.digest()
    old.refresh()
    assert old.digest() == before


def test_kept_versions_stay_readable(bank: Bank) -> None:
    digests = {bank.version: bank.digest()}
    bank.remove(["stones/3.txt"])
    digests[bank.version] = bank.digest()
    bank.compact()
    digests[bank.version] = bank.digest()
    for info in bank.versions():
        if info.version in digests:
            assert Bank.open(bank.path, version=info.version).digest() == digests[info.version]
    assert len(digests) == 3 and len(set(digests.values())) == 2
    assert bank.versions()[-1].what in ("compact", "index new rows")
    with pytest.raises(BankError, match="has no version 999: it has"):
        Bank.open(bank.path, version=999)


def test_a_reader_keeps_its_version(bank: Bank) -> None:
    reader = Bank.open(bank.path)
    before = reader.digest()
    add(bank, documents(5, start=50))
    assert reader.digest() == before and len(reader) == 73
    reader.refresh()
    assert reader.digest() == bank.digest() != before


def test_cold_rows_are_filled_later(tmp_path: Path) -> None:
    """A bank without a model: text and vectors first, memories once there is one."""
    cold = Bank.create(tmp_path / "bank", config=CONFIG, embedder=TinyEmbedder())
    cold.add(documents(6), cut=cut, embedder=TinyEmbedder())
    with pytest.raises(BankError, match="belongs to no model yet"):
        cold.add(documents(1), cut=cut, embedder=TinyEmbedder(), encoder=TinyEncoder())
    ids = cold.cold()
    assert len(ids) == len(cold) == 13 and cold.blobs(ids) == {}
    with pytest.raises(BankError, match="belongs to no model yet: it has no memories"):
        cold.load(ids)
    cold.bind(SHAPE, fingerprint())
    with pytest.raises(BankError, match="has no memory yet: encode and fill it"):
        cold.load(ids)
    texts = [record.text for record in cold.take(ids)]
    cold.fill(ids[:5], TinyEncoder().encode(texts[:5]))
    assert set(cold.blobs(ids)) == set(ids[:5])
    assert cold.cold_among([ids[7], ids[2], ids[6]]) == [ids[7], ids[6]]
    with pytest.raises(BankError, match="is not in version"):
        cold.cold_among(["0" * 32])
    assert cold.cold(limit=3) and sum(i.cold for i in cold.ls()) == 8 == cold.stats().cold
    other = TinyEncoder().encode(["other"] * len(ids))
    cold.fill(ids, TinyEncoder().encode(texts))  # those that have one keep it
    warm = create(tmp_path / "warm")
    add(warm, documents(6))
    assert cold.digest() == warm.digest() and cold.verify().faults == ()
    cold.fill(ids, other)
    assert cold.digest() == warm.digest()
    with pytest.raises(BankError, match="belongs to a model already"):
        cold.bind(SHAPE, fingerprint())


def test_a_bank_without_vectors(tmp_path: Path) -> None:
    bank = Bank.create(tmp_path / "bank", config=CONFIG)
    bank.add(documents(6), cut=cut)
    assert bank.search("heron", 3)
    with pytest.raises(BankError, match="has no vectors: search it by words"):
        bank.search(np.ones(16, np.float32), 3)
    with pytest.raises(BankError, match="holds no vectors: give that embedder, or none"):
        bank.add(documents(6), cut=cut, embedder=TinyEmbedder())
    bank.export(tmp_path / "out")
    assert Bank.import_(tmp_path / "out", tmp_path / "in").digest() == bank.digest()


def test_another_model_or_embedder_is_refused(bank: Bank) -> None:
    again = Bank.open(bank.path)
    with pytest.raises(BankError, match="rotary base 10000, the model has 500000"):
        again.check(fingerprint(rotary='{"rope_theta": 500000.0}'))
    with pytest.raises(BankError, match="was not checked against the model yet"):
        add(again, documents(31))
    again.check(fingerprint())
    add(again, documents(31))

    class Wider(TinyEmbedder):
        name, width = "wider", 32

    with pytest.raises(BankError, match=r"embedder 'tiny' .* given 'wider' .width 32"):
        again.add(documents(1), cut=cut, embedder=Wider(), encoder=TinyEncoder())
    with pytest.raises(BankError, match="holds vectors of embedder 'tiny'"):
        again.add(documents(1), cut=cut, encoder=TinyEncoder())


def test_export_and_import_give_equal_content(bank: Bank, tmp_path: Path) -> None:
    bank.remove(["stones/3.txt"])
    assert bank.export(tmp_path / "out") == 69
    with pytest.raises(BankError, match="out exists"):
        bank.export(tmp_path / "out")
    again = Bank.import_(tmp_path / "out", tmp_path / "again")
    assert again.digest() == bank.digest() and again.settings == bank.settings
    assert again.verify().faults == ()
    hits = [h.id for h in again.search("heron plum", 5)]
    assert hits == [h.id for h in bank.search("heron plum", 5)]
    assert Bank.open(tmp_path / "again").load(hits).kept_n.min() >= 1


def test_a_trained_codec_goes_with_the_bank(tmp_path: Path) -> None:
    config = ExplicitMemoryConfig(codec="OPQ2_8,Residual2x5,PQ2x4", tokens_per_head=4)
    bank = create(tmp_path / "bank", config=config)
    with pytest.raises(BankError, match="not trained yet: train it on a sample"):
        add(bank, documents(9))
    with pytest.raises(BankError, match=r"at least 256 keys .* hold 159: add more doc"):
        bank.train(documents(10), cut=cut, encoder=TinyEncoder())
    used = bank.train(documents(90), cut=cut, encoder=TinyEncoder(), memories=200, iterations=3)
    assert used == 200
    with pytest.raises(BankError, match="needs no training"):
        bank.train(documents(90), cut=cut, encoder=TinyEncoder())
    add(bank, documents(9))
    again = Bank.open(bank.path)
    ids = all_ids(again)
    assert torch.equal(again.load(ids).keys_nstd, bank.load(ids).keys_nstd)
    bank.export(tmp_path / "out")
    moved = Bank.import_(tmp_path / "out", tmp_path / "moved")
    assert torch.equal(moved.load(ids).keys_nstd, bank.load(ids).keys_nstd)


def test_show_ls_stats(bank: Bank) -> None:
    identifier = all_ids(bank)[0]
    assert bank.show(identifier[:12]).id == identifier
    with pytest.raises(BankError, match="no record begins with 00000000"):
        bank.show("00000000")
    with pytest.raises(BankError, match="is no record id"):
        bank.show("%' OR 1")
    listed = bank.ls()
    assert [i.source for i in listed] == sorted(f"stones/{n}.txt" for n in range(30))
    assert {i.source: i.references for i in listed}["stones/7.txt"] == 4
    stats = bank.stats()
    assert (stats.references, stats.sources, stats.cold) == (73, 30, 0)
    assert stats.memory_bytes == make_codec("int8", SHAPE).bytes_per_memory
    assert stats.characters == sum(len(r.text) for d in documents(30) for r in cut(d))
    assert stats.disk_bytes > 73 * stats.memory_bytes


def test_an_index_finds_what_exact_search_finds(tmp_path: Path) -> None:
    """Above the threshold vectors go through an index; rows added later are found too."""
    bank = create(tmp_path / "bank")
    bank.index_rows = 300
    add(bank, documents(200), batch_references=10_000)
    assert bank.stats().vector_index
    add(bank, [Doc("Zebra zeppelin zinc.", "late")])
    query = TinyEmbedder().embed_documents(["Zebra zeppelin zinc."])[0]
    assert bank.search(query, 1)[0].source == "late"
    for number in range(20):
        query = TinyEmbedder().embed_documents([f"stone {number} {WORDS_OF[number % 3]}"])[0]
        fast = [round(h.score, 4) for h in bank.search(query, 5)]
        exact = [round(h.score, 4) for h in bank.search(query, 5, exact=True)]
        assert fast == exact
    bank.compact(keep_s=0)
    assert (
        bank.search(TinyEmbedder().embed_documents(["Zebra zeppelin zinc."])[0], 1)[0].source
        == "late"
    )


def test_what_was_added_is_indexed_but_for_a_few_rows(tmp_path: Path) -> None:
    """Searches by words look at the others one by one, so they must stay few."""
    bank = create(tmp_path / "bank")
    add(bank, documents(160))
    assert bank.stats().unindexed == len(bank) == 400
    add(bank, documents(60, start=160))
    assert len(bank) == 550 and bank.stats().unindexed == 0
    add(bank, documents(2, start=220))
    assert bank.stats().unindexed == 3
    assert bank.search("stone 221", 1)[0].source == "stones/221.txt"


def hits_of(bank: Bank, words: str, top_k: int = 8, **options: Any) -> list[tuple[str, float]]:
    query = TinyEmbedder().embed_documents([words])[0]
    return [(hit.text, round(hit.score, 4)) for hit in bank.search(query, top_k, **options)]


def test_vectors_in_ram_find_what_lance_finds(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """After rows were removed, added by another object, and for a part of the rows."""
    other = reopen(bank.path)
    assert hits_of(bank, "moss") == hits_of(other, "moss")
    add(other, [Doc("Zebra zeppelin zinc.", "late", {"n": 9})])
    other.remove(["stones/3.txt", "stones/11.txt"])
    assert hits_of(bank, "zebra", 1) != hits_of(other, "zebra", 1)  # it sees its own version
    bank.refresh()
    assert bank._vectors.of(bank._store) is not None
    found = []
    for most in (vectors.MAX_BYTES, 0):  # with nothing in RAM Lance compares
        monkeypatch.setattr(vectors, "MAX_BYTES", most)
        opened = Bank.open(bank.path)
        assert (opened._vectors.of(opened._store) is None) == (most == 0)
        found.append(
            [
                sorted(hits_of(opened, words, 80, where=where), key=lambda hit: (-hit[1], hit[0]))
                for words in ("moss", "the heron", "zebra zinc")
                for where in (None, {"n": 2}, {"n": 9}, {"n": 77})
            ]
        )
    assert found[0] == found[1]
    assert [len(hits) for hits in found[0]][:4] == [66, 17, 1, 0]
    assert hits_of(bank, "zebra zinc", 1)[0][0] == "Zebra zeppelin zinc."
    assert not any("Stone 11 " in text for text, _ in hits_of(bank, "stone 11", 80))


@pytest.mark.parametrize("apart", [0.0, 1e-4, 1.0], ids=["equal", "too near for fp16", "anywhere"])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_vectors_in_ram_are_ranked_as_in_fp32(apart: float, some: bool) -> None:
    rng = np.random.default_rng(3)
    table = object.__new__(vectors.VectorTable)
    rows = np.float32(rng.normal(size=(1, 48)) + apart * rng.normal(size=(3000, 48)))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table.unit_nd = torch.from_numpy(rows)
    table.half_nd = table.unit_nd.half()
    table.addresses_n = np.arange(10, 3010, dtype=np.uint64)
    among = np.arange(20, 3000, 7, dtype=np.uint64) if some else None
    query = np.float32(rng.normal(size=48)) if apart == 1.0 else rows[5] + np.float32(0.1)
    got, cosines = table.nearest(query, 9, among)
    allowed = np.arange(3000) if among is None else among.astype(int) - 10
    want = rows[allowed].astype(np.float64) @ (query / np.linalg.norm(query)).astype(np.float64)
    np.testing.assert_allclose(cosines, np.sort(want)[::-1][:9], atol=3e-7)
    mine = want[np.searchsorted(allowed, np.array(got) - 10)]
    np.testing.assert_allclose(mine, cosines, atol=3e-7)
    assert len(set(got)) == 9 and set(got) <= set((allowed + 10).tolist())


def test_rows_seen_before_are_read_where_they_are_now(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found is read without a look into the index, until the bank changes."""
    ids = all_ids(bank)
    scans: list[object] = []
    scan = Store.scan
    monkeypatch.setattr(Store, "scan", lambda *a, **k: scans.append(k) or scan(*a, **k))
    before = bank.blobs(ids)
    assert len(before) == 73 and not scans
    gone = {r.id for r in bank.take(ids) if r.source == "stones/7.txt"}
    assert len(gone) == 4 and not scans
    add(bank, [Doc("Zebra zeppelin zinc.", "late")])
    bank.remove(["stones/7.txt"])
    for change in (lambda: None, lambda: bank.compact(keep_s=0), lambda: None):
        change()
        left = [name for name in ids if name not in gone]
        assert bank.blobs(left) == {name: before[name] for name in left}
        with pytest.raises(BankError, match="is not in version"):
            bank.blobs([*left, next(iter(gone))])
        assert len(all_ids(bank)) == 70


class Embedder(TinyEmbedder):
    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed_documents(texts)


class Searched:
    """A bank that can only search."""

    def __init__(self, bank: Bank) -> None:
        self.search, self.embedder_name = bank.search, bank.embedder_name


def hybrid(bank: Any, **options: Any) -> HybridRetriever:
    vector = VectorRetriever(bank, Embedder(), **options)
    return HybridRetriever([vector, TextRetriever(bank, **options)], weights=[2, 1])


def test_hybrid_reads_only_what_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds what it would find if it read all, conditions and thresholds included."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:  # of which no two have equal scores
        return " ".join(f"w{n}" for n in np.minimum(rng.zipf(1.3, count), 300))

    bank = create(tmp_path / "bank")
    add(bank, [Doc(f"{words(9 + n)}.", f"d{n}", {"n": n % 5}) for n in range(60)])
    taken: list[int] = []
    take = Store.take
    monkeypatch.setattr(
        Store, "take", lambda self, d, rows, c: taken.append(len(rows)) or take(self, d, rows, c)
    )
    queries = [words(12), "", words(30), "nowherefound", words(6)]
    for options in ({}, {"where": {"n": 2}}, {"min_score": 0.5}, {"where": {"n": 77}}):
        taken.clear()
        found = hybrid(bank, **options).search(queries, 5)
        assert sum(taken) <= 4 * 7
        want = hybrid(Searched(bank), **options).search(queries, 5)
        assert sum(taken) > 4 * 20 or options.get("where")
        for hits, wanted in zip(found, want, strict=True):
            assert [hit.id for hit in hits] == [hit.id for hit in wanted]
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in wanted])
    assert [len(hits) for hits in hybrid(bank).search(queries, 5)] == [5, 0, 5, 5, 5]


def test_hybrid_finds_as_many_as_a_bank_gives_at_once(tmp_path: Path) -> None:
    bank = create(tmp_path / "bank")
    add(bank, documents(9))
    for top_k in (2501, 9999, 10_000):  # a part is asked for four times as many, where it can be
        assert len(hybrid(bank).search(["the heron"], top_k)[0]) == len(bank)


def test_hybrid_goes_deeper_where_equal_texts_fill_its_lists(tmp_path: Path) -> None:
    bank = create(tmp_path / "bank")
    same = [Doc(f"Moss and moss. Only {n} here.", f"d{n}") for n in range(60)]
    add(bank, [*same, Doc("A moss of its own kind.", "late"), Doc("One moss more there.", "x")])
    hits = hybrid(bank).search(["moss"], 3)[0]
    assert sorted(hit.text for hit in hits) == [
        "A moss of its own kind.",
        "Moss and moss.",
        "One moss more there.",
    ]


def test_rows_without_a_direction_are_never_found(tmp_path: Path) -> None:
    class Silent(TinyEmbedder):
        def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
            loud = np.array([[text != "Nothing."] for text in texts])
            return super().embed_documents(texts) * loud

    bank = create(tmp_path / "bank")
    docs = [Doc("Otter.", "a"), Doc("Nothing.", "b"), Doc("Plum.", "c")]
    bank.add(docs, cut=cut, encoder=TinyEncoder(), embedder=Silent())
    assert [text for text, _ in hits_of(bank, "plum", 3)] == ["Plum.", "Otter."]


WORDS_OF = ("heron otter", "plum", "raven silt moss")


def test_threads_may_search_and_read(bank: Bank) -> None:
    query, ids, wrong = TinyEmbedder().embed_documents(["heron"])[0], all_ids(bank), []
    want = [h.id for h in bank.search(query, 5)], bank.blobs(ids[:9])

    def look() -> None:
        for _ in range(15):
            got = [h.id for h in bank.search(query, 5)], bank.blobs(ids[:9])
            if got != want:
                wrong.append(got)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_wrong_questions_are_refused(bank: Bank) -> None:
    query = np.ones(16, np.float32)
    for top_k in (0, -1, 10_001):
        with pytest.raises(BankError, match=f"top_k {top_k} is not between"):
            bank.search(query, top_k)
    for bad, says in (
        (np.ones(15), r"shape \(15,\); this bank's are \(16,\)"),
        (np.zeros(16), "is zero"),
        (np.full(16, np.nan), "NaN"),
        ("half \ud800", "half a surrogate pair"),
    ):
        with pytest.raises(BankError, match=says):
            bank.search(bad, 3)
    with pytest.raises(BankError, match="is no record id"):
        bank.take(["' OR true"])
    with pytest.raises(BankError, match=r"record 0{32} is not in version"):
        bank.blobs(["0" * 32])


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (Doc("A.", ""), "needs a source"),
        (Doc("A \ud800.", "a"), "half a surrogate pair"),
        (Doc("A.", "x" * 5000), "source of 5,000 bytes"),
        (Doc("A" * 2**20 + ".", "a"), "text of 1,048,577 bytes"),
        (Doc("A.", "a", {"n": float("nan")}), "is no JSON object"),
        (Doc("A.", "a", {"n": "x" * 70_000}), "metadata of 70,00"),
    ],
)
def test_documents_that_cannot_be_stored(bank: Bank, document: Doc, says: str) -> None:
    """One line, and what was committed before stays."""
    before = bank.digest()
    with pytest.raises(BankError, match=says) as error:
        add(bank, [document])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert bank.digest() == before


def test_embedders_that_give_something_else(bank: Bank) -> None:
    class Narrow(TinyEmbedder):
        def embed_documents(self, texts):
            return np.ones((len(texts), 3), np.float32)

    with pytest.raises(BankError, match=r"gave vectors of shape \(1, 3\), \(1, 16\) were asked"):
        bank.add([Doc("A.", "a")], cut=cut, encoder=TinyEncoder(), embedder=Narrow())
    assert reopen(bank.path).digest() == bank.digest()

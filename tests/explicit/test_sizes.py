"""Bytes of memories, from a configuration alone."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, T5Config

from strata.errors import ConfigError
from strata.explicit.encode import Encoder
from strata.explicit.host import Host, HostError
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.sizes import (
    KIB,
    PIB,
    TIB,
    host_of,
    memory_bytes,
    paper_sizes,
    readable,
    sizes_table,
    vector_bytes,
)


def test_the_papers_numbers() -> None:
    """A reference in KiB; 1.12e8 of them in PiB and TiB, to the paper's three figures."""
    rows = {row.name: row for row in paper_sizes()}
    dense, sparse, coded = (
        rows[name] for name in ("dense, every query head", "sparse", "sparse, coded")
    )
    assert dense.bytes_per_reference == 70_400 * KIB
    assert sparse.bytes_per_reference == 440 * KIB
    assert coded.bytes_per_reference == 38.5 * KIB
    assert rows["dense, every KV head"].bytes_per_reference == 14_080 * KIB
    assert rows["dense, memory heads"].bytes_per_reference == 7_040 * KIB
    assert round(dense.bytes_total / PIB, 2) == 7.17
    assert round(sparse.bytes_total / TIB, 1) == 45.9
    assert round(coded.bytes_total / TIB, 2) == 4.02
    # And no other reading gives them: 1.1e8 references, or powers of 1000.
    assert round(dense.bytes_total / 1.12e8 * 1.1e8 / PIB, 2) != 7.17
    assert round(dense.bytes_total / 1e15, 2) != 7.17


@pytest.mark.parametrize(
    "codec",
    [
        "OPQ20_80,Residual2x14,PQ8x10", "Residual2x13,PQ2x3", "PQ8", "PQ8x4",
        "PQ8x4fs", "PQ8x10", "PQ8np", "SQ8", "SQ6", "SQ4", "SQfp16", "SQbf16", "RQ4x10",
        "RQ2x5_3x4", "LSQ4x8", "OPQ8_64,PQ8x12", "OPQ8,PQ8", "PCA40,SQ8", "PCAR40,SQ8",
        "PCAW40,SQ8", "PCAWR40,SQ4", "RR64,SQ8", "ITQ64,LSH", "L2norm,PQ8", "Pad96,SQ8", "Flat",
        "LSH",
    ],
)  # fmt: skip
def test_vector_bytes_are_those_of_faiss(codec: str) -> None:
    faiss = pytest.importorskip("faiss")
    assert vector_bytes(codec, head_dim=80) == faiss.index_factory(80, codec).sa_code_size()


@pytest.mark.parametrize(
    ("codec", "head_dim", "size"),
    [
        ("fp32", 80, 320), ("bf16", 80, 160), ("int8", 80, 82), ("int4", 80, 42), ("int4", 7, 6),
        ("faiss", 80, 14), ("faiss", 64, 14), ("faiss", 256, 14), ("faiss", 20, 17),
    ],
)  # fmt: skip
def test_vector_bytes(codec: str, head_dim: int, size: int) -> None:
    assert vector_bytes(codec, head_dim=head_dim) == size


@pytest.mark.parametrize(
    "codec", ["", "int3", "IVF16,PQ8", "Residual2x14", "Residual2x14,SQ8", "OPQ8", "PQ8,PQ8", "PQ"]
)
def test_other_codecs_are_refused(codec: str) -> None:
    with pytest.raises(ConfigError, match=r"the size of codec .* is not known: give fp32, bf16"):
        vector_bytes(codec, head_dim=80)


def test_sizes_are_those_of_encoded_memories(
    make_host: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of every kind of shape: sliding layers left out, heads chosen, all tokens."""
    for family, config in (
        ("llama", ExplicitMemoryConfig(reference_tokens=64)),
        ("gemma3_text", ExplicitMemoryConfig(reference_tokens=64, selector="all")),
        ("llama", ExplicitMemoryConfig(layers=(1, 3), heads={1: (1,), 3: (0, 1)})),
    ):
        model = make_host(family)
        memories = Encoder(Host(model), tokenizer, config).encode(["a text of some length"])
        held = memories.keys_nstd.nbytes + memories.values_nstd.nbytes
        rows = {row.name: row for row in sizes_table(model.config, config)}
        assert 2 * rows["sparse"].bytes_per_reference == held  # bf16 of fp32
        assert memory_bytes(Host(model).memory_shape(config), "fp32") == held


def test_nothing_is_allocated() -> None:
    """70 billion parameters counted within a few MB."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    tracemalloc.start()
    host = host_of(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(p.device == torch.device("meta") for p in host.model.parameters())
    assert peak < 64 * 2**20
    assert (host.num_layers, host.num_heads, host.num_kv_heads, host.head_dim) == (80, 64, 8, 128)


def test_table_grows_with_references_and_codecs() -> None:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        vocab_size=64,
    )  # fmt: skip
    rows = sizes_table(
        config, ExplicitMemoryConfig(codec="int8"), codecs=["int4", "int8"], num_references=1000
    )
    assert [(row.name, row.codec) for row in rows[3:]] == [
        ("sparse", "bf16"), ("sparse, coded", "int8"), ("sparse, coded", "int4"),
    ]  # fmt: skip
    assert all(row.bytes_total == 1000 * row.bytes_per_reference for row in rows)
    assert rows[3].bytes_per_reference == 2 * 8 * 8 * 32
    sizes = [row.bytes_per_reference for row in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_settings_that_do_not_fit_are_refused() -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(HostError, match="memory layer 5 does not exist"):
        sizes_table(config, ExplicitMemoryConfig(layers=(5,)))
    with pytest.raises(HostError, match="T5Config is no decoder-only language model"):
        host_of(T5Config())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (38.5 * KIB, "38.5 KiB"), (440 * KIB, "440 KiB"),
     (7.17 * PIB, "7.17 PiB"), (5000 * PIB, "5,000 PiB")],
)  # fmt: skip
def test_readable(count: float, text: str) -> None:
    assert readable(count) == text

"""A bank counted before it is made: bytes, hours and reads, from a decoder's configuration.

Nothing is measured here. What a machine does in a second is given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from strata.explicit.bank.search import PROBES, REFINE, num_lists, vector_code_bytes
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.sizes import host_of, memory_bytes

ROW_BYTES = 1024  # text of 128 tokens, its ids, checksums and source, and their indexes
CHUNK_TOKENS = 64
_HIT_COLUMNS, _LOAD_COLUMNS = 8, 3  # values read of a reference that is found, and to decode it


@dataclass(frozen=True)
class BankPlan:
    """A bank in numbers.

    Attributes:
        memory_bytes: of one reference's codes, with the places of its tokens.
        disk_bytes: of all references: codes, vectors, text and indexes; one version of them.
        index_bytes: of the vectors' index, which a search wants in memory.
        encode_flops: of one reference, multiply-add = 2.
        build_hours: of encoding all of them.
        reads_per_token: of a generated token: values read from the disk, at most.
        bytes_per_token: of decoded memories' codes, read for a generated token.
    """

    memory_bytes: int
    disk_bytes: int
    index_bytes: int
    encode_flops: int
    build_hours: float
    reads_per_token: float
    bytes_per_token: float


def plan_bank(
    config: PreTrainedConfig,
    settings: ExplicitMemoryConfig,
    *,
    num_references: int,
    flops_per_s: float,
    vector_width: int = 384,
    top_k: int = 5,
    cache_hits: float = 0.0,
) -> BankPlan:
    """Count a bank.

    Args:
        config: of the decoder.
        settings: layers, tokens, codec and length of references.
        num_references: of full length.
        flops_per_s: that all devices together really do.
        vector_width: of the embedder's vectors.
        top_k: memories read by each 64 tokens.
        cache_hits: share of memories that are found decoded, 0 to 1.

    Raises:
        HostError: the settings do not fit the decoder.
        ConfigError: an unknown codec.
    """
    host = host_of(config)
    shape = host.memory_shape(settings)
    codes = memory_bytes(shape, settings.codec) + 2 * len(shape.heads) * shape.tokens + 2
    index = num_references * (vector_code_bytes(vector_width) + 8)  # and a row's number
    flops = encode_flops(config, settings)
    depth = top_k + 2  # a search asks for two more, for equal texts are dropped
    searched = depth * REFINE + depth * _HIT_COLUMNS
    loaded = top_k * _LOAD_COLUMNS * (1.0 - cache_hits)
    return BankPlan(
        memory_bytes=codes,
        disk_bytes=num_references * (codes + 4 * vector_width + ROW_BYTES) + index,
        index_bytes=index,
        encode_flops=flops,
        build_hours=num_references * flops / flops_per_s / 3600,
        reads_per_token=(searched + loaded) / CHUNK_TOKENS,
        bytes_per_token=top_k * codes * (1.0 - cache_hits) / CHUNK_TOKENS,
    )


def encode_flops(config: PreTrainedConfig, settings: ExplicitMemoryConfig) -> int:
    """FLOPs of one reference of full length: all layers below the last memory layer, and of that
    one what keys, values and scores take. Causal attention counts half.
    """
    host = host_of(config)
    shape = host.memory_shape(settings)
    tokens, width = settings.reference_tokens, config.hidden_size
    queries, keys = host.num_heads * host.head_dim, host.num_kv_heads * host.head_dim
    in_projections = width * (queries + 2 * keys)
    layer = in_projections + queries * width + 3 * width * config.intermediate_size
    below = max(shape.layers)
    products = tokens * (below * layer + in_projections)
    attended = tokens * tokens // 2 * queries  # of one product, scores or values
    return 2 * (products + attended * (2 * below + 1))


def searched_rows(num_references: int) -> int:
    """Codes that a search by vector compares."""
    return num_references * PROBES // num_lists(num_references)

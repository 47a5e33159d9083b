"""Bytes of a memory: of any decoder, any settings and any codec, before anything is stored.

Counted are keys and values alone. A stored memory also holds which tokens it kept (one number a
memory head and token), a checksum and its reference's text, which the bank's statistics report.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from strata.errors import ConfigError
from strata.explicit.codec import faiss_factory
from strata.explicit.host import Host, HostError
from strata.explicit.memories import MemoryShape
from strata.explicit.settings import ExplicitMemoryConfig

KIB, MIB, GIB, TIB, PIB = (2 ** (10 * power) for power in range(1, 6))

# The paper's codec for vectors of 80: 14 bytes each.
PAPER_CODEC = "OPQ20_80,Residual2x14,PQ8x10"
# What the paper's totals come out of, see `paper_sizes`.
PAPER_REFERENCES = 112_000_000


@dataclass(frozen=True)
class SizeRow:
    """One way to hold a reference.

    Attributes:
        name: what is held, in words.
        num_heads: pairs of layer and head with keys and values of their own.
        tokens: a head's, of a reference of full length.
        codec: of each vector.
        bytes_per_vector: one key or one value.
        bytes_per_reference: all of them.
        bytes_total: of `num_references`.
    """

    name: str
    num_heads: int
    tokens: int
    codec: str
    bytes_per_vector: int
    bytes_per_reference: int
    bytes_total: int


def vector_bytes(codec: str, *, head_dim: int) -> int:
    """Bytes that a codec spends on one key or value.

    Args:
        codec: "fp32", "bf16"; "int8" or "int4", which add a 16-bit scale a vector; "faiss", the
            paper's quantizer fitted to the width; or a FAISS factory string: any of OPQ, PCA, PCAR,
            PCAW, PCAWR, RR, ITQ, Pad and L2norm, which are free, then PQ, Residual and PQ, RQ, LSQ,
            SQ, LSH or Flat.
        head_dim: width of the vector.

    Raises:
        ConfigError: not one of these.

    Source: FAISS' index factory. `Residual2x14,PQ8x10` is 28 bits of coarse code and 80 of fine
    code, each in whole bytes: 14.
    """
    known = {
        "fp32": 32 * head_dim,
        "bf16": 16 * head_dim,
        "int8": 8 * head_dim + 16,
        "int4": 4 * head_dim + 16,
    }
    if codec == "faiss":
        codec = faiss_factory(head_dim)
    if codec in known:
        return _whole(known[codec])
    width, parts = head_dim, codec.split(",")
    while parts and (transform := _TRANSFORM.fullmatch(parts[0])):
        width = int(transform["width"] or transform["blocks_width"] or width)
        parts.pop(0)
    coarse = _RESIDUAL.fullmatch(parts[0]) if len(parts) == 2 else None
    fine = _CODE.fullmatch(parts[-1]) if parts else None
    if fine is None or len(parts) > 2 or (len(parts) == 2 and not (coarse and fine["pq"])):
        raise ConfigError(
            f"the size of codec {codec!r} is not known: give {', '.join(known)}, faiss or a FAISS "
            "factory string without lists, such as " + PAPER_CODEC
        )
    coarse_bits = _steps(coarse["steps"]) if coarse else 0
    if fine["pq"]:
        fine_bits = int(fine["pq"]) * int(fine["pq_bits"] or 8)
    elif fine["steps"]:
        fine_bits = _steps(fine["steps"])
    else:
        fine_bits = width * _SCALAR_BITS[fine["scalar"]]
    return _whole(coarse_bits) + _whole(fine_bits)


def memory_bytes(shape: MemoryShape, codec: str) -> int:
    """Keys and values of one memory under a codec."""
    return shape.vectors * vector_bytes(codec, head_dim=shape.head_dim)


def host_of(config: PreTrainedConfig) -> Host:
    """A decoder of this configuration on the meta device: its counts, and no memory for weights.

    Raises:
        HostError: no decoder that can have explicit memory.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError:  # transformers lists every class that it knows
        raise HostError(f"{type(config).__name__} is no decoder-only language model") from None
    return Host(model)


def sizes_table(
    host: Host | PreTrainedConfig,
    settings: ExplicitMemoryConfig,
    *,
    codecs: Sequence[str] = (),
    num_references: int = 1,
) -> list[SizeRow]:
    """Rows from the largest way to the smallest: dense, sparse, coded.

    Args:
        host: a decoder, or a transformers configuration to count on.
        settings: layers, heads and tokens of sparse memory, and its codec.
        codecs: others to compare.
        num_references: of a bank.

    Returns:
        In bf16: dense, counting every query head, as the paper does (where query heads share KV
        heads, nothing that large is ever held); dense, what a cache of all layers holds; dense over
        the memory heads; sparse. Then sparse under the settings' codec and each of `codecs`.

    Raises:
        HostError: the settings do not fit the decoder.
        ConfigError: an unknown codec.
    """
    if not isinstance(host, Host):
        host = host_of(host)
    shape = host.memory_shape(settings)
    long = settings.reference_tokens
    every_query = host.num_layers * host.num_heads
    every = host.num_layers * host.num_kv_heads
    memory = len(shape.heads)
    ways: list[tuple[str, int, int, str]] = [
        ("dense, every query head", every_query, long, "bf16"),
        ("dense, every KV head", every, long, "bf16"),
        ("dense, memory heads", memory, long, "bf16"),
        ("sparse", memory, shape.tokens, "bf16"),
    ]
    for codec in dict.fromkeys((settings.codec, *codecs)):
        if codec != "bf16":
            ways.append(("sparse, coded", memory, shape.tokens, codec))
    rows = []
    for name, heads, tokens, codec in ways:
        per_vector = vector_bytes(codec, head_dim=host.head_dim)
        per_reference = 2 * heads * tokens * per_vector
        total = per_reference * num_references
        rows.append(SizeRow(name, heads, tokens, codec, per_vector, per_reference, total))
    return rows


def paper_sizes() -> list[SizeRow]:
    """The paper's own model and bank.

    70,400 KiB dense, 440 KiB sparse and 38.5 KiB coded a reference. Its totals of 7.17 PB, 45.9 TB
    and 4.02 TB are those of 1.12e8 references in powers of 1024 (PiB, TiB); it rounds the number of
    references to 1.1e8. Dense counts keys and values for all 40 query heads; the 8 KV heads that
    the model has would take a fifth.

    Source: "Memory3" (arXiv 2407.01178), section 3.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=44,
        hidden_size=3200,
        intermediate_size=3200,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=80,
        vocab_size=60416,
    )
    settings = ExplicitMemoryConfig(codec=PAPER_CODEC)
    return sizes_table(config, settings, num_references=PAPER_REFERENCES)


def readable(count: float) -> str:
    """Bytes with three or more figures and a binary unit: 450560 -> "440 KiB"."""
    for unit, size in (("PiB", PIB), ("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= size:
            number = count / size
            digits = 0 if number >= 100 else 1 if number >= 10 else 2
            return f"{number:,.{digits}f} {unit}"
    return f"{count:,.0f} B"


_TRANSFORM = re.compile(
    r"OPQ\d+(_(?P<blocks_width>\d+))?|(PCAW?R?|RR|ITQ|Pad)(?P<width>\d+)|L2norm"
)
_STEPS = r"(?P<steps>\d+x\d+(_\d+x\d+)*)"
_RESIDUAL = re.compile(r"Residual(?P<steps>\d+x\d+)")
_SCALAR_BITS = {
    "Flat": 32, "SQfp16": 16, "SQbf16": 16, "SQ8": 8, "SQ6": 6, "SQ4": 4, "LSH": 1,
}  # fmt: skip
_CODE = re.compile(
    r"PQ(?P<pq>\d+)(x(?P<pq_bits>\d+)(fs)?)?(np)?"
    rf"|(RQ|LSQ){_STEPS}|(?P<scalar>{'|'.join(_SCALAR_BITS)})"
)


def _steps(text: str) -> int:
    """Bits of codes such as 2x14 or 2x5_3x4: so many numbers of so many bits."""
    numbers = (part.split("x") for part in text.split("_"))
    return sum(int(count) * int(bits) for count, bits in numbers)


def _whole(bits: int) -> int:
    return -(-bits // 8)

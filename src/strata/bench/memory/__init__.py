"""One decoder that is given references in every way there is: how soon it speaks, and how fast.

    none               the prompt alone
    text               references found, as text before the prompt: RAG
    text_prefix_cached the same, and the keys and values of just that text are kept in memory
    dense              keys and values of all tokens, heads and layers, from a bank
    explicit           those of a few tokens a head in the memory layers, from a bank
    explicit_vq        the same, vector-quantized

All search the same references with the same retriever, and all write as many tokens, greedily.
Text is searched for once, with the whole prompt; memories for every piece of prompt and answer. The
cached prefix is the best case of its kind: references in an order that was seen before, all in
memory, nothing copied. Memories are read from files in every answer, and none is kept from one
answer to the next.
"""

from strata.bench.memory.answers import FORMATS
from strata.bench.memory.clock import STAGES, Clock
from strata.bench.memory.compare import MemoryResult, Spread, bench_memory
from strata.bench.memory.sizes import SIZES, MemorySize

__all__ = [
    "FORMATS",
    "SIZES",
    "STAGES",
    "Clock",
    "MemoryResult",
    "MemorySize",
    "Spread",
    "bench_memory",
]

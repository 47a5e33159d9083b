"""How keys and values are stored: memories to blobs of one size, and back.

A blob has no header; it is, little-endian:

    codes   (s, 2, t) vectors, keys before values within a head, each of `vector_bytes`
    places  (s, t) int16
    kept    uint16

and the bank's settings say which codec and shape it belongs to. Empty places are zero bytes and
decode to zeros whatever the codec.

Codecs: fp32 and bf16 (the numbers themselves), int8 and int4 (symmetric, one fp16 scale a vector),
"faiss" (the paper's vector quantizer, fitted to the head width) and any FAISS factory string that
has a standalone code. FAISS codecs are trained: one quantizer for all keys and one for all values,
over all layers and heads, whose vectors are standardized (the paper leaves that open; two kinds
because keys and values differ most, and codebooks for each layer would take as many times the
memory and the sample).

Shapes: n references, s memory heads, t tokens, d head width, q vectors, b bytes of a vector's code.

Source: "Memory3" (arXiv 2407.01178), section 3.4 and appendix on vector quantization.
"""

from strata.explicit.codec.base import KINDS, Codec
from strata.explicit.codec.faiss_codec import FaissCodec, faiss_factory
from strata.explicit.codec.make import (
    MAX_STATE_BYTES,
    codec_state,
    make_codec,
    read_codec,
)
from strata.explicit.codec.numbers import PLAIN

__all__ = [
    "KINDS",
    "MAX_STATE_BYTES",
    "PLAIN",
    "Codec",
    "FaissCodec",
    "codec_state",
    "faiss_factory",
    "make_codec",
    "read_codec",
]

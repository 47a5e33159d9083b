"""A codec by name, and its training in a file."""

from __future__ import annotations

import hashlib

from strata.errors import BankError
from strata.explicit.codec.base import Codec
from strata.explicit.codec.faiss_codec import FaissCodec
from strata.explicit.codec.numbers import Floats, Integers
from strata.explicit.memories import MemoryShape

MAX_STATE_BYTES = 2**30


def make_codec(name: str, shape: MemoryShape) -> Codec:
    """A codec by name, for memories of a shape; FAISS codecs come untrained.

    Args:
        name: "fp32", "bf16", "int8", "int4", "faiss", or a FAISS factory string.
        shape: of the memories.

    Raises:
        BankError: no such codec, or not for this head width.
        ConfigError: it needs FAISS, which is not installed.
    """
    if name in ("fp32", "bf16"):
        return Floats(name, shape)
    if name in ("int8", "int4"):
        return Integers(name, shape)
    return FaissCodec(name, shape)


def codec_state(codec: Codec) -> tuple[bytes, str]:
    """A codec's state as a file holds it, and its sha256."""
    from safetensors.torch import save

    content = save(codec.state_dict())
    return content, hashlib.sha256(content).hexdigest()


def read_codec(name: str, shape: MemoryShape, content: bytes, sha256: str, *, origin: str) -> Codec:
    """A trained codec from its state.

    Nothing of it is interpreted before its checksum matched.

    Args:
        name, shape: as in `make_codec`.
        content: of `codec_state`, with its sha256.
        origin: where it came from, for people.

    Raises:
        BankError: it is damaged or of another codec.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    codec = make_codec(name, shape)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BankError(f"{origin} is damaged: not the codec that this bank was written with")
    try:
        codec.load_state_dict(load(content))
    except SafetensorError as error:
        raise BankError(f"{origin} is not a codec's state: {error}") from None
    return codec

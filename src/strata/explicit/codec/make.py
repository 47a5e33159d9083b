"""A codec by name, and its training in a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from strata.errors import BankError
from strata.explicit.codec.base import Codec
from strata.explicit.codec.faiss_codec import FaissCodec
from strata.explicit.codec.numbers import Floats, Integers
from strata.explicit.memories import MemoryShape

_MAX_STATE_BYTES = 2**30


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


def save_codec(codec: Codec, path: Path) -> str:
    """Write a codec's state; returns the sha256 of the file."""
    from safetensors.torch import save

    content = save(codec.state_dict())
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def load_codec(name: str, shape: MemoryShape, path: Path, sha256: str) -> Codec:
    """A trained codec from the file that `save_codec` wrote.

    Nothing of the file is interpreted before its checksum matched.

    Raises:
        BankError: it is missing, damaged or of another codec.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    codec = make_codec(name, shape)
    try:
        if path.stat().st_size > _MAX_STATE_BYTES:
            raise BankError(f"{path} is larger than {_MAX_STATE_BYTES // 2**20} MiB: not a codec")
        content = path.read_bytes()
    except OSError as error:
        raise BankError(f"{path} cannot be read ({error.strerror}): the bank is damaged") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BankError(f"{path} is damaged: not the codec that this bank was written with")
    try:
        codec.load_state_dict(load(content))
    except SafetensorError as error:
        raise BankError(f"{path} is not a codec's state: {error}") from None
    return codec

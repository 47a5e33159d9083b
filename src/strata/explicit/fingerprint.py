"""What memories belong to: one exact model, tokenizer and way of encoding.

A memory is made of a model's own keys and values. Read by another model, or by the same one after a
step of training, it is noise that nothing notices, so a bank keeps a fingerprint and refuses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from strata.errors import BankError
from strata.explicit.memories import MemoryShape
from strata.explicit.settings import ExplicitMemoryConfig

_STEP_BYTES = 64 * 2**20  # of a tensor, brought to the CPU and hashed at once


class Fingerprint(BaseModel):
    """Everything that decides what a memory's numbers mean, field by field.

    Attributes:
        architecture: class of the model.
        dtype: of its weights.
        rotary: its rotary settings, as JSON with sorted keys.
        layers, heads, head_dim, tokens: which memory heads there are, how wide, how many tokens.
        selector, reference_tokens, marker: how references are encoded.
        codec: how they are stored.
        tokenizer: sha256 of the tokenizer's vocabulary, merges and rules.
        weights: sha256 over all parameters and saved buffers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    dtype: str
    rotary: str
    layers: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    head_dim: int
    tokens: int
    selector: str
    reference_tokens: int
    marker: str
    codec: str
    tokenizer: str
    weights: str


def fingerprint(
    model: PreTrainedModel, tokenizer: Any, config: ExplicitMemoryConfig, shape: MemoryShape
) -> Fingerprint:
    """Fingerprint a model; every weight is read once, at the speed of sha256 on two threads.

    Args:
        model: on any device; memory for two blocks of 64 MiB is needed.
        tokenizer: a transformers tokenizer; a slow one without a backend counts by its vocabulary.
        config: how references are encoded.
        shape: `Host(model).memory_shape(config)`.

    Raises:
        BankError: some weights are not loaded.
    """
    return Fingerprint(
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        rotary=_rotary(model),
        layers=shape.layers,
        heads=shape.heads,
        head_dim=shape.head_dim,
        tokens=shape.tokens,
        selector=config.selector,
        reference_tokens=config.reference_tokens,
        marker=config.marker,
        codec=config.codec,
        tokenizer=tokenizer_sha256(tokenizer),
        weights=weights_sha256(model),
    )


def refuse_other(bank: Fingerprint, model: Fingerprint) -> None:
    """Refuse a model whose memories these are not.

    Raises:
        BankError: one sentence on the first thing that differs, and how many more do.
    """
    differing = [name for name in Fingerprint.model_fields if _differs(name, bank, model)]
    if not differing:
        return
    first = differing[0]
    more = f" (and {', '.join(differing[1:])} differ too)" if len(differing) > 1 else ""
    raise BankError(
        f"this bank was written with {_say(first, bank, model)}{more}: open it with the model and "
        "settings that wrote it, or make a new bank"
    )


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and saved buffers, by name.

    Tied weights count once. Sharded tensors must be gathered first.

    Raises:
        BankError: a tensor has no numbers (meta device).
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    saved = model.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    names = sorted(tensors)
    for name in names:
        if tensors[name].device.type == "meta":
            raise BankError(f"weight {name} of the model is not loaded: load the model wholly")
    with ThreadPoolExecutor(2, thread_name_prefix="strata-fingerprint") as pool:
        digests = list(pool.map(lambda name: _tensor_digest(tensors[name]), names))
    whole = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(digest)
    return whole.hexdigest()


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    for block in _blocks(tensor.detach()):
        # hashlib lets other threads run meanwhile.
        digest.update(block.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """All entries in order, flat, a bounded number at a time."""
    if tensor.numel() == 0:
        return
    if tensor.ndim == 0:
        yield tensor.reshape(1)
        return
    row_bytes = max(1, tensor[0].numel() * tensor.element_size())
    for rows in tensor.split(max(1, _STEP_BYTES // row_bytes)):
        yield rows.reshape(-1)


def _rotary(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    settings = getattr(config, "rope_parameters", None) or {
        "rope_theta": getattr(config, "rope_theta", None),
        "rope_scaling": getattr(config, "rope_scaling", None),
    }
    return json.dumps(settings, sort_keys=True, default=str)


def tokenizer_sha256(tokenizer: Any) -> str:
    """sha256 of a tokenizer's vocabulary, merges and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        tree = json.loads(backend.to_str())
        # Set by whoever called the tokenizer last; neither changes what a text's tokens are.
        tree.pop("truncation", None)
        tree.pop("padding", None)
        content = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _differs(name: str, bank: Fingerprint, model: Fingerprint) -> bool:
    return bool(getattr(bank, name) != getattr(model, name))


def _say(name: str, bank: Fingerprint, model: Fingerprint) -> str:
    """ "rotary base 10000, the model has 500000"; hashes are not worth showing."""
    old, new = getattr(bank, name), getattr(model, name)
    if name == "weights":
        return f"other weights of the same {bank.architecture}"
    if name == "tokenizer":
        return "another tokenizer"
    if name == "rotary":
        return _say_rotary(json.loads(old), json.loads(new))
    if name == "heads":
        return f"{len(old)} memory heads, the model has {len(new)} or others of as many"
    noun = {
        "layers": "memory layers",
        "head_dim": "head width",
        "tokens": "tokens kept per head:",
        "reference_tokens": "references of at most",
    }.get(name, name)
    show = (lambda v: ", ".join(map(str, v))) if isinstance(old, tuple) else str
    if name in ("marker", "selector", "codec"):
        show = repr
    return f"{noun} {show(old)}, the model has {show(new)}"


def _say_rotary(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for key in sorted({*old, *new}, key=lambda k: (k != "rope_theta", k)):
        if old.get(key) != new.get(key):
            noun = "rotary base" if key == "rope_theta" else f"rotary setting {key}"
            return f"{noun} {_short(old.get(key))}, the model has {_short(new.get(key))}"
    return "other rotary settings"


def _short(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)

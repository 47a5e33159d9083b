"""What a cost is taken of: the shape of a decoder, its explicit memory, and bytes.

Symbols, as in the paper: L layers, H query heads, H_kv KV heads, d_h head width, d width, W width
of the MLP, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from strata.config import FrozenConfig, apply_override, validate
from strata.errors import ConfigError, ModelError


class ModelShape(FrozenConfig):
    """The numbers of a decoder that its FLOPs follow from.

    Attributes:
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: H_kv.
        head_dim: d_h.
        width: d, of the residual stream.
        mlp_width: W; of a mixture of experts, the width that one token uses.
        mlp_matrices: 3 for a gated MLP, 2 for a plain one.
        vocab_size: V.
    """

    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    width: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    mlp_matrices: Literal[2, 3] = 3
    vocab_size: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> ModelShape:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        return self

    @property
    def attention_width(self) -> int:
        """H d_h: of all query heads; the paper's model has d here."""
        return self.num_heads * self.head_dim


class MemoryShape(FrozenConfig):
    """How references are written and read.

    Attributes:
        num_layers: memory layers; None for the first half of the decoder's, the larger one.
        depth: layers that encoding passes, the last memory layer's number plus 1; None where the
            memory layers are the first ones.
        num_heads: pairs of memory layer and KV head with memory; None for all KV heads of them.
        tokens: l_mem, kept of a reference by each head.
        reference_tokens: l_ref, of a reference.
        chunk_tokens: generated with the same references.
        references_per_search: found at once; they share the time of a search.
        train_tokens: l_train, of the sequences in which parameters are trained.
    """

    num_layers: int | None = Field(default=None, ge=1)
    depth: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)
    tokens: int = Field(default=8, ge=1)
    reference_tokens: int = Field(default=128, ge=1)
    chunk_tokens: int = Field(default=64, ge=1)
    references_per_search: int = Field(default=5, ge=1)
    train_tokens: int = Field(default=2048, ge=1)


class ByteCounts(FrozenConfig):
    """What numbers, vectors, text and parameters weigh; the paper's functions use none of these.

    Attributes:
        per_number: of keys, values and parameters where they are computed with.
        per_vector: a stored key or value; None for `per_number` times the head's width.
        per_text_token: text of one token; English in a large vocabulary has 4 to 5.
        bits_per_token: of knowledge in a token that parameters have to hold; about the loss of a
            small model, so all that is in a text.
        bits_per_parameter: of knowledge that a parameter holds: 2 in "Physics of Language Models",
            part 3.3 (arXiv 2404.05405).
    """

    per_number: float = Field(default=2, gt=0)
    per_vector: float | None = Field(default=None, gt=0)
    per_text_token: float = Field(default=4.5, gt=0)
    bits_per_token: float = Field(default=3, gt=0)
    bits_per_parameter: float = Field(default=2, gt=0)


class CostSetting(FrozenConfig):
    """All that the cost of a reference depends on, but for the machine.

    Attributes:
        shape: of the decoder.
        memory: how references are written and read.
        bytes: what things weigh.
    """

    shape: ModelShape
    memory: MemoryShape = MemoryShape()
    bytes: ByteCounts = ByteCounts()

    @model_validator(mode="after")
    def _check(self) -> CostSetting:
        layers, memory = self.shape.num_layers, self.memory
        if self.memory_layers > layers:
            raise ValueError(f"memory.num_layers {self.memory_layers} exceeds the {layers} layers")
        if not self.memory_layers <= self.depth <= layers:
            raise ValueError(
                f"memory.depth {self.depth} must lie between the {self.memory_layers} memory "
                f"layers and the {layers} layers"
            )
        most = self.memory_layers * self.shape.num_kv_heads
        if self.memory_heads > most:
            raise ValueError(f"memory.num_heads {self.memory_heads} exceeds the {most} KV heads")
        if memory.tokens > memory.reference_tokens:
            raise ValueError(
                f"memory.tokens {memory.tokens} exceeds memory.reference_tokens "
                f"{memory.reference_tokens}"
            )
        return self

    @property
    def memory_layers(self) -> int:
        """L_mem."""
        given = self.memory.num_layers
        return (self.shape.num_layers + 1) // 2 if given is None else given

    @property
    def depth(self) -> int:
        """Layers that encoding a reference passes."""
        return self.memory_layers if self.memory.depth is None else self.memory.depth

    @property
    def memory_heads(self) -> int:
        """Pairs of layer and KV head with memory."""
        given = self.memory.num_heads
        return self.memory_layers * self.shape.num_kv_heads if given is None else given

    @property
    def vector_bytes(self) -> float:
        """One stored key or value."""
        given = self.bytes.per_vector
        return self.bytes.per_number * self.shape.head_dim if given is None else given


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # "Memory3" (arXiv 2407.01178); 14 bytes a vector are its codec's.
    "memory3_2b": {
        "shape": {
            "num_layers": 44, "num_heads": 40, "num_kv_heads": 8, "head_dim": 80, "width": 3200,
            "mlp_width": 3200, "vocab_size": 60416,
        },
        "memory": {"num_layers": 22},
        "bytes": {"per_vector": 14},
    },
    "llama3_1b": {
        "shape": {
            "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "width": 2048,
            "mlp_width": 8192, "vocab_size": 128256,
        },
    },
    "llama3_8b": {
        "shape": {
            "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "width": 4096,
            "mlp_width": 14336, "vocab_size": 128256,
        },
    },
}  # fmt: skip
DEFAULT_PRESET = "memory3_2b"


def make_setting(
    *,
    preset: str = DEFAULT_PRESET,
    shape: Mapping[str, Any] | None = None,
    memory: Mapping[str, Any] | None = None,
    bytes: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> CostSetting:
    """A setting from a preset, or from a shape; `a.b=c` overrides win.

    Args:
        preset: a name in `PRESETS`; not used where `shape` is given.
        shape: fields of `ModelShape`, as `read_shape` gives them.
        memory, bytes: fields that replace the defaults.
        overrides: strings `memory.tokens=16`.

    Raises:
        ConfigError: no such preset, or a value that cannot be.
    """
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}: give one of {', '.join(PRESETS)}")
    tree: dict[str, Any] = {"shape": dict(shape)} if shape is not None else {}
    if shape is None:
        tree = {name: dict(fields) for name, fields in PRESETS[preset].items()}
    for name, fields in (("memory", memory), ("bytes", bytes)):
        tree[name] = {**tree.get(name, {}), **(fields or {})}
    for override in overrides:
        apply_override(tree, override)
    return validate(CostSetting, tree, origin="the cost setting")


_MAX_CONFIG_BYTES = 2**22
_NAMES: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "num_heads"),
    "num_kv_heads": ("num_key_value_heads",),
    "width": ("hidden_size", "n_embd", "d_model"),
    "mlp_width": ("intermediate_size", "n_inner"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
}
_PLAIN_MLP = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "starcoder2", "nemotron")


def read_shape(folder: str | Path) -> dict[str, Any]:
    """Fields of `ModelShape` from the config.json of a Hugging Face model folder.

    Read as JSON, so that no code of the folder runs. The `vocab_size` of a strata model is sealed:
    a mapping that holds it as `value`.

    Raises:
        ModelError: no config.json, not JSON, numbers missing, or a mixture of experts.
    """
    path = Path(folder)
    path = path / "config.json" if path.is_dir() else path
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_CONFIG_BYTES + 1)
        tree = json.loads(raw) if len(raw) <= _MAX_CONFIG_BYTES else None
    except FileNotFoundError:
        raise ModelError(f"no config.json in {folder}: give a Hugging Face model folder") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON: give a Hugging Face model folder") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} holds no configuration: give a Hugging Face model folder")
    text = tree.get("text_config")
    tree = text if isinstance(text, dict) else tree
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(tree.get(key), int) and tree[key] > 1:
            raise ModelError(
                f"{path} is a mixture of {tree[key]} experts: give its shape with --set, "
                "mlp_width being what one token uses"
            )
    found = {name: _first(tree, keys) for name, keys in _NAMES.items()}
    if found["num_kv_heads"] is None:
        found["num_kv_heads"] = found["num_heads"]
    if found["head_dim"] is None and found["width"] and found["num_heads"]:
        found["head_dim"] = found["width"] // found["num_heads"]
    if found["mlp_width"] is None and found["width"] and str(tree.get("model_type")) == "gpt2":
        found["mlp_width"] = 4 * found["width"]
    missing = [_NAMES[name][0] for name, value in found.items() if value is None]
    if missing:
        raise ModelError(
            f"{path} does not say {', '.join(missing)}: give a decoder's folder, or the shape with "
            "--set"
        )
    matrices = 2 if str(tree.get("model_type")) in _PLAIN_MLP else 3
    return {**found, "mlp_matrices": matrices}


def _first(tree: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    for key in keys:
        value = tree.get(key)
        if isinstance(value, dict):  # sealed
            value = value.get("value")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None

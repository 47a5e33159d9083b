"""The arms of `capacity_study.py`: models by name, sized so that they may be compared.

A model is a Llama of four layers. Where an arm differs by more than its memory, the width of its
feed-forward layers makes up for it, so that its active FLOPs, or its parameters, come out as asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field

from strata.config import FrozenConfig, validate
from strata.errors import ConfigError
from strata.layers import ExpertsConfig, MemoryLayerConfig
from strata.models import Counts, ModelConfig, build, count

SEQUENCE_TOKENS = 64
NUM_LAYERS = 4
HALF_KEYS = 256  # 2^16 rows
EXPOSURES = (10, 30, 100)
USUAL = 30
# Rows from 2^12 to 2^18, half a power of two apart: a table has a square number of them.
ROW_STEPS = (64, 91, 128, 181, 256, 362, 512)

# Where a decoder of 24 layers had them in the paper, in one of four.
ONE, LATE, SPREAD, MANY = (2,), (2, 3), (1, 3), (1, 2, 3)

Keys = Mapping[str, Any]


class Shape(FrozenConfig):
    """The dense model that all others are measured by, and what memory layers have in common.

    Attributes:
        hidden: width of the decoder.
        intermediate: of its feed-forward layers.
        head_dim: width of an attention head.
        num_heads, top_k, key_dim: of memory layers; scores cost half-keys times the last.
    """

    hidden: int = Field(default=32, ge=8)
    intermediate: int = Field(default=128, ge=1)
    head_dim: int = Field(default=16, ge=2)
    num_heads: int = Field(default=1, ge=1)
    top_k: int = Field(default=16, ge=1)
    key_dim: int = Field(default=16, ge=2)


PLAIN: Keys = {"gate": "none", "query_norm": "none", "key_norm": "none"}


@dataclass(frozen=True)
class Arm:
    """A model and what it is told.

    Attributes:
        name: names the run.
        exposures: how often it is told each fact.
        memory: of its memory layers; None has none.
        num_experts: feed-forward layers beside one another; None has one.
        times_width: width of the decoder, in those of the dense model.
        times_flops: active FLOPs, in those of the dense model.
        as_many_as: match the parameters of this arm instead of the FLOPs.
        optim: keys of the optimizers that differ.
    """

    name: str
    exposures: int = USUAL
    memory: Keys | None = None
    num_experts: int | None = None
    times_width: int = 1
    times_flops: float = 1.0
    as_many_as: str | None = None
    optim: Keys = field(default_factory=dict)

    def memory_config(self, shape: Shape) -> MemoryLayerConfig | None:
        """The memory layers."""
        if self.memory is None:
            return None
        common = shape.model_dump(include={"num_heads", "top_k", "key_dim"})
        keys = {"layers": MANY, "num_half_keys": HALF_KEYS, **common, **self.memory}
        return validate(MemoryLayerConfig, keys, origin=f"memory of {self.name}")

    def model(self, shape: Shape, vocab_size: int, *, intermediate: int) -> ModelConfig:
        """The decoder, with feed-forward layers of this width."""
        hidden = self.times_width * shape.hidden
        host = {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": max(1, hidden // shape.head_dim),
            "num_key_value_heads": max(1, hidden // shape.head_dim),
            "head_dim": shape.head_dim,
            "max_position_embeddings": SEQUENCE_TOKENS,
            "tie_word_embeddings": True,
            "initializer_range": hidden**-0.5,  # 0.02 is for decoders twenty times as wide
        }
        experts = None if self.num_experts is None else ExpertsConfig(num_experts=self.num_experts)
        return ModelConfig(
            host=host,
            attn_implementation="eager",  # the fused kernel is slower for sequences this short
            experts=experts,
        )

    def counts(self, shape: Shape, vocab_size: int, *, intermediate: int) -> Counts:
        """Sizes and FLOPs, without allocating anything."""
        config = self.model(shape, vocab_size, intermediate=intermediate)
        model = build(config, self.memory_config(shape), device="meta")
        return count(model, sequence_tokens=SEQUENCE_TOKENS)

    def sized(self, shape: Shape, vocab_size: int) -> tuple[ModelConfig, Counts]:
        """The decoder whose feed-forward layers give it the FLOPs or parameters asked for.

        Raises:
            ConfigError: they cannot: too much is spent elsewhere.
        """
        key = (repr(replace(self, name="", exposures=USUAL, optim={})), shape, vocab_size)
        if key not in _SIZED:
            _SIZED[key] = _size(self, shape, vocab_size)
        return _SIZED[key]


def _plus(name: str, *, optim: Keys | None = None, **memory: Any) -> Arm:
    return Arm(name, memory=memory, optim=optim or {})


ARCHITECTURES = (
    Arm("dense"),
    Arm("moe", num_experts=50),
    Arm("peer", memory={"kind": "peer", "layers": ONE, "num_half_keys": 181, "gate": "none"}),
    Arm("memory", memory={"layers": ONE, **PLAIN}),
    _plus("memory_plus"),
)
LARGER = (
    Arm("dense_4x", times_width=2, times_flops=4.0),
    Arm("dense_params", times_width=4, as_many_as="memory_plus"),
)
ABLATIONS = (
    _plus("one_layer", layers=ONE),
    _plus("late_layers", layers=LATE),
    _plus("spread_layers", layers=SPREAD),
    _plus("no_gate", gate="none"),
    _plus("one_layer_no_gate", layers=ONE, gate="none"),
    _plus("own_tables", share_values=False),
    # Three tables of 148^2 rows are as many as one of 256^2.
    _plus("own_small_tables", share_values=False, num_half_keys=148),
    _plus("adam_rows", optim={"value_algorithm": "adam", "value_lr": 0.005}),
    _plus("sgd_rows", optim={"value_algorithm": "sgd", "value_lr": 1.0}),
    Arm("peer_layers", memory={"kind": "peer", "num_half_keys": 181, "gate": "none"}),
)


def rows_name(half_keys: int) -> str:
    """The arm with a table of so many half-keys."""
    return "memory_plus" if half_keys == HALF_KEYS else f"rows_{half_keys**2}"


def exposed_name(name: str, exposures: int) -> str:
    """The arm that is told as often."""
    return name if exposures == USUAL else f"{name}_{exposures}"


_ALL = (
    *ARCHITECTURES,
    *LARGER,
    *(
        replace(arm, name=exposed_name(arm.name, times), exposures=times)
        for times in EXPOSURES
        if times != USUAL
        for arm in ARCHITECTURES
    ),
    *(_plus(rows_name(n), num_half_keys=n) for n in ROW_STEPS if n != HALF_KEYS),
    *ABLATIONS,
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ALL}

# What is compared with what: label -> arm.
STUDIES: dict[str, dict[str, str]] = {
    "architectures": {arm.name: arm.name for arm in (*ARCHITECTURES, *LARGER)},
    "exposures": {
        f"{arm.name}, {times}": exposed_name(arm.name, times)
        for arm in ARCHITECTURES
        for times in EXPOSURES
    },
    "rows": {f"{n * n:,}": rows_name(n) for n in ROW_STEPS},
    "placement": {
        "one layer": "one_layer",
        "late": "late_layers",
        "spread": "spread_layers",
        "all but the first": "memory_plus",
    },
    "gate": {
        "three layers, gate": "memory_plus",
        "three layers, none": "no_gate",
        "one layer, gate": "one_layer",
        "one layer, none": "one_layer_no_gate",
    },
    "sharing": {
        "one table": "memory_plus",
        "a table each": "own_tables",
        "a small table each": "own_small_tables",
    },
    "row optimizer": {"Adagrad": "memory_plus", "Adam": "adam_rows", "SGD": "sgd_rows"},
    "peer": {
        "Memory+": "memory_plus",
        "PEER, one layer": "peer",
        "PEER, its layers": "peer_layers",
    },
}


_SIZED: dict[tuple[str, Shape, int], tuple[ModelConfig, Counts]] = {}  # each takes a tenth second


def _size(arm: Arm, shape: Shape, vocab_size: int) -> tuple[ModelConfig, Counts]:
    unit: Literal["params_total", "flops_per_token"]
    if arm.as_many_as is not None:
        unit = "params_total"
        target = ARMS[arm.as_many_as].sized(shape, vocab_size)[1].params_total
    else:
        unit = "flops_per_token"
        dense = ARMS["dense"].counts(shape, vocab_size, intermediate=shape.intermediate)
        target = round(arm.times_flops * dense.flops_per_token)
    few, many = 8, 1032
    low, high = (
        getattr(arm.counts(shape, vocab_size, intermediate=width), unit) for width in (few, many)
    )
    width = few + round((target - low) * (many - few) / (high - low))
    if width < 1:
        raise ConfigError(f"{unit} {target:,} is less than the rest of this arm takes ({low:,})")
    model = arm.model(shape, vocab_size, intermediate=width)
    return model, arm.counts(shape, vocab_size, intermediate=width)


# A quarter of an hour: the claims but for equally many parameters, and five sizes of the table.
QUICK = (
    *(arm.name for arm in ARCHITECTURES),
    "dense_4x",
    *(rows_name(n) for n in (64, 128, 181, 512)),  # beside the usual 256
)

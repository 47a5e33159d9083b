"""The arms of `capacity_study.py`: models by name, sized so that they may be compared.

A model is a Llama of four layers. Where an arm differs by more than its memory, the width of its
feed-forward layers makes up for it, so that its active FLOPs, or its parameters, come out as asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from strata.config import validate
from strata.errors import ConfigError
from strata.layers import ExpertsConfig, MemoryLayerConfig
from strata.models import Counts, ModelConfig, build, count

SEQUENCE_TOKENS = 64
NUM_LAYERS = 4
HIDDEN, INTERMEDIATE, HEADS = 32, 128, 2
HALF_KEYS = 256  # 2^16 rows
EXPOSURES = (10, 30, 100)
USUAL = 30
# Rows from 2^12 to 2^18, half a power of two apart: a table has a square number of them.
ROW_STEPS = (64, 91, 128, 181, 256, 362, 512)

# Where a decoder of 24 layers had them in the paper, in one of four.
ONE, LATE, SPREAD, MANY = (2,), (2, 3), (1, 3), (1, 2, 3)

Keys = Mapping[str, Any]
PLAIN: Keys = {"gate": "none", "query_norm": "none", "key_norm": "none"}


@dataclass(frozen=True)
class Arm:
    """A model and what it is told.

    Attributes:
        name: names the run.
        exposures: how often it is told each fact.
        memory: of its memory layers; None has none.
        num_experts: feed-forward layers beside one another; None has one.
        hidden: width of the decoder.
        times_flops: active FLOPs, in those of the dense model.
        as_many_as: match the parameters of this arm instead of the FLOPs.
        optim: keys of the optimizers that differ.
    """

    name: str
    exposures: int = USUAL
    memory: Keys | None = None
    num_experts: int | None = None
    hidden: int = HIDDEN
    times_flops: float = 1.0
    as_many_as: str | None = None
    optim: Keys = field(default_factory=dict)

    def memory_config(self) -> MemoryLayerConfig | None:
        """The memory layers."""
        if self.memory is None:
            return None
        keys = {**COMMON_MEMORY, **self.memory}
        return validate(MemoryLayerConfig, keys, origin=f"memory of {self.name}")

    def host(self, vocab_size: int, *, intermediate: int) -> dict[str, Any]:
        """Keys of the decoder's configuration."""
        return {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": HEADS * self.hidden // HIDDEN,
            "num_key_value_heads": HEADS * self.hidden // HIDDEN,
            "max_position_embeddings": SEQUENCE_TOKENS,
            "tie_word_embeddings": True,
            "initializer_range": self.hidden**-0.5,  # 0.02 is for decoders twenty times as wide
        }

    def model(self, vocab_size: int, *, intermediate: int) -> ModelConfig:
        """The decoder."""
        experts = None if self.num_experts is None else ExpertsConfig(num_experts=self.num_experts)
        return ModelConfig(
            host=self.host(vocab_size, intermediate=intermediate),
            attn_implementation="eager",  # the fused kernel is slower for sequences this short
            experts=experts,
        )

    def counts(self, vocab_size: int, *, intermediate: int) -> Counts:
        """Sizes and FLOPs, without allocating anything."""
        model = build(
            self.model(vocab_size, intermediate=intermediate), self.memory_config(), device="meta"
        )
        return count(model, sequence_tokens=SEQUENCE_TOKENS)

    def sized(self, vocab_size: int) -> tuple[ModelConfig, Counts]:
        """The decoder whose feed-forward layers give it the FLOPs or parameters asked for.

        Raises:
            ConfigError: they cannot: too much is spent elsewhere.
        """
        return _sized(_key(self), vocab_size)


COMMON_MEMORY: Keys = {
    "layers": list(MANY),
    "num_half_keys": HALF_KEYS,
    "num_heads": 1,
    "top_k": 16,
    "key_dim": 16,
}


def _plus(name: str, *, optim: Keys | None = None, **memory: Any) -> Arm:
    return Arm(name, memory=memory, optim=optim or {})


ARCHITECTURES = (
    Arm("dense"),
    Arm("moe", num_experts=43),
    Arm("peer", memory={"kind": "peer", "layers": ONE, "num_half_keys": 181, "gate": "none"}),
    Arm("memory", memory={"layers": ONE, **PLAIN}),
    _plus("memory_plus"),
)
LARGER = (
    Arm("dense_4x", hidden=64, times_flops=4.0),
    Arm("dense_params", hidden=128, as_many_as="memory_plus"),
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


def _key(arm: Arm) -> Arm:
    return replace(arm, name="", exposures=USUAL, optim={})


_Sized = tuple[ModelConfig, Counts]
_kept: dict[tuple[str, int], _Sized] = {}


def _sized(arm: Arm, vocab_size: int) -> _Sized:
    key = (repr(arm), vocab_size)
    if key not in _kept:
        _kept[key] = _size(arm, vocab_size)
    return _kept[key]


def _size(arm: Arm, vocab_size: int) -> _Sized:
    unit: Literal["params_total", "flops_per_token"]
    if arm.as_many_as is not None:
        unit = "params_total"
        target = ARMS[arm.as_many_as].sized(vocab_size)[1].params_total
    else:
        unit = "flops_per_token"
        dense = Arm("dense").counts(vocab_size, intermediate=INTERMEDIATE)
        target = round(arm.times_flops * dense.flops_per_token)
    few, many = 8, 1032
    low, high = (getattr(arm.counts(vocab_size, intermediate=width), unit) for width in (few, many))
    width = few + round((target - low) * (many - few) / (high - low))
    if width < 1:
        raise ConfigError(f"{unit} {target:,} is less than the rest of this arm takes ({low:,})")
    return arm.model(vocab_size, intermediate=width), arm.counts(vocab_size, intermediate=width)


# A quarter of an hour: the claims but for equally many parameters, and five sizes of the table.
QUICK = (
    *(arm.name for arm in ARCHITECTURES),
    "dense_4x",
    *(rows_name(n) for n in (64, 128, 181, 512)),  # beside the usual 256
)

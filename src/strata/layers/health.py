"""Is the memory alive? Share of rows used, evenness of use, and the hottest row, per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from strata.layers.peer import PEER
from strata.layers.product_key import ProductKeyMemory
from strata.layers.usage import RowUsage


@dataclass(frozen=True)
class LayerHealth:
    """Use of one layer's rows over the tracked forward passes.

    Attributes:
        rows_used: share of the table's rows picked at least once, 0..1.
        entropy: entropy of use over its greatest possible value, log(rows), 0..1.
        kl_nats: divergence of use from uniform, nats; log(rows) * (1 - entropy).
        hottest: share of all picks that went to the hottest row, 0..1.
        picks: picks counted.
    """

    rows_used: float
    entropy: float
    kl_nats: float
    hottest: float
    picks: int


def memory_layers(model: nn.Module) -> Iterator[tuple[str, ProductKeyMemory | PEER]]:
    """The memory layers in a model with their names, in order."""
    for name, module in model.named_modules():
        if isinstance(module, ProductKeyMemory | PEER):
            yield name, module


def track_usage(model: nn.Module, *, enabled: bool = True) -> None:
    """Start or stop counting picks in every memory layer, in training mode only."""
    for _, layer in memory_layers(model):
        if not enabled:
            layer.usage = None
        elif layer.usage is None:
            layer.usage = RowUsage(layer.keys.num_half_keys**2)


def sum_usage(model: nn.Module, add_up: Callable[[Tensor], object]) -> None:
    """Let each layer's counts become those of all processes.

    Args:
        model: any module with memory layers.
        add_up: sums an int32 tensor over the processes, in place.
    """
    for _, layer in memory_layers(model):
        if layer.usage is not None and layer.usage.counts_r is not None:
            add_up(layer.usage.counts_r)


def health(model: nn.Module, *, reset: bool = True) -> dict[str, LayerHealth]:
    """Summarise the picks counted since `track_usage` or the last reset.

    Args:
        model: any module with memory layers.
        reset: start a new count.

    Returns:
        One entry per layer that counted anything, by layer name.
    """
    report = {}
    for name, layer in memory_layers(model):
        usage = layer.usage
        if usage is None or usage.counts_r is None or not usage.counts_r.any():
            continue
        report[name] = summarise(usage.counts_r)
        if reset:
            usage.reset()
    return report


def summarise(counts_r: Tensor) -> LayerHealth:
    """Health figures of one vector of pick counts, (rows,), integer, not all zero."""
    used = counts_r[counts_r > 0].double()
    picks = int(used.sum())
    share = used / picks
    entropy_nats = -float((share * share.log()).sum())
    limit = math.log(len(counts_r)) if len(counts_r) > 1 else 1.0
    return LayerHealth(
        rows_used=len(used) / len(counts_r),
        entropy=entropy_nats / limit,
        kl_nats=limit - entropy_nats if len(counts_r) > 1 else 0.0,
        hottest=float(share.max()),
        picks=picks,
    )

"""What a process of a run sends in a step, collective by collective, from shapes alone.

Each `Exchange` is a call that `sharding`, `sharded_rows` or `layers.collectives` makes, with the
bytes of its tensor; how many of them a process sends depends on who carries it out. Rings (NCCL's
for large tensors) send what must be sent. gloo adds up by rings too, but has no reduce-scatter:
torch adds up the whole tensor everywhere and keeps a part, which sends twice as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from strata.layers import PEER, ProductKeyMemory, memory_layers
from strata.train.optim import parameter_groups
from strata.train.sharded_rows import adds_up_all
from strata.train.shares import Shares

Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
Backend = Literal["rings", "gloo"]
BACKENDS: tuple[Backend, ...] = ("rings", "gloo")
INT32 = FLOAT = 4
INT64 = DOUBLE = 8


@dataclass(frozen=True)
class Exchange:
    """One collective of a step, or several of one kind.

    Attributes:
        kind: what is exchanged.
        operation: how.
        whole_bytes: of the tensor that every process has in the end (all_gather, all_reduce) or
            brings along (reduce_scatter, all_to_all); several calls together.
        processes: of the group that takes part.
        per_step: how often in a step; less than one if not in every step.
    """

    kind: str
    operation: Operation
    whole_bytes: float
    processes: int
    per_step: float = 1

    def sent_bytes(self, backend: Backend) -> float:
        """What one process sends in a step, on average."""
        g = self.processes
        passes = 1
        if self.operation == "all_reduce" or (
            backend == "gloo" and self.operation == "reduce_scatter"
        ):
            passes = 2  # a ring that adds up, and one that hands round
        return self.per_step * passes * self.whole_bytes * (g - 1) / g


def sent_bytes(exchanges: list[Exchange], backend: Backend) -> dict[str, int]:
    """Bytes that one process sends in a step, by kind."""
    sums: dict[str, float] = {}
    for exchange in exchanges:
        sums[exchange.kind] = sums.get(exchange.kind, 0) + exchange.sent_bytes(backend)
    return {kind: round(num_bytes) for kind, num_bytes in sums.items()}


def exchanges(model: PreTrainedModel, shares: Shares) -> list[Exchange]:
    """All collectives of a step without validation and checkpoint.

    Args:
        model: not spread yet, on any device.
        shares: how the processes share it.
    """
    if shares.processes == 1:
        return []
    found = [*_numbers(model, shares), *_dense(model, shares), *_health(model, shares)]
    if shares.memory_group > 1:
        found += [exchange for layer in _layers(model) for exchange in _picks(layer, shares)]
    found += _rows(model, shares)
    return [exchange for exchange in found if exchange.processes > 1 and exchange.whole_bytes]


def _dense(model: PreTrainedModel, shares: Shares) -> Iterator[Exchange]:
    """Weights before they are used, and gradients."""
    w, trained = shares.processes, parameter_groups(model)
    weights = [*trained.decay, *trained.no_decay]
    if shares.dense == "replicated":
        num_bytes = sum(p.numel() * p.element_size() for p in weights)
        yield Exchange("dense gradients", "all_reduce", num_bytes, w)
        return
    layers, rest = shares.fsdp_groups(model)
    forward = sum(map(shares.padded_bytes, [*rest, *(p for layer in layers for p in layer)]))
    yield Exchange("dense weights", "all_gather", forward, w, shares.accumulate)
    # What lies outside the layers stays whole until the backward pass has used it; where it ends
    # the layer before is on its way already.
    again = [p for layer in layers[max(0, _first_trained(model) - 1) :] for p in layer]
    backward = sum(map(shares.padded_bytes, again))
    yield Exchange("dense weights", "all_gather", backward, w, shares.accumulate)
    yield Exchange("dense gradients", "reduce_scatter", sum(map(shares.padded_bytes, weights)), w)


def _picks(layer: MemoryLayer, shares: Shares) -> Iterator[Exchange]:
    """What one memory layer exchanges in its group, forward and back."""
    module, g, n = layer.module, shares.memory_group, shares.tokens
    p = module.keys.num_heads * module.keys.top_k
    rows = INT32 if module.tables[0].num_rows <= 2**31 else INT64
    picks, width = g * n * p, module.tables[0].width

    def gather(kind: str, num_bytes: int, times: int) -> Exchange:
        return Exchange(kind, "all_gather", num_bytes, g, times)

    def scatter(kind: str, num_bytes: int, times: int) -> Exchange:
        return Exchange(kind, "reduce_scatter", num_bytes, g, times)

    def swap(num_bytes: int, times: int) -> Exchange:
        return Exchange("sums", "all_to_all", num_bytes, g, times)

    backward = shares.accumulate
    forward = backward * (2 if shares.computed_twice else 1)
    yield gather("picks", picks * rows, forward)
    yield gather("pick weights", picks * FLOAT, forward)
    yield swap(n * width * FLOAT, forward if layer.output_saved else backward)
    yield swap(n * width * FLOAT, backward)
    yield scatter("pick gradients", picks * FLOAT, backward)
    if isinstance(module, PEER):
        yield gather("picks", picks * rows, forward)
        yield swap(n * width * layer.hidden_bytes, forward)
        yield scatter("pick weights", picks * FLOAT, forward)
        yield gather("pick gradients", picks * FLOAT, backward)
        if layer.input_trained:
            yield swap(n * width * layer.hidden_bytes, backward)


def _rows(model: PreTrainedModel, shares: Shares) -> Iterator[Exchange]:
    """What the row optimizer exchanges for the value tables that are trained."""
    r, g = shares.replicas, shares.memory_group
    for table in parameter_groups(model).tables:
        own, all_rows = shares.distinct_rows(model, table)
        columns = table.width // g
        yield Exchange("replica rows", "all_gather", r * INT64, r)  # how many
        if adds_up_all(own, replicas=r, num_rows=table.num_rows):
            num_bytes = table.num_rows * (columns + 1) * FLOAT
            yield Exchange("replica rows", "all_reduce", num_bytes, r)
        else:
            yield Exchange("replica rows", "all_gather", r * own * INT32, r)
            yield Exchange("replica rows", "all_gather", r * own * columns * FLOAT, r)
        yield Exchange("row squares", "all_reduce", all_rows * FLOAT, g)


def _health(model: PreTrainedModel, shares: Shares) -> Iterator[Exchange]:
    """Counts of picked rows, in the steps that look at them."""
    if shares.health_every is not None:
        for _, layer in memory_layers(model):
            num_bytes = layer.tables[0].num_rows * INT32
            times = 1 / shares.health_every
            yield Exchange("health", "all_reduce", num_bytes, shares.processes, times)


def _numbers(model: PreTrainedModel, shares: Shares) -> Iterator[Exchange]:
    """Single numbers that all processes must know: labels, loss, norm, whether to stop."""
    w, trained = shares.processes, parameter_groups(model)
    weights = [*trained.decay, *trained.no_decay]
    yield Exchange("numbers", "all_reduce", DOUBLE + DOUBLE + FLOAT, w)
    if shares.dense == "replicated":  # which weights have a gradient
        yield Exchange("numbers", "all_reduce", len(weights) * FLOAT, w)
    else:  # the norm of each weight's gradient, one by one
        num_bytes = sum(weight.element_size() for weight in weights)
        yield Exchange("numbers", "all_reduce", num_bytes, w)


@dataclass(frozen=True)
class MemoryLayer:
    """A memory layer in its place.

    Attributes:
        module: itself.
        input_trained: whether anything before it is trained, so that its input has a gradient.
        output_saved: whether a backward pass that computes it again goes beyond the table's sums:
            it ends with the last tensor that is wanted.
        hidden_bytes: of one number of its input.
    """

    module: ProductKeyMemory | PEER
    input_trained: bool
    output_saved: bool
    hidden_bytes: int


def _layers(model: PreTrainedModel) -> Iterator[MemoryLayer]:
    first = _first_trained(model)
    embeddings = model.get_input_embeddings()
    trained = any(p.requires_grad for p in embeddings.parameters())
    hidden_bytes = next(embeddings.parameters()).element_size()
    for number, layer in enumerate(model.get_decoder().layers):
        for _, module in memory_layers(layer):
            followed = (
                isinstance(module, ProductKeyMemory) and module.value_proj is not None,
                module.scalar_gate.kind != "none",
                module.value_dropout.p > 0,
                hasattr(layer, "post_feedforward_layernorm"),
            )
            yield MemoryLayer(
                module,
                input_trained=trained or number > first,
                output_saved=any(followed),
                hidden_bytes=hidden_bytes,
            )


def _first_trained(model: PreTrainedModel) -> int:
    """The first layer whose output has a gradient."""
    if any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        return 0
    layers: nn.ModuleList = model.get_decoder().layers
    trained = (n for n, x in enumerate(layers) if any(p.requires_grad for p in x.parameters()))
    return next(trained, len(layers))

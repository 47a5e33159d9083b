"""What each process of a run holds and sends, by arithmetic: nothing is allocated or started.

Rows and columns of a table, tokens and picks are named as in docs/many-processes.md, where the
formulas stand with their reasons; tests compare them with what processes hold and send.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from strata.layers import PEER, ProductKeyMemory, ValueTable, memory_layers, value_tables
from strata.train.activations import Activations, activations
from strata.train.optim import parameter_groups
from strata.train.recipe import Recipe
from strata.train.sharded_rows import ROWS_AT_ONCE, adds_up_all
from strata.train.sharding import BUCKET_BYTES
from strata.train.shares import Shares, check_columns_of
from strata.train.traffic import BACKENDS, Backend, exchanges, sent_bytes

# When it is held: all the time, until a backward pass has ended, or while rows are updated.
ALWAYS, PASSES, ROWS = "always", "passes", "rows"
QUEUED = "queued uses of rows"


@dataclass(frozen=True)
class Held:
    """Something that a process keeps.

    Attributes:
        kind: what.
        num_bytes: in one process, the first; no other holds more.
        when: "always", in the "passes" or while "rows" are updated.
    """

    kind: str
    num_bytes: int
    when: str


@dataclass(frozen=True)
class Footprint:
    """What a process of a run holds and sends.

    Attributes:
        shares: who shares what.
        held: by kind.
        sent: bytes a step by kind, as rings send them and as gloo does.
        copied_bytes: of what is copied to CPU memory while a checkpoint is written beside training
            (`run.checkpoint_async`); not part of the peak.
    """

    shares: Shares
    held: list[Held]
    sent: dict[Backend, dict[str, int]]
    copied_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once: rows are updated after the gradients have been used."""
        sums = {when: 0 for when in (ALWAYS, PASSES, ROWS)}
        for part in self.held:
            sums[part.when] += part.num_bytes
        return sums[ALWAYS] + max(sums[PASSES], sums[ROWS])

    def as_dict(self) -> dict[str, Any]:
        """Plain mapping, for JSON."""
        return {
            "shares": {**asdict(self.shares), "replicas": self.shares.replicas},
            "device_bytes": {
                **{_key(part.kind): part.num_bytes for part in self.held},
                "peak": self.peak_bytes,
            },
            "checkpoint_copy_bytes": self.copied_bytes,
            "sent_bytes_per_step": {
                backend: {
                    **{_key(kind): num_bytes for kind, num_bytes in kinds.items()},
                    "total": sum(kinds.values()),
                }
                for backend, kinds in self.sent.items()
            },
        }


def _key(kind: str) -> str:
    return kind.replace(" ", "_")


def footprint(
    model: PreTrainedModel,
    recipe: Recipe,
    shares: Shares,
    *,
    waiting: Activations | None = None,
) -> Footprint:
    """What one of the processes that share a run holds and sends.

    Args:
        model: as the recipe builds it, not spread; on the meta device it takes no memory.
        recipe: the run.
        shares: who shares what, see `shares_of`.
        waiting: what a pass keeps, if that is known already.

    Raises:
        ConfigError: the memory group cannot share rows evenly.
    """
    check_columns_of(model, shares)
    calls = exchanges(model, shares)
    sent: dict[Backend, dict[str, int]] = {b: sent_bytes(calls, b) for b in BACKENDS}
    if waiting is None:
        sequences = shares.tokens // recipe.data.sequence_tokens
        waiting = activations(recipe, sequences=sequences)
    parts = [
        *_dense(model, shares),
        *_tables(model, recipe, shares),
        Held("activations", waiting.saved_bytes, PASSES),
        Held("weights copied by autocast", waiting.copied_bytes, PASSES),
    ]
    saved = sum(p.num_bytes for p in parts if p.when == ALWAYS and p.kind != QUEUED)
    return Footprint(
        shares,
        [part for part in parts if part.num_bytes],
        sent,
        copied_bytes=saved if recipe.run.checkpoint_async else 0,
    )


def _dense(model: PreTrainedModel, shares: Shares) -> list[Held]:
    trained = parameter_groups(model)
    weights = [*trained.decay, *trained.no_decay]
    layers, rest = shares.fsdp_groups(model)
    everything = [*rest, *(p for layer in layers for p in layer)]
    fsdp = shares.dense == "fsdp"
    part = shares.part_bytes if fsdp else _bytes
    whole_gradients = fsdp and shares.accumulate > 1  # summed over processes by the last alone
    gradient = _bytes if whole_gradients else part
    if fsdp:
        # Embeddings and head stay, and so do their gradients. Of a layer there are the weights and
        # those of the next one, its gradients, and the gradients on their way.
        largest = max(sum(map(shares.padded_bytes, layer)) for layer in layers)
        times = 1 if whole_gradients else 2
        gathered = times * sum(map(shares.padded_bytes, rest)) + 2 * times * largest
    elif shares.processes > 1:
        gathered = min(max(BUCKET_BYTES, *map(_bytes, weights)), sum(map(_bytes, weights)))
    else:
        gathered = 0
    return [
        Held("dense weights", sum(map(part, everything)), ALWAYS),
        Held("AdamW state", sum(2 * part(p) + 4 for p in weights), ALWAYS),
        Held("dense gradients", sum(map(gradient, weights)), PASSES),
        Held("gathered weights and gradients", gathered, PASSES),
    ]


def _tables(model: PreTrainedModel, recipe: Recipe, shares: Shares) -> list[Held]:
    tables = value_tables(model).values()
    layers = [layer for _, layer in memory_layers(model)]
    counted = [] if shares.health_every is None else layers
    values = sum(_bytes(p) for table in tables for p in table.parameters()) // shares.memory_group
    state = queued = updates = 0
    for table in parameter_groups(model).tables:
        columns = table.width // shares.memory_group
        state += _state_bytes(table, columns, recipe.optim.value_algorithm)
        bags = shares.tokens * shares.memory_group * shares.accumulate
        picks = [_picks(layer) for layer in layers if table in layer.tables]
        uses = sum(bags * (12 * p + 4 * columns) for p in picks)
        queued += uses
        updates += _update_bytes(model, table, shares, uses=uses, picks=bags * sum(picks))
    return [
        Held("value tables", values, ALWAYS),
        Held("row optimizer state", state, ALWAYS),
        Held(QUEUED, queued, ALWAYS),
        Held("picks of the memory group", _group_bytes(layers, shares), PASSES),
        Held("counts of rows read", sum(4 * x.tables[0].num_rows for x in counted), PASSES),
        Held("row gradients", updates, ROWS),
    ]


def _state_bytes(table: ValueTable, columns: int, algorithm: str) -> int:
    """Of a row optimizer, see `strata.ops.row_update.new_state`."""
    moments = 8 * table.num_rows * columns if algorithm == "adam" else 0
    return moments + (0 if algorithm == "sgd" else 4 * table.num_rows)


def _group_bytes(layers: list[ProductKeyMemory | PEER], shares: Shares) -> int:
    """What the backward pass wants of the other tokens in the group: rows and weights.

    PEER has rows twice, and its columns of all tokens' vectors.
    """
    n, g = shares.tokens, shares.memory_group
    if g == 1 or not layers:
        return 0
    of_layers = [
        n * (20 * _picks(x) * g + 4 * x.tables[0].width)
        if isinstance(x, PEER)
        else 12 * n * _picks(x) * g
        for x in layers
    ]
    return max(of_layers) if shares.computed_twice else sum(of_layers)


def _update_bytes(
    model: nn.Module, table: ValueTable, shares: Shares, *, uses: int, picks: int
) -> int:
    """The most that the update of a table takes beside the table and its state.

    Uses are joined, sorted by row and summed; replicas then hand their rows to each other, which
    are joined, sorted and summed again, or add up all rows, some at a time; an update holds
    gradients, and their squares or steps.
    """
    own, all_rows = shares.distinct_rows(model, table)
    r, columns = shares.replicas, table.width // shares.memory_group
    row, sent = 4 * columns + 8, 4 * columns + 4
    phases = [uses + 16 * picks + own * row, 2 * all_rows * row]
    if r > 1 and adds_up_all(own, replicas=r, num_rows=table.num_rows):
        blocks = 2 * ROWS_AT_ONCE * (sent + 4)
        phases.append(own * row + blocks + 2 * all_rows * row)
    elif r > 1:
        gathered = own * sent + r * own * (2 * sent + 24)
        phases.append(own * row + gathered + all_rows * row)
    return round(max(phases))


def _picks(layer: ProductKeyMemory | PEER) -> int:
    return layer.keys.num_heads * layer.keys.top_k


def _bytes(weight: nn.Parameter) -> int:
    return weight.numel() * weight.element_size()

"""What strata is measured against: torch's own ways, and packages where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from strata.bench.sizes import OpSize

Rivals = tuple[dict[str, "Contestant"], dict[str, str]]  # who takes part, who does not and why


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        step: the timed work.
        probe: does it once and returns what is compared with the truth.
    """

    step: Callable[[], object]
    probe: Callable[[], Tensor]


def topk_rivals(size: OpSize, half_scores: Tensor, *, checked: int) -> Rivals:
    """The usual two stages: top-k of both halves, then top-k of all k * k sums."""

    def two_stages() -> Tensor:
        best = half_scores.topk(size.top_k, dim=-1)
        sums = best.values[:, :, 0, :, None] + best.values[:, :, 1, None, :]
        winners = sums.flatten(2).topk(size.top_k, dim=-1)
        first = best.indices[:, :, 0].gather(-1, winners.indices // size.top_k)
        second = best.indices[:, :, 1].gather(-1, winners.indices % size.top_k)
        _rows = first * size.half_keys + second
        return winners.values

    return {"torch topk, two stages": Contestant(two_stages, lambda: two_stages()[:checked])}, {}


def bag_rivals(
    size: OpSize, values: Tensor, rows: Tensor, weights: Tensor, *, checked: int
) -> Rivals:
    """torch's embedding bag, and gathering rows to sum them."""
    own_weights = weights.to(size.dtype)

    def bag() -> Tensor:
        return F.embedding_bag(rows, values, mode="sum", per_sample_weights=own_weights)

    def gather() -> Tensor:
        return torch.einsum("np,npv->nv", own_weights, values[rows])

    contestants = {
        "torch embedding_bag": Contestant(bag, lambda: bag()[:checked].float()),
        "gather + einsum": Contestant(gather, lambda: gather()[:checked].float()),
    }
    needed = {"gather + einsum": 2 * _gathered_bytes(size)}
    return _those_that_fit(contestants, needed, values.device)


def value_rivals(
    size: OpSize, values: Tensor, rows: Tensor, weights: Tensor, grad_out: Tensor, *, checked: int
) -> Rivals:
    """Forward, both gradients and an update, by torch's and FBGEMM's means.

    Each has a table of its own and is made when it is first run, since most need several times
    the table's memory.
    """
    own_weights, own_grad = weights.to(size.dtype), grad_out.to(size.dtype)

    def torch_way(forward: Callable[[Tensor, Tensor], Tensor], optimizer: Any) -> Contestant:
        table = torch.nn.Parameter(values.clone())
        steps = optimizer([table])

        def step() -> Tensor:
            wanted = own_weights.detach().requires_grad_()
            out = forward(table, wanted)
            out.backward(own_grad)
            steps.step()
            steps.zero_grad()
            return out.detach()

        with torch.no_grad():
            first = forward(table, own_weights)[:checked].float()
        return Contestant(step, lambda: first)

    def dense_bag(table: Tensor, wanted: Tensor) -> Tensor:
        return F.embedding_bag(rows, table, mode="sum", per_sample_weights=wanted)

    def sparse_bag(table: Tensor, wanted: Tensor) -> Tensor:
        return F.embedding_bag(rows, table, mode="sum", per_sample_weights=wanted, sparse=True)

    def gather(table: Tensor, wanted: Tensor) -> Tensor:
        return torch.einsum("np,npv->nv", wanted, table[rows])

    def fused_adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-3, fused=True)

    makers: dict[str, tuple[int, Callable[[], Contestant]]] = {
        "embedding_bag + fused Adam": (
            4 * size.table_bytes,
            lambda: torch_way(dense_bag, fused_adam),
        ),
        "fbgemm row-wise Adagrad": (
            2 * size.table_bytes,
            lambda: _fbgemm(size, values, rows, weights, grad_out, checked=checked),
        ),
        "sparse embedding_bag + SparseAdam": (
            3 * size.table_bytes + 4 * _gathered_bytes(size),
            lambda: torch_way(sparse_bag, lambda p: torch.optim.SparseAdam(p, lr=1e-3)),
        ),
        "gather + einsum + fused Adam": (
            4 * size.table_bytes + 3 * _gathered_bytes(size),
            lambda: torch_way(gather, fused_adam),
        ),
    }
    return _make(makers, values.device)


def layer_rivals(size: OpSize, hidden: Tensor) -> Rivals:
    """Whole layers of other packages, trained as their READMEs do, with fused Adam."""
    if size.dtype != torch.float32:
        return {}, {"product-key-memory": "its table is fp32"}

    def trained(layer: torch.nn.Module) -> Contestant:
        layer = layer.to(hidden.device)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, fused=True)

        def step() -> Tensor:
            out = layer(hidden[None])
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return out.detach()

        return Contestant(step, step)

    return _make(
        {
            "product-key-memory": (
                4 * size.table_bytes,
                lambda: trained(product_key_memory(size)),
            ),
            "PEER-pytorch (two tables)": (
                8 * size.table_bytes + 6 * _gathered_bytes(size),
                lambda: trained(peer(size)),
            ),
        },
        hidden.device,
    )


# Both packages name the width of ONE half-key, `PKM(dim_head=)` and `PEER(dim_key=)`; strata's
# `key_dim` is both halves together. So each layer scores h * 2 * m half-keys of `half_key_dim`.


def product_key_memory(size: OpSize) -> torch.nn.Module:
    """lucidrains' PKM with as many half-keys, of the same width, and as many picks as ours."""
    return importlib.import_module("product_key_memory").PKM(
        dim=size.width,
        heads=size.heads,
        num_keys=size.half_keys,
        topk=size.top_k,
        dim_head=size.half_key_dim,
    )


def peer(size: OpSize) -> torch.nn.Module:
    """lucidrains' PEER; its default, non-competing scores, keeps one expert a head of the top-k."""
    return importlib.import_module("PEER_pytorch").PEER(
        dim=size.width,
        heads=size.heads,
        num_experts=size.rows,
        num_experts_per_head=size.top_k,
        dim_key=size.half_key_dim,
        non_competing_scores=False,
    )


def _fbgemm(
    size: OpSize, values: Tensor, rows: Tensor, weights: Tensor, grad_out: Tensor, *, checked: int
) -> Contestant:
    """FBGEMM's table-batched embedding: the update happens inside its backward."""
    ops: Any = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common: Any = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    configs: Any = importlib.import_module("fbgemm_gpu.split_embedding_configs")
    if size.dtype != torch.float32:
        raise ImportError("its CPU tables are fp32")
    on_cpu = values.device.type == "cpu"
    place = common.EmbeddingLocation.HOST if on_cpu else common.EmbeddingLocation.DEVICE
    where = ops.ComputeDevice.CPU if on_cpu else ops.ComputeDevice.CUDA
    bags = ops.SplitTableBatchedEmbeddingBagsCodegen(
        [(size.rows, size.width, place, where)],
        optimizer=configs.EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=1e-3,
        pooling_mode=common.PoolingMode.SUM,
        device=values.device,
    )
    bags.split_embedding_weights()[0].data.copy_(values)
    flat = rows.flatten()
    offsets = torch.arange(0, len(flat) + 1, size.picks, device=rows.device)

    def forward(wanted: Tensor) -> Tensor:
        return bags(flat, offsets, per_sample_weights=wanted.flatten())

    def step() -> Tensor:
        wanted = weights.detach().requires_grad_()
        out = forward(wanted)
        out.backward(grad_out)
        return out.detach()

    with torch.no_grad():
        first = forward(weights)[:checked]
    return Contestant(step, lambda: first)


def _make(makers: dict[str, tuple[int, Callable[[], Contestant]]], device: torch.device) -> Rivals:
    contestants, skipped = {}, {}
    free_bytes = _free_bytes(device)
    for name, (needed_bytes, maker) in makers.items():
        if needed_bytes > 0.8 * free_bytes:
            skipped[name] = f"needs {needed_bytes / 1e9:.0f} GB, {free_bytes / 1e9:.0f} GB are free"
            continue
        try:
            contestants[name] = maker()
        except (ImportError, OSError) as error:  # OSError: built for another torch
            skipped[name] = " ".join(str(error).split())[:120]
        else:
            free_bytes -= needed_bytes  # most of it is taken later, by gradients and optimizers
    return contestants, skipped


def _those_that_fit(
    contestants: dict[str, Contestant], needed: dict[str, int], device: torch.device
) -> Rivals:
    free_bytes = _free_bytes(device)
    skipped = {
        name: f"needs {needed_bytes / 1e9:.0f} GB, {free_bytes / 1e9:.0f} GB are free"
        for name, needed_bytes in needed.items()
        if needed_bytes > 0.8 * free_bytes
    }
    return {name: c for name, c in contestants.items() if name not in skipped}, skipped


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _gathered_bytes(size: OpSize) -> int:
    return size.tokens * size.picks * size.row_bytes

"""Counting parameters and FLOPs from a model's shapes; works on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn
from transformers import PreTrainedModel

from strata.layers import PEER, Experts, ProductKeyMemory, ProductKeys, value_tables


@dataclass(frozen=True)
class Counts:
    """Sizes of a model.

    Attributes:
        params_total: all parameters, shared ones once.
        params_dense: parameters outside value tables.
        params_values: numbers in value tables, as floats or as codes; scales are not counted.
        params_active: parameters that one token uses: dense ones, but one expert of those beside
            one another, and per memory layer the rows that it reads.
        flops_per_token: floating-point operations of one token's forward pass, at the mean context
            of a causal sequence; training costs three times as many.
    """

    params_total: int
    params_dense: int
    params_values: int
    params_active: int
    flops_per_token: int

    def as_dict(self) -> dict[str, int]:
        """Plain mapping, for JSON."""
        return asdict(self)


def count(model: PreTrainedModel, *, sequence_tokens: int) -> Counts:
    """Count parameters and forward FLOPs per token.

    A multiply-add counts as 2 FLOPs. Counted are the matrix products of all linear layers
    (the output embedding among them), attention scores and sums over (sequence_tokens + 1) / 2
    positions, product-key scores (2 * heads * half-keys * key_dim) and bags (2 * heads * top_k *
    value_dim; twice that for PEER). Of experts count as many as a token has on average in training.
    Not counted: norms, activations, softmax, top-k, rotary.

    Args:
        model: any decoder, with or without memory.
        sequence_tokens: length T of the causal sequences; token t attends to t positions.
    """
    tables = value_tables(model).values()
    in_tables = {id(p) for table in tables for p in table.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in in_tables)
    values = sum(table.num_rows * table.width for table in tables)  # codes are no parameters
    idle = 0  # experts that a token does not use
    read = macs = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            macs += module.weight.numel()
        elif isinstance(module, Experts):
            num_experts = len(module.experts)
            inside = sum(p.numel() for p in module.experts.parameters())
            linear = sum(
                x.weight.numel() for x in module.experts.modules() if isinstance(x, nn.Linear)
            )
            idle += inside - inside // num_experts
            macs -= round(linear * (1 - module.capacity_factor / num_experts))
        elif isinstance(module, ProductKeys):
            macs += module.half_keys.numel()
        elif isinstance(module, ProductKeyMemory):
            read += _picks(module) * module.table.width
        elif isinstance(module, PEER):
            read += _picks(module) * sum(table.width for table in module.tables)
    macs += read + _attention_macs(model, sequence_tokens)
    return Counts(
        params_total=dense + values,
        params_dense=dense,
        params_values=values,
        params_active=dense - idle + read,
        flops_per_token=2 * macs,
    )


def _picks(module: ProductKeyMemory | PEER) -> int:
    return module.keys.num_heads * module.keys.top_k


def _attention_macs(model: PreTrainedModel, sequence_tokens: int) -> int:
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    full = (sequence_tokens + 1) / 2
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    positions = 0.0
    for kind in kinds:
        if kind == "sliding_attention" and window and window < sequence_tokens:
            # the first `window` tokens see a triangle, the others a full window
            head = window * (window + 1) / 2 + (sequence_tokens - window) * window
            positions += head / sequence_tokens
        else:
            positions += full
    return round(2 * config.num_attention_heads * head_dim * positions)

"""Splitting the host's layers over the processes of a tensor group, who read the same tokens.

transformers says for each host which projections are split by outputs and which by inputs
(`base_model_tp_plan`); here they become smaller plain weights, so that FSDP2, AdamW and clipping
take them as they take any other. Its own plumbing (`DistributedConfig`) splits what
`from_pretrained` opens only, and makes DTensors of some weights: torch takes no norm of gradients
on two meshes, nor one, or a fused step, over DTensors and plain tensors.

A memory layer is split by tokens: each process looks up its part of them, in tables whose columns
lie with all processes of the memory group.

Source: "Megatron-LM" (arXiv 1909.08053), section 3; for tokens, "Reducing Activation Recomputation
in Large Transformer Models" (arXiv 2205.05198), section 4.2.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from strata.errors import ConfigError
from strata.layers import memory_layers
from strata.layers.collectives import Group, all_tokens, enter, leave, my_tokens

COLUMNS, ROWS, EACH = "colwise", "rowwise", "replicated_with_grad_allreduce"
_TAKES = frozenset({COLUMNS, ROWS, EACH})


class SummedLinear(nn.Linear):
    """A linear layer of which each process holds some inputs; outputs are summed over the group."""

    def __init__(self, whole: nn.Linear, part: slice, group: Group) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = part.stop - part.start, whole.out_features
        self.weight = _part(whole.weight, 1, part)
        self.bias = whole.bias
        self._group = group
        self.train(whole.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs of this process) -> (..., all outputs)."""
        summed = leave(F.linear(x, self.weight), self._group)
        return summed if self.bias is None else summed + self.bias


def split_layers(model: PreTrainedModel, group: Group, *, sequence_tokens: int) -> None:
    """Leave in this process its part of every layer, in place; all processes built it alike.

    Args:
        model: not spread yet.
        group: the processes that read the same tokens.
        sequence_tokens: of every sequence that is trained on.

    Raises:
        ConfigError: heads, widths or tokens cannot be split evenly, or transformers has no plan.
    """
    size, rank = group.size(), group.rank()
    _check(model, size, sequence_tokens)
    for parent, children in _planned(model):
        for name, style in children.items():
            whole = getattr(parent, name)
            if style == COLUMNS:
                part = _share(whole.out_features, size, rank, name=name)
                whole.weight = _part(whole.weight, 0, part)
                if whole.bias is not None:
                    whole.bias = _part(whole.bias, 0, part)
                whole.out_features = part.stop - part.start
            elif style == ROWS:
                part = _share(whole.in_features, size, rank, name=name)
                setattr(parent, name, SummedLinear(whole, part, group))
        parent.register_forward_pre_hook(_entering(group), with_kwargs=True)
    for _, layer in memory_layers(model):
        layer.register_forward_pre_hook(lambda _, args: (my_tokens(args[0], group),))
        layer.register_forward_hook(lambda _, args, out: all_tokens(out, group))


def split_weights(model: PreTrainedModel) -> dict[int, int]:
    """The dimension along which a weight is split over the tensor group, by its identity."""
    dims = {}
    for parent, children in _planned(model):
        for name, style in children.items():
            module = getattr(parent, name)
            if style == COLUMNS:
                dims.update({id(weight): 0 for weight in module.parameters(recurse=False)})
            elif style == ROWS:
                dims[id(module.weight)] = 1
    return dims


def partly_used(model: PreTrainedModel) -> list[nn.Parameter]:
    """Whole weights that a process uses for its heads or tokens only: their gradients add up."""
    weights = [
        weight
        for parent, children in _planned(model)
        for name, style in children.items()
        if style == EACH
        for weight in getattr(parent, name).parameters()
    ]
    for _, layer in memory_layers(model):
        weights += layer.parameters()
    return weights


def _planned(model: PreTrainedModel) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """Modules whose children are split, and how; each module at all or not.

    A rule for `layers.*.mlp.up_proj` also holds for a feed-forward layer with a memory beside it.
    """
    plan = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    rules: dict[str, dict[str, str]] = {}
    for rule, style in plan.items():
        parent, _, child = rule.removeprefix("layers.*.").rpartition(".")
        if rule.startswith("layers.*.") and parent:
            rules.setdefault(parent, {})[child] = style
    for name, module in model.get_decoder().named_modules():
        for parent, children in rules.items():
            if (
                re.fullmatch(rf"layers\.\d+\.(.+\.)?{re.escape(parent)}", name)
                and _TAKES.issuperset(children.values())
                and all(isinstance(getattr(module, n, None), nn.Module) for n in children)
            ):
                yield module, children


def _check(model: PreTrainedModel, size: int, sequence_tokens: int) -> None:
    text = model.config.get_text_config()
    if not any(True for _ in _planned(model)):
        raise ConfigError(
            f"transformers does not say how to split the layers of {text.model_type}: leave "
            "distributed.tensor_group at 1"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(text, name, size) % size:
            raise ConfigError(
                f"distributed.tensor_group {size} does not divide model.host.{name} "
                f"{getattr(text, name)}: give a divisor of that"
            )
    if sequence_tokens % size and any(True for _ in memory_layers(model)):
        raise ConfigError(
            f"distributed.tensor_group {size} does not divide data.sequence_tokens "
            f"{sequence_tokens}, which memory layers share: give a divisor of that"
        )


def _share(length: int, size: int, rank: int, *, name: str) -> slice:
    if length % size:
        raise ConfigError(
            f"distributed.tensor_group {size} does not divide the {length} features of {name}: "
            "give a divisor of that"
        )
    count = length // size
    return slice(rank * count, (rank + 1) * count)


@torch.no_grad()
def _part(whole: Tensor, dim: int, part: slice) -> nn.Parameter:
    mine = whole[part] if dim == 0 else whole[:, part]
    return nn.Parameter(mine.clone(), requires_grad=whole.requires_grad)


def _entering(group: Group) -> Any:
    """Tells a module's input to its parts: what they owe to it is summed."""

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (enter(args[0], group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": enter(kwargs["hidden_states"], group)}

    return hook

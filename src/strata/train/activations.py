"""What a forward pass keeps for the backward pass, found without computing anything.

The model's own forward pass runs on fake tensors: shapes and dtypes move through every layer of any
host, autocast included, and nothing is allocated. What torch saves on the way is added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers import PreTrainedModel

from strata.models import build
from strata.train.labels import head_reads_only
from strata.train.recipe import Recipe

OUTSIDE = -1  # of the layers: embeddings, the head, the loss


@dataclass(frozen=True)
class Activations:
    """Bytes that wait for the backward pass of a micro-batch.

    Attributes:
        saved_bytes: that grow with the tokens; with gradient checkpointing the layers' inputs, and
            what the largest layer keeps while it is computed again.
        copied_bytes: that do not: above all the weights that autocast copied to bf16, which FSDP2
            does not take apart again after a layer.
    """

    saved_bytes: int
    copied_bytes: int


def activations(recipe: Recipe, *, sequences: int) -> Activations:
    """What one process keeps; torch.compile, document masks and references are left out.

    Args:
        recipe: the run.
        sequences: of one process in a micro-batch.
    """
    # Two batches tell what grows with the tokens from what does not.
    one, two = (_saved(recipe, sequences=count) for count in (1, 2))
    grows = {layer: two[layer] - one[layer] for layer in one}
    fixed = {layer: one[layer] - grows[layer] for layer in one}
    if not recipe.model.gradient_checkpointing:
        return Activations(sequences * sum(grows.values()), sum(fixed.values()))
    outside, outside_fixed = grows.pop(OUTSIDE), fixed.pop(OUTSIDE)
    model = build(recipe.model, None, device="meta")
    width = model.config.get_text_config().hidden_size
    hidden = recipe.data.sequence_tokens * width * next(model.parameters()).element_size()
    kept = outside + hidden * len(grows) + max(grows.values())
    return Activations(sequences * kept, outside_fixed + max(fixed.values()))


def _saved(recipe: Recipe, *, sequences: int) -> dict[int, int]:
    """Bytes saved for the backward pass in each layer, and outside of them, by the layer."""
    whole = recipe.model.model_copy(update={"gradient_checkpointing": False})
    model = build(whole, recipe.memory, device="meta").train()
    tokens = recipe.data.sequence_tokens
    low_precision = recipe.run.precision == "bf16"
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        watch = _Saved(model)
        ids_bt = torch.zeros(sequences, tokens, dtype=torch.int64)
        ids_n = ids_bt.flatten()
        with (
            watch.layers(),
            saved_tensors_hooks(watch.keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision),
            head_reads_only(model, ids_n),
        ):
            # With a cache, for without one transformers looks for packed sequences in the
            # positions, and where these are fake it makes a mask for what it cannot see.
            logits_nv = model(input_ids=ids_bt, use_cache=True).logits
            F.cross_entropy(logits_nv.float(), ids_n, reduction="sum")
    return watch.num_bytes


class _Saved:
    """Counts each storage once, in the layer that saved it first; weights are not counted."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers: nn.ModuleList = model.get_decoder().layers
        self.num_bytes = dict.fromkeys([OUTSIDE, *range(len(self._layers))], 0)
        self._seen = {p.untyped_storage()._cdata for p in model.parameters()}
        self._alive: list[Any] = []  # so that no storage takes the place of another
        self._now = OUTSIDE

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)
            self.num_bytes[self._now] += storage.nbytes()
        return tensor

    @contextmanager
    def layers(self) -> Iterator[None]:
        """Within, what is saved is told apart by layers."""

        def enter(layer: int) -> Any:
            def hook(*_: Any) -> None:
                self._now = layer

            return hook

        handles = []
        for number, layer in enumerate(self._layers):
            handles.append(layer.register_forward_pre_hook(enter(number)))
            handles.append(layer.register_forward_hook(enter(OUTSIDE)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

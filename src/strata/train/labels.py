"""Label tokens: where a loss falls, and logits computed nowhere else.

A batch whose loss falls on answers only carries labels at a third of its positions or fewer; the
output head, a matrix of vocabulary x width, would spend its time on logits that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel


def label_tokens(labels_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that predict a label token, and what they should predict.

    Args:
        labels_bt: (b, t) int64 token ids, -100 where no loss falls. The label at t is predicted at
            t - 1, so one at t = 0 never is.

    Returns:
        positions (n,) into the b * t positions in row order, and targets (n,), both int64.
    """
    targets_bt = torch.full_like(labels_bt, -100)
    targets_bt[:, :-1] = labels_bt[:, 1:]
    targets = targets_bt.flatten()
    positions = (targets != -100).nonzero().squeeze(1)
    return positions, targets[positions]


def count_labels(labels_bt: Tensor) -> int:
    """Number of label tokens that `label_tokens` finds."""
    return int((labels_bt[:, 1:] != -100).sum())


@contextmanager
def head_reads_only(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Within, the model's output head sees only some of the b * t positions.

    What the model does to logits after the head (soft capping, scaling) is still done.

    Args:
        model: a causal language model; its forward returns logits (n, vocabulary) within.
        positions: (n,) int64 on the model's device, each at most once.
    """

    def select(_head: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_btd,) = inputs
        return (hidden_btd.flatten(0, 1).index_select(0, positions),)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()

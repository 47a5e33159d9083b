"""Which tokens of a reference each memory head keeps.

To add a way: a subclass of `Selector` with one method, and its name in `SELECTORS`.

Shapes: n references, g memory heads of one layer, r query heads that share each of them, t tokens
of the longest reference, k tokens kept, d head width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from strata.errors import ConfigError


@dataclass(frozen=True)
class LayerStates:
    """What one layer's attention sees of n references, the marker before them left out.

    Attributes:
        layer: counted from 0.
        heads: KV head of each of the g memory heads.
        ids_nt: token ids, int64.
        valid_nt: bool, False on padding, which stands on the right.
        keys_ngtd: before rotary positions, fp32.
        values_ngtd: in the decoder's dtype.
        scaling: of the decoder's attention logits.
        softcap: bound of its logits by tanh; None for most decoders.
        make_queries: gives queries_ngrtd; called by who reads them.
        make_repeat_weights: gives repeat_weights_ngrqt; None unless the selector `repeats`.
        reader_queries_grqd: queries of tokens that answer questions, see `Expected`, before rotary
            positions, fp32; None unless the selector `asks`.
    """

    layer: int
    heads: tuple[int, ...]
    ids_nt: Tensor
    valid_nt: Tensor
    keys_ngtd: Tensor
    values_ngtd: Tensor
    scaling: float
    softcap: float | None
    make_queries: Callable[[], Tensor] = field(repr=False)
    make_repeat_weights: Callable[[], Tensor] | None = field(default=None, repr=False)
    reader_queries_grqd: Tensor | None = field(default=None, repr=False)

    @cached_property
    def queries_ngrtd(self) -> Tensor:
        """Queries of the heads that share each memory head, before rotary positions, fp32."""
        return self.make_queries()

    @cached_property
    def repeat_weights_ngrqt(self) -> Tensor:
        """Attention that each reference token gets while the model repeats the reference.

        Softmax weights of the decoder's own causal attention with positions, fp32, over everything
        that stands before; q counts the tokens of the request and of the repetition, and is zero
        where a row has none.
        """
        assert self.make_repeat_weights is not None, "only selectors with `repeats` get these"
        return self.make_repeat_weights()


class Selector(ABC):
    """Scores tokens; each memory head keeps those of the highest score.

    Attributes:
        repeats: the forward pass goes on to repeat the reference, at more than twice the cost,
            and `LayerStates.repeat_weights_ngrqt` exists.
        asks: the model first answers some questions, and `LayerStates.reader_queries_grqd` exists.
    """

    repeats: ClassVar[bool] = False
    asks: ClassVar[bool] = False

    @abstractmethod
    def scores(self, states: LayerStates) -> Tensor:
        """Scores of all tokens.

        Args:
            states: of one layer.

        Returns:
            (n, g, t), fp32, any scale; padding is ignored. Scores that differ by less than one in
            a hundred thousand count as equal, and of equals the earlier token is kept.
        """


class Attention(Selector):
    """The attention that a token gets from all tokens of its reference, itself included.

    w_j = sum_i softmax_j(q_i . k_j * scaling) without a causal mask and without positions. The
    query heads of a KV head are averaged, which the paper leaves open.

    Source: "Memory3" (arXiv 2407.01178), section 3.3.
    """

    def scores(self, states: LayerStates) -> Tensor:
        n, g, r, t, d = states.queries_ngrtd.shape
        query_ngqd = states.queries_ngrtd.reshape(n, g, r * t, d)
        logits_ngqt = query_ngqd @ states.keys_ngtd.mT * states.scaling
        if states.softcap is not None:
            logits_ngqt = torch.tanh(logits_ngqt / states.softcap) * states.softcap
        valid_n11t = states.valid_nt[:, None, None]
        weights_ngqt = logits_ngqt.masked_fill_(~valid_n11t, -torch.inf).softmax(-1)
        mean_n11q = valid_n11t.repeat(1, 1, 1, r).float() / r
        return (mean_n11q @ weights_ngqt)[:, :, 0]


class KeyNorm(Selector):
    """Tokens with the shortest keys, which tend to be attended to most.

    Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"
    (arXiv 2406.11430).
    """

    def scores(self, states: LayerStates) -> Tensor:
        return -states.keys_ngtd.norm(dim=-1)


class Reconstruction(Selector):
    """The greatest attention that a token gets while the model is asked to repeat the reference.

    As in KVzip: the request and the reference are read again behind the reference; a token's
    score is the maximum over these tokens and over the query heads of its KV head. Ours: every
    head keeps equally many, the reference is short enough for one piece, and both readings are one
    forward pass, since what stands behind the reference cannot change its keys and values.

    Source: "KVzip" (arXiv 2505.23416), section 3.
    """

    repeats = True

    def scores(self, states: LayerStates) -> Tensor:
        return states.repeat_weights_ngrqt.amax(dim=(2, 3))


class Expected(Selector):
    """The attention that a token can expect from those who will read the memory.

    The mean weight that it gets, among its reference's tokens, from the queries of a reader who
    answers questions: what the model looks for at each token of its answers to the invented ones of
    `invented_questions.txt`, with nothing to read, before rotary positions. Nothing of them is in
    any text; they say what kind of token is asked for, not which.

    As in Expected Attention, which takes a normal distribution for the queries to come; ours takes
    a sample of them, and no values.

    Source: "Expected Attention" (arXiv 2510.00636).
    """

    asks = True

    def scores(self, states: LayerStates) -> Tensor:
        assert states.reader_queries_grqd is not None, "only selectors with `asks` get these"
        query_gqd = states.reader_queries_grqd.flatten(1, 2)
        return _weights(query_gqd, states).mean(2)


class Random(Selector):
    """Tokens by chance, for comparison; the same ones whenever the same text is encoded."""

    def scores(self, states: LayerStates) -> Tensor:
        n, t = states.ids_nt.shape
        scores_ngt = torch.zeros(n, len(states.heads), t)
        for row, (ids_t, valid_t) in enumerate(
            zip(states.ids_nt.cpu(), states.valid_nt.cpu(), strict=True)
        ):
            ids = ids_t[valid_t]
            for column, head in enumerate(states.heads):
                text = f"{states.layer} {head} {ids.tolist()}"
                seed = hashlib.blake2b(text.encode(), digest_size=8).digest()
                chance = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
                scores_ngt[row, column, : len(ids)] = torch.rand(len(ids), generator=chance)
        return scores_ngt.to(states.keys_ngtd.device)


class All(Selector):
    """All tokens: dense memory, whatever `tokens_per_head` says."""

    def scores(self, states: LayerStates) -> Tensor:
        return torch.zeros(states.keys_ngtd.shape[:-1], device=states.keys_ngtd.device)


SELECTORS: dict[str, type[Selector]] = {
    "attention": Attention,
    "key_norm": KeyNorm,
    "reconstruction": Reconstruction,
    "expected": Expected,
    "random": Random,
    "all": All,
}


def _weights(query_xgqd: Tensor, states: LayerStates) -> Tensor:
    """Softmax over each reference's tokens, (n, g, q, t), without positions and causal mask."""
    logits_ngqt = query_xgqd @ states.keys_ngtd.mT * states.scaling
    if states.softcap is not None:
        logits_ngqt = torch.tanh(logits_ngqt / states.softcap) * states.softcap
    return logits_ngqt.masked_fill(~states.valid_nt[:, None, None], -torch.inf).softmax(-1)


def make_selector(name: str) -> Selector:
    """The selector of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SELECTORS:
        raise ConfigError(f"no selector {name!r}: choose from {', '.join(SELECTORS)}")
    return SELECTORS[name]()


# Relative. Two tokens of one id have one and the same key in the first layer, so equal scores are
# common; rounding, which differs from batch to batch, must not decide between them.
_EQUAL = 1e-5


def keep_highest(scores_ngt: Tensor, valid_nt: Tensor, *, tokens: int) -> Tensor:
    """Places of the highest scores.

    Args:
        scores_ngt: fp32.
        valid_nt: bool; a place that is False is never kept.
        tokens: kept by each head, where there are so many.

    Returns:
        places_ngk, int64, ascending, k = min(tokens, t). A row of fewer valid tokens than k ends
        with places of its padding.
    """
    t = scores_ngt.shape[-1]
    scores_ngt = scores_ngt.masked_fill(~valid_nt[:, None], -torch.inf)
    sorted_ngt, order_ngt = scores_ngt.sort(dim=-1, descending=True, stable=True)
    higher, lower = sorted_ngt[..., :-1], sorted_ngt[..., 1:]
    apart = higher - lower > _EQUAL * higher.abs()  # False too where both are -inf
    rank_ngt = torch.zeros_like(order_ngt)
    rank_ngt[..., 1:] = apart.cumsum(-1)
    # Ranks and places in one number: equals are ordered by place.
    best_ngk = (rank_ngt * t + order_ngt).sort(dim=-1).values[..., :tokens] % t
    places_ngk, _ = best_ngk.sort(dim=-1)
    return places_ngk

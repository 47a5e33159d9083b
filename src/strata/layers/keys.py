"""Product keys: from a hidden state to the rows it reads and their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strata.layers.config import MemoryLayerConfig, Norm
from strata.layers.values import Factory
from strata.ops import product_key_topk
from strata.ops.dispatch import unwatched
from strata.ops.precision import accumulation_dtype, without_autocast
from strata.ops.rms_norm import rms_norm


class ProductKeys(nn.Module):
    """Queries, two half-key codebooks per head, and the softmax over each head's picks.

    Shapes: n tokens, d decoder width, h heads, k picks per head, m half-keys.

    Args:
        hidden_dim: d.
        key_dim: width of a key, both halves together.
        config: heads, picks, codebook size, norms, bias, row shuffle.
    """

    def __init__(
        self,
        hidden_dim: int,
        key_dim: int,
        config: MemoryLayerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if key_dim % 2:
            raise ValueError(f"key_dim {key_dim} is odd: it is split into two halves")
        self.num_heads, self.top_k = config.num_heads, config.top_k
        self.num_half_keys, self.half_dim = config.num_half_keys, key_dim // 2
        factory: Factory = {"device": device, "dtype": dtype}
        self.query = nn.Linear(
            hidden_dim, self.num_heads * key_dim, bias=config.query_bias, **factory
        )
        self.half_keys = nn.Parameter(
            torch.empty(self.num_heads, 2, self.num_half_keys, self.half_dim, **factory)
        )
        self.query_norm = HalfNorm(config.query_norm, self.half_dim, scale=1.0, **factory)
        # A normalised key has length sqrt(half_dim); unscaled, the softmax would start one-hot.
        self.key_norm = HalfNorm(
            config.key_norm, self.half_dim, scale=self.half_dim**-0.5, **factory
        )
        self.row_order = _row_order(config)
        self._kept: KeptKeys | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Queries Xavier, keys U(+-1/sqrt(key_dim)), norms so that scores start near N(0, 1)."""
        nn.init.xavier_uniform_(self.query.weight)
        if self.query.bias is not None:
            nn.init.zeros_(self.query.bias)
        bound = (2 * self.half_dim) ** -0.5
        nn.init.uniform_(self.half_keys, -bound, bound)
        self.query_norm.reset_parameters()
        self.key_norm.reset_parameters()

    def forward(self, hidden_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Pick rows for each token.

        Returns:
            rows_np: (n, h * k), int64.
            weights_np: (n, h * k), fp32, each head's k sum to one.
        """
        scores_nhk, rows_nhk = self.pick(hidden_nd)
        return rows_nhk.flatten(1), scores_nhk.softmax(dim=-1).flatten(1)

    def pick(self, hidden_nd: Tensor) -> tuple[Tensor, Tensor]:
        """The raw picks: scores (n, h, k) in fp32, descending, and rows (n, h, k)."""
        query_nhsd = self.query(hidden_nd).unflatten(-1, (self.num_heads, 2, self.half_dim))
        with without_autocast(hidden_nd.device):
            query_nhsd, keys_hsmd = self.query_norm(query_nhsd), self._normed_keys()
            scores_nhk, rows_nhk = product_key_topk(query_nhsd, keys_hsmd, top_k=self.top_k)
        if self.row_order is not None:
            factor, offset = self.row_order
            rows_nhk = (rows_nhk * factor + offset) % self.num_half_keys**2
        return scores_nhk, rows_nhk

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, top_k={self.top_k}, half_keys={self.num_half_keys}, "
            f"half_dim={self.half_dim}"
        )

    def _normed_keys(self) -> Tensor:
        """The normalised half-keys; without gradients kept from one decoded token to the next.

        Normalising all keys costs about as much as looking one token up. What is kept holds until
        a parameter is replaced or written to. Fused optimizers do not count their writes, so
        nothing is kept in training, and any forward pass with gradients drops what is there.
        """
        sources = (self.half_keys, *self.key_norm.parameters())
        if torch.compiler.is_compiling():
            return self.key_norm(self.half_keys)
        if self.training or torch.is_grad_enabled() or any(_uncounted(s) for s in sources):
            self._kept = None
            return self.key_norm(self.half_keys)
        if not unwatched(*sources):
            return self.key_norm(self.half_keys)
        marks = [(source.data_ptr(), source._version) for source in sources]
        kept = self._kept
        if kept is None or kept.marks != marks or any(map(is_not, kept.sources, sources)):
            self._kept = kept = KeptKeys(sources, marks, self.key_norm(self.half_keys))
        return kept.keys_hsmd

    def train(self, mode: bool = True) -> ProductKeys:
        if mode:
            self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy makes its own


@dataclass(frozen=True)
class KeptKeys:
    """Normalised half-keys, and what they were made from; `marks` change with every write."""

    sources: tuple[Tensor, ...]
    marks: list[tuple[int, int]]
    keys_hsmd: Tensor


def _uncounted(source: Tensor) -> bool:
    """Whether a parameter may change unseen: an optimizer's turn is near, or it counts nothing."""
    return source.grad is not None or source.is_inference()


class HalfNorm(nn.Module):
    """RMS or layer normalisation of half queries or half-keys, in fp32 like the scoring after it.

    Args:
        kind: "rms", "layer" or "none".
        width: of a half, the normalised dimension.
        scale: what the learned scale starts from.
    """

    def __init__(
        self,
        kind: Norm,
        width: int,
        *,
        scale: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.scale = kind, scale
        if kind != "none":
            self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        if kind == "layer":
            self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Scale as given, shift zero."""
        if self.kind != "none":
            self.weight.fill_(self.scale)
        if self.kind == "layer":
            self.bias.zero_()

    def forward(self, half: Tensor) -> Tensor:
        """(..., width) -> (..., width), fp32 (fp64 for fp64)."""
        if self.kind == "rms":
            return rms_norm(half, self.weight, eps=1e-6)
        wide = accumulation_dtype(half)
        half = half.to(wide)
        if self.kind == "layer":
            weight, bias = self.weight.to(wide), self.bias.to(wide)
            return F.layer_norm(half, half.shape[-1:], weight, bias, eps=1e-6)
        return half

    def extra_repr(self) -> str:
        return self.kind


def _row_order(config: MemoryLayerConfig) -> tuple[int, int] | None:
    """A fixed affine bijection of row numbers, so that no buffer of the table's length is kept.

    Neighbouring rows share a half-key and heat up together; spread over the table they balance
    shards and caches.
    """
    if not config.shuffle_rows:
        return None
    r = config.num_rows
    generator = torch.Generator("cpu").manual_seed(config.seed)
    while True:
        # On the CPU whatever the default device: from_pretrained builds on "meta".
        factor, offset = torch.randint(0, r, (2,), generator=generator, device="cpu").tolist()
        if math.gcd(factor, r) == 1:
            return factor, offset

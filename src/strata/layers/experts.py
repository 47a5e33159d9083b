"""A mixture of experts: the feed-forward layer several times over, of which a token uses one.

The comparison for memory layers: as many parameters for as many FLOPs, but a few large experts
where memory has a million rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from strata.config import FrozenConfig
from strata.errors import ConfigError, ModelError
from strata.layers.install import decoder_layers
from strata.layers.values import Factory
from strata.ops.precision import accumulation_dtype, without_autocast


class ExpertsConfig(FrozenConfig):
    """Which decoder layers become mixtures of experts, and of how many.

    Source: "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368), section 3; as the
    baseline of "Memory Layers at Scale" (arXiv 2412.09764), section 4.
    """

    num_experts: int = Field(ge=2)
    layers: tuple[int, ...] | None = Field(
        default=None, description="decoder layers, counted from 0; None: all of them"
    )
    capacity_factor: float = Field(
        default=1.0, gt=0, description="experts that a token has on average in training"
    )

    @model_validator(mode="after")
    def _check(self) -> ExpertsConfig:
        if self.capacity_factor > self.num_experts:
            raise ValueError(
                f"capacity_factor {self.capacity_factor:g} is more than the {self.num_experts} "
                "experts: lower it"
            )
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(
                f"layers {list(self.layers)}: name at least one, counted from 0, or leave it out"
            )
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {list(self.layers)} names a layer twice")
        return self


class Experts(nn.Module):
    """y_n = sum of s_ne * expert_e(x_n) over the experts e that have token n; s = softmax(W_r x).

    In training each expert takes the tokens that score highest with it, equally many each, so that
    all are equally busy; a token may have several experts or none. That looks at all tokens of the
    micro-batch at once, which nobody can who generates: in evaluation each token has the one expert
    that it scores highest with. Scores are fp32.

    Args:
        hidden_dim: the decoder's width d.
        experts: the feed-forward layers, (..., d) -> (..., d).
        capacity_factor: experts a token has on average in training.
    """

    def __init__(
        self,
        hidden_dim: int,
        experts: Sequence[nn.Module],
        *,
        capacity_factor: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        self.router = nn.Linear(hidden_dim, len(experts), bias=False, **factory)
        self.experts = nn.ModuleList(experts)
        self.capacity_factor = capacity_factor
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the router from N(0, 1/sqrt(d)); the experts are as they were given."""
        nn.init.normal_(self.router.weight, std=self.router.in_features**-0.5)

    def capacity(self, num_tokens: int) -> int:
        """Tokens that each expert takes of so many, in training."""
        share = math.ceil(self.capacity_factor * num_tokens / len(self.experts))
        return min(num_tokens, share)

    def scores(self, hidden_nd: Tensor) -> Tensor:
        """(n, e): what share of a token each expert would have, fp32."""
        wide = accumulation_dtype(hidden_nd)
        with without_autocast(hidden_nd.device):
            logits_ne = hidden_nd.to(wide) @ self.router.weight.to(wide).T
            return logits_ne.softmax(dim=-1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., d), in the dtype of `hidden`."""
        hidden_nd = hidden.reshape(-1, hidden.shape[-1])
        scores_ne = self.scores(hidden_nd)
        out_nd = torch.zeros_like(hidden_nd)
        best_n = None if self.training else scores_ne.argmax(dim=-1)
        for number, expert in enumerate(self.experts):
            score_n = scores_ne[:, number]
            if best_n is None:
                tokens_c = score_n.topk(self.capacity(len(hidden_nd)), sorted=False).indices
            else:
                tokens_c = (best_n == number).nonzero().squeeze(1)
            found_cd = expert(hidden_nd[tokens_c]) * score_n[tokens_c, None]
            out_nd = out_nd.index_add(0, tokens_c, found_cd.to(out_nd.dtype))
        return out_nd.view_as(hidden)


def insert_experts(model: nn.Module, config: ExpertsConfig, *, alike: bool = False) -> None:
    """Put mixtures of experts in the place of feed-forward layers, in place.

    Args:
        model: a Hugging Face decoder.
        config: where, and how many.
        alike: whether all experts begin as the layer that is there, to go on from a trained model;
            else the first does, and the others are drawn as the host draws its matrices.

    Raises:
        ConfigError: a layer index is out of range.
        ModelError: the model is not a decoder with `layers[i].mlp`, or has experts already.
    """
    layers = decoder_layers(model)
    if any(isinstance(module, Experts) for module in model.modules()):
        raise ModelError("this model has experts already: install into a model without")
    indices = range(len(layers)) if config.layers is None else config.layers
    wrong = [index for index in indices if index >= len(layers)]
    if wrong:
        raise ConfigError(
            f"model.experts.layers names layer {wrong[0]}, the decoder has {len(layers)}: "
            f"0..{len(layers) - 1} are allowed"
        )
    hidden_dim = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
    std = float(getattr(model.config, "initializer_range", 0.02))
    for index in indices:
        first = layers[index].get_submodule("mlp")
        others = [copy.deepcopy(first) for _ in range(config.num_experts - 1)]
        if not alike:
            for other in others:
                _draw(other, std=std)
        sample = next(first.parameters())
        experts = Experts(
            hidden_dim,
            [first, *others],
            capacity_factor=config.capacity_factor,
            device=sample.device,
            dtype=sample.dtype,
        )
        layers[index].set_submodule("mlp", experts.train(model.training))


@torch.no_grad()
def _draw(module: nn.Module, *, std: float) -> None:
    for weight in module.parameters():
        if weight.ndim >= 2:
            nn.init.normal_(weight, std=std)
        else:
            nn.init.zeros_(weight)

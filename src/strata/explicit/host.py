"""What memory has to know of a decoder, and the one place where its attention is reached.

transformers looks an attention function up by name at every call. While somebody intercepts, the
decoder's name is one of ours, and our function hands each call on; before and after, nothing of
the model is changed. The mask functions registered with our names are those of the attention
underneath, for without one transformers would silently drop the padding mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from strata.errors import StrataError
from strata.explicit.memories import MemoryShape
from strata.explicit.settings import ExplicitMemoryConfig

# (attention underneath, attention module, query_bhqd, key_bhkd, value_bhkd, mask, **kwargs)
Attend = Callable[..., tuple[Tensor, Tensor | None]]

_UNDERNEATH = ("sdpa", "eager")
_PREFIX = "strata_"


class HostError(StrataError):
    """This model cannot have explicit memory, or not as asked."""


class Host:
    """A decoder seen from its attention layers.

    Args:
        model: a transformers decoder with rotary positions; nothing of it is changed here.

    Attributes:
        model: as given.
        attentions: one attention module a layer.
        num_layers, num_heads, num_kv_heads, head_dim: of its attention.

    Raises:
        HostError: not a decoder, no rotary positions, or layers of different shapes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise HostError(f"{name} has an encoder; explicit memory needs a decoder-only model")
        self.attentions: tuple[Any, ...] = tuple(_attentions(model))
        if not self.attentions or not all(getattr(a, "is_causal", True) for a in self.attentions):
            raise HostError(f"{name} has no causal self-attention; a decoder-only model is needed")
        self._rotary = next(
            (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None
        )
        if self._rotary is None:
            raise HostError(f"{name} has no rotary positions, which explicit memory moves")
        shapes = {(int(a.head_dim), int(a.num_key_value_groups)) for a in self.attentions}
        if len(shapes) > 1:
            raise HostError(f"{name} has layers of different attention shapes: {sorted(shapes)}")
        self.head_dim, groups = shapes.pop()
        config = self.attentions[0].config
        self.num_layers = len(self.attentions)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = self.num_heads // groups

    @property
    def device(self) -> torch.device:
        """Where the decoder's input goes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder's weights."""
        return self.model.dtype

    def window(self, layer: int) -> int | None:
        """How many tokens back a sliding layer sees, its own included; None for all of them."""
        attention = self.attentions[layer]
        config = attention.config
        types = getattr(config, "layer_types", None)
        if types is not None and types[layer] != "sliding_attention":
            return None
        # Without layer types (mistral, phi3) the config's window is that of every layer.
        window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        return None if window is None else int(window)

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer sees only a window of the text; it then has no memory by default."""
        return self.window(layer) is not None

    def memory_shape(self, config: ExplicitMemoryConfig) -> MemoryShape:
        """Which heads hold memory under these settings.

        Raises:
            HostError: this decoder has no such layer or head, or the layer is sliding.
        """
        layers = config.layers
        if layers is None:
            half = range((self.num_layers + 1) // 2)
            layers = tuple(layer for layer in half if not self.is_sliding(layer))
            if not layers:
                full = [n for n in range(self.num_layers) if not self.is_sliding(n)]
                layers = tuple(full[: (len(full) + 1) // 2])
        for layer in layers:
            if not 0 <= layer < self.num_layers:
                raise HostError(
                    f"memory layer {layer} does not exist: layers are 0 to {self.num_layers - 1}"
                )
            if self.is_sliding(layer):
                raise HostError(
                    f"layer {layer} sees a sliding window only and cannot hold memory; leave it out"
                )
        if not layers:
            raise HostError("every layer of this model sees a sliding window only")
        every = tuple(range(self.num_kv_heads))
        pairs: list[tuple[int, int]] = []
        for layer in layers:
            heads = config.heads
            chosen = every if heads is None else heads
            if not isinstance(chosen, tuple):
                chosen = tuple(sorted(chosen.get(layer, ())))
            for head in chosen:
                if head not in every:
                    raise HostError(
                        f"memory head {head} does not exist: KV heads are 0 to {every[-1]}"
                    )
                pairs.append((layer, head))
        tokens = min(config.tokens_per_head, config.reference_tokens)
        if config.selector == "all":
            tokens = config.reference_tokens
        return MemoryShape(tuple(sorted(set(pairs))), tokens, self.head_dim)

    def rotary_kind(self, layer: int) -> str | None:
        """Names the rotary embedding of a layer; None where all layers have the same."""
        if not getattr(self._rotary, "layer_types", None):
            return None
        return str(self.attentions[layer].config.layer_types[layer])

    def rotary(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions at a layer, by the decoder's own rotary embedding.

        Args:
            layer: some decoders turn some layers differently.
            positions: any shape (..., t), integers, may be negative.

        Returns:
            Two fp32 tensors (..., t, rotary width).
        """
        assert self._rotary is not None
        flat = positions.reshape(1, -1).to(self.device)
        like = torch.empty(1, dtype=torch.float32, device=self.device)
        kind = self.rotary_kind(layer)
        extra = {} if kind is None else {"layer_type": kind}
        cos, sin = self._rotary(like, flat, **extra)
        shape = (*positions.shape, cos.shape[-1])
        return cos.reshape(shape), sin.reshape(shape)

    def rotate(self, layer: int, states: Tensor, positions: Tensor) -> Tensor:
        """Give keys their positions, in fp32.

        Args:
            layer: whose keys.
            states: (..., t, d).
            positions: (..., t), or a shape that broadcasts to it.

        Returns:
            fp32 (..., t, d).
        """
        return self._turn(layer, states, positions, back=False)

    def unrotate(self, layer: int, states: Tensor, positions: Tensor) -> Tensor:
        """Take positions out of keys or queries again, in fp32: the inverse of `rotate`."""
        return self._turn(layer, states, positions, back=True)

    def _turn(self, layer: int, states: Tensor, positions: Tensor, *, back: bool) -> Tensor:
        cos, sin = self.rotary(layer, positions)
        if back:  # some rotary embeddings also scale: by the root of cos^2 + sin^2, everywhere
            scale = cos.square() + sin.square()
            cos, sin = cos / scale, -sin / scale
        turn = sys.modules[type(self.attentions[layer]).__module__].apply_rotary_pos_emb
        wide = states.float()
        # The host's function adds one dimension to cos and sin, for heads.
        turned, _ = turn(wide.unsqueeze(-3), wide.unsqueeze(-3), cos, sin, unsqueeze_dim=-3)
        return turned.squeeze(-3)

    @contextmanager
    def intercepted(self, attend: Attend) -> Iterator[None]:
        """Let `attend` answer every attention call of this decoder meanwhile.

        It is called as attend(underneath, module, query, key, value, mask, **kwargs), where
        `underneath` is the function that would have been called. Nests; not for two threads.

        Raises:
            HostError: the decoder's attention is neither sdpa nor eager.
        """
        configs = {id(a.config): a.config for a in self.attentions}.values()
        names = [config._attn_implementation for config in configs]
        plain = [(name or "").removeprefix(_PREFIX) for name in names]
        for name in plain:
            if name not in _UNDERNEATH:
                raise HostError(
                    f"the model's attention is {name!r}; explicit memory works with 'sdpa' and "
                    "'eager': load it with attn_implementation='sdpa'"
                )
        _register()
        before = [getattr(a, "_strata_attend", None) for a in self.attentions]
        for config, name in zip(configs, plain, strict=True):
            config._attn_implementation_internal = _PREFIX + name
        for attention in self.attentions:
            attention._strata_attend = attend
        try:
            yield
        finally:
            for attention, old in zip(self.attentions, before, strict=True):
                if old is None:
                    del attention._strata_attend
                else:
                    attention._strata_attend = old
            for config, name in zip(configs, names, strict=True):
                config._attn_implementation_internal = name


def _attentions(model: PreTrainedModel) -> list[nn.Module]:
    found: dict[int, nn.Module] = {
        int(module.layer_idx): module
        for module in model.get_decoder().modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "num_key_value_groups")
    }
    return [found[layer] for layer in sorted(found)]


def _register() -> None:
    for name in _UNDERNEATH:
        if _PREFIX + name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(_PREFIX + name, _over(name))
            AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _over(name: str) -> Attend:
    def attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if name == "eager":  # every modeling file has its own
            underneath = sys.modules[type(module).__module__].eager_attention_forward
        else:
            underneath = ALL_ATTENTION_FUNCTIONS[name]
        return module._strata_attend(underneath, module, *args, **kwargs)

    return attention

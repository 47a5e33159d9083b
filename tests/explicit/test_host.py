"""The decoder seen from its attention layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from strata.explicit.host import Host, HostError
from strata.explicit.settings import ExplicitMemoryConfig

MakeHost = Callable[..., PreTrainedModel]

IDS = torch.randint(3, 96, (2, 21), generator=torch.Generator().manual_seed(1))
# The second row is padded on its left.
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0


def test_intercepting_and_handing_on_changes_nothing(host_model: PreTrainedModel) -> None:
    """Bit for bit, with padding, during and after; and every layer is seen."""
    host = Host(host_model)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    before = host_model(**inputs).logits
    names = [a.config._attn_implementation for a in host.attentions]
    seen = []

    def hand_on(underneath, module, *args, **kwargs):
        seen.append(module.layer_idx)
        return underneath(module, *args, **kwargs)

    with host.intercepted(hand_on):
        during = host_model(**inputs).logits
        with host.intercepted(hand_on):
            assert torch.equal(host_model(**inputs).logits, before)
        assert torch.equal(host_model(**inputs).logits, before)
    assert torch.equal(during, before)
    assert torch.equal(host_model(**inputs).logits, before)
    assert seen == list(range(4)) * 3
    assert [a.config._attn_implementation for a in host.attentions] == names
    assert not any(hasattr(a, "_strata_attend") for a in host.attentions)


def test_unrotated_keys_are_those_before_rotary(host_model: PreTrainedModel) -> None:
    """What the attention receives, turned back, is what k_proj (or a key norm) gave."""
    host = Host(host_model)
    given, received = {}, {}
    for layer, attention in enumerate(host.attentions):
        last = getattr(attention, "k_norm", attention.k_proj)
        last.register_forward_hook(lambda _m, _i, out, layer=layer: given.update({layer: out}))

    def keep(underneath, module, query, key, value, mask, **kwargs):
        received[module.layer_idx] = key
        return underneath(module, query, key, value, mask, **kwargs)

    with host.intercepted(keep):
        host_model(input_ids=IDS)
    for layer, key_bhtd in received.items():
        want = given[layer].reshape(2, 21, 2, 8).transpose(1, 2)
        if given[layer].ndim == 4 and given[layer].shape[1] == 2:  # a norm over (b, h, t, d)
            want = given[layer]
        got = host.unrotate(layer, key_bhtd, torch.arange(21))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        again = host.rotate(layer, got, torch.arange(21))
        torch.testing.assert_close(again, key_bhtd, atol=1e-5, rtol=1e-5)


def test_rotating_depends_on_differences_only(make_host: MakeHost) -> None:
    """A query at 7 sees a key at -3 as one at 17 sees one at 7."""
    host = Host(make_host("llama"))
    query, key = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(2))

    def score(query_at: int, key_at: int) -> torch.Tensor:
        turned_query = host.rotate(0, query, torch.tensor([query_at]))
        return (turned_query * host.rotate(0, key, torch.tensor([key_at]))).sum()

    torch.testing.assert_close(score(7, -3), score(17, 7), atol=1e-6, rtol=1e-5)


def test_scaled_rotary_turns_back(make_host: MakeHost) -> None:
    """YaRN multiplies cosines and sines; taking positions out takes that out too."""
    model = make_host(
        "llama",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    )  # fmt: skip
    host = Host(model)
    keys = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(40, 45)
    turned = host.rotate(1, keys, positions)
    assert turned.norm() > 1.05 * keys.norm()
    torch.testing.assert_close(host.unrotate(1, turned, positions), keys, atol=1e-6, rtol=1e-5)


def test_default_layers_are_the_first_half_without_sliding_ones(make_host: MakeHost) -> None:
    config = ExplicitMemoryConfig()
    assert Host(make_host("llama")).memory_shape(config).layers == (0, 1)
    gemma = Host(make_host("gemma3_text")).memory_shape(config)
    assert gemma.layers == (0,)
    assert gemma.heads == ((0, 0), (0, 1))
    chosen = ExplicitMemoryConfig(layers=(1, 3), heads={1: (1,), 3: (0, 1)})
    assert Host(make_host("llama")).memory_shape(chosen).heads == ((1, 1), (3, 0), (3, 1))


def test_a_window_named_by_the_config_alone_is_seen(make_host: MakeHost) -> None:
    """Mistral's layers carry no window and no types; its config does."""
    host = Host(make_host("mistral", sliding_window=16))
    assert [host.window(layer) for layer in range(4)] == [16] * 4
    with pytest.raises(HostError, match="sliding window only"):
        host.memory_shape(ExplicitMemoryConfig())
    assert Host(make_host("mistral")).window(0) is None
    assert [Host(make_host("gemma2")).window(n) for n in range(4)] == [None, 512, None, 512]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ExplicitMemoryConfig(layers=(4,)), "memory layer 4 does not exist: layers are 0 to 3"),
        (ExplicitMemoryConfig(layers=(1,)), "layer 1 sees a sliding window only"),
        (ExplicitMemoryConfig(layers=(0,), heads=(2,)), "memory head 2 does not exist"),
    ],
)
def test_wrong_layers_and_heads_are_refused(
    make_host: MakeHost, config: ExplicitMemoryConfig, says: str
) -> None:
    with pytest.raises(HostError, match=says):
        Host(make_host("gemma3_text")).memory_shape(config)


def test_other_kinds_of_model_are_refused() -> None:
    tiny = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    bert = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=16, n_head=2, n_layer=1)
    )
    with pytest.raises(HostError):
        Host(bert)
    from transformers import BertConfig, BertModel

    with pytest.raises(HostError):
        Host(BertModel(BertConfig(intermediate_size=16, **tiny)))

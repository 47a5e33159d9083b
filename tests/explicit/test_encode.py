"""References read by a decoder, and what is kept of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from strata.errors import ConfigError, DataError
from strata.explicit.encode import Encoder, key_vectors
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.select import SELECTORS
from strata.explicit.settings import ExplicitMemoryConfig

MakeHost = Callable[..., PreTrainedModel]

# Larger weights, so that attention is far from even and selection has something to select.
SHARP = {"initializer_range": 0.2}
MARKER = "<s>Reference:"
TEXTS = [
    "The cat sat on the mat.",
    "aaaa aaaa aaaa aaaa",  # in the first layer these keys are one and the same
    "Paris is the capital of France, and Rome is that of Italy.",
    "x",
    "Seven!!",
    "The cat sat on the mat.",
    "1234567890123456789012345678901234567890123456789012345678901234",
]


def _config(**changes: Any) -> ExplicitMemoryConfig:
    settings = {"reference_tokens": 64, "tokens_per_head": 4, "marker": MARKER}
    return ExplicitMemoryConfig(**{**settings, **changes})


def _full_layers(host: Host) -> tuple[int, ...]:
    return tuple(layer for layer in range(host.num_layers) if not host.is_sliding(layer))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _assert_same(one: Memories, two: Memories) -> None:
    assert torch.equal(one.places_nst, two.places_nst)
    assert torch.equal(one.kept_n, two.kept_n)
    torch.testing.assert_close(one.keys_nstd, two.keys_nstd, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.values_nstd, two.values_nstd, atol=1e-5, rtol=1e-5)


def test_dense_memories_are_the_cache_of_a_plain_forward(
    host_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every family: keys, turned back to their positions, and values."""
    host = Host(host_model)
    config = _config(selector="all", layers=_full_layers(host))
    encoder = Encoder(host, tokenizer, config)
    assert encoder.marker_ids == [1, *_ids(tokenizer, "Reference:")]
    m = len(encoder.marker_ids)
    memories = encoder.encode(TEXTS, batch_size=4)
    assert memories.keys_nstd.shape == (7, len(encoder.shape.heads), 64, 8)
    for number, text in enumerate(TEXTS):
        ids = _ids(tokenizer, text)
        cache = DynamicCache(config=host_model.config)
        with torch.no_grad():
            host_model(torch.tensor([encoder.marker_ids + ids]), past_key_values=cache)
        assert memories.kept_n[number] == len(ids)
        assert memories.places_nst[number, 0, : len(ids)].tolist() == list(range(len(ids)))
        for slot, (layer, head) in enumerate(encoder.shape.heads):
            positions = m + torch.arange(len(ids))
            key_td = memories.keys_nstd[number, slot, : len(ids)]
            want = cache.layers[layer]
            torch.testing.assert_close(
                host.rotate(layer, key_td, positions), want.keys[0, head, m:], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                memories.values_nstd[number, slot, : len(ids)],
                want.values[0, head, m:], atol=1e-5, rtol=1e-5,
            )  # fmt: skip


@pytest.mark.parametrize("selector", sorted(SELECTORS))
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_memories_do_not_depend_on_the_batch(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast, family: str, selector: str
) -> None:
    host = Host(make_host(family, **SHARP))
    config = _config(selector=selector, layers=_full_layers(host))
    encoder = Encoder(host, tokenizer, config)
    alone = Memories.cat([encoder.encode([text]) for text in TEXTS])
    _assert_same(encoder.encode(TEXTS, batch_size=len(TEXTS)), alone)
    _assert_same(encoder.encode(TEXTS, batch_size=3), alone)
    order = random.Random(0).sample(range(len(TEXTS)), len(TEXTS))
    _assert_same(encoder.encode([TEXTS[n] for n in order], batch_size=2), alone[order])


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_what_is_kept_is_part_of_the_dense_memory(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast, selector: str
) -> None:
    """Keys and values stand at their places; empty places are zeros; places ascend."""
    host = Host(make_host("llama"))
    dense = Encoder(host, tokenizer, _config(selector="all")).encode(TEXTS)
    encoder = Encoder(host, tokenizer, _config(selector=selector))
    memories = encoder.encode(TEXTS)
    for number, text in enumerate(TEXTS):
        kept = min(len(text), encoder.shape.tokens)
        assert memories.kept_n[number] == kept
        for slot in range(len(encoder.shape.heads)):
            places = memories.places_nst[number, slot, :kept].tolist()
            assert places == sorted(set(places)) and max(places) < len(text)
            for got, want in (
                (memories.keys_nstd, dense.keys_nstd),
                (memories.values_nstd, dense.values_nstd),
            ):
                torch.testing.assert_close(
                    got[number, slot, :kept], want[number, slot, places], atol=1e-5, rtol=1e-5
                )
                assert not got[number, slot, kept:].any()
        assert not memories.places_nst[number, :, kept:].any()


def test_chosen_heads_are_those_of_the_whole(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Another set of heads per layer picks slots, and changes nothing in them."""
    host = Host(make_host("llama", num_key_value_heads=4, num_attention_heads=8))
    for selector in SELECTORS:
        whole = Encoder(host, tokenizer, _config(selector=selector, layers=(0, 1, 2, 3)))
        part = Encoder(
            host, tokenizer, _config(selector=selector, layers=(1, 3), heads={1: (2,), 3: (0, 3)})
        )
        assert part.shape.heads == ((1, 2), (3, 0), (3, 3))
        slots = [whole.shape.heads.index(pair) for pair in part.shape.heads]
        got, want = part.encode(TEXTS), whole.encode(TEXTS)
        torch.testing.assert_close(got.keys_nstd, want.keys_nstd[:, slots], atol=1e-6, rtol=1e-6)
        assert torch.equal(got.places_nst, want.places_nst[:, slots])


def _before_rotary(model: PreTrainedModel, ids: list[int]) -> list[dict[str, Tensor]]:
    """Queries (h, t, d) and keys of each layer of a llama, as its projections give them."""
    caught: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda _m, _i, out, at=at, name=name: at.update(
                {name: out[0].unflatten(-1, (-1, 8)).transpose(0, 1).double()}
            )
        )
        for layer, at in zip(model.model.layers, caught, strict=True)
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return caught


def test_attention_keeps_the_tokens_attended_to_most(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against the paper's formula in float64 on the projections of a plain forward."""
    model = make_host("llama", **SHARP)
    encoder = Encoder(Host(model), tokenizer, _config(layers=(0, 1, 2)))
    text = TEXTS[2]
    places_st = encoder.encode(TEXTS).places_nst[2]
    caught = _before_rotary(model, encoder.marker_ids + _ids(tokenizer, text))
    m, clear = len(encoder.marker_ids), 0
    for slot, (layer, head) in enumerate(encoder.shape.heads):
        key_td = caught[layer]["k_proj"][head, m:]
        query_rtd = caught[layer]["q_proj"][2 * head : 2 * head + 2, m:]
        weights_rtt = (query_rtd @ key_td.T * 8**-0.5).softmax(-1)
        total_t = weights_rtt.sum(1).mean(0)
        kept = total_t[places_st[slot].long()]
        others = total_t.clone()
        others[places_st[slot].long()] = 0
        assert kept.min() >= others.max() * (1 - 2e-5)  # equals, up to rounding
        clear += int(kept.min() > others.max() * 1.001)
    assert clear >= 3  # and mostly there was a difference


def test_reconstruction_keeps_what_repeating_attends_to(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against the weights that transformers itself reports for reference, request, reference."""
    for family in ("llama", "gemma2"):
        model = make_host(family, attn_implementation="eager", attn_logit_softcapping=1.0, **SHARP)
        host = Host(model)
        encoder = Encoder(
            host, tokenizer, _config(layers=_full_layers(host), selector="reconstruction")
        )
        memories = encoder.encode(TEXTS)
        m, request = (
            len(encoder.marker_ids),
            _ids(tokenizer, "\n\nRepeat the previous context:\n\n"),
        )
        for number, text in enumerate(TEXTS):
            ids = _ids(tokenizer, text)
            with torch.no_grad():
                out = model(
                    torch.tensor([encoder.marker_ids + ids + request + ids]), output_attentions=True
                )
            for slot, (layer, head) in enumerate(encoder.shape.heads):
                weights = out.attentions[layer][0, 2 * head : 2 * head + 2]
                best_t = weights[:, m + len(ids) :, m : m + len(ids)].amax((0, 1))
                kept = memories.places_nst[number, slot, : memories.kept_n[number]].long()
                others = best_t.clone()
                others[kept] = 0
                assert best_t[kept].min() >= others.max() * (1 - 2e-5)


def test_expected_keeps_what_answers_look_for(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against a plain forward pass over each invented question, from where its answer begins."""
    model = make_host("llama", **SHARP)
    encoder = Encoder(Host(model), tokenizer, _config(layers=(0, 2), selector="expected"))
    memories = encoder.encode(TEXTS)
    text = resources.files("strata.explicit").joinpath("invented_questions.txt").read_text()
    queries: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in encoder.shape.heads}
    for whole in text.strip().split("\n\n"):
        begin = len(_ids(tokenizer, whole[: whole.index("Answer:") + len("Answer:")]))
        caught = _before_rotary(model, [1, *_ids(tokenizer, whole)])
        for layer, head in encoder.shape.heads:
            query_rtd = caught[layer]["q_proj"][2 * head : 2 * head + 2]
            queries[layer, head].append(query_rtd[:, begin:].flatten(0, 1))
    clear = 0
    for number, reference in enumerate(TEXTS):
        caught = _before_rotary(model, encoder.marker_ids + _ids(tokenizer, reference))
        for slot, (layer, head) in enumerate(encoder.shape.heads):
            key_td = caught[layer]["k_proj"][head, len(encoder.marker_ids) :]
            weights_qt = (torch.cat(queries[layer, head]) @ key_td.T * 8**-0.5).softmax(-1)
            mean_t = weights_qt.mean(0)
            places = memories.places_nst[number, slot, : memories.kept_n[number]].long()
            others = mean_t.clone()
            others[places] = 0
            assert mean_t[places].min() >= others.max() * (1 - 2e-5)
            clear += int(mean_t[places].min() > others.max() * 1.001)
    assert clear >= 3


def test_expected_asks_a_model_in_training_anew(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Once where the weights stay; at every call where they change."""
    model = make_host("llama", **SHARP)
    config = _config(layers=(0, 2), selector="expected")
    encoders = [Encoder(Host(model), tokenizer, config, in_training=x) for x in (False, True)]
    for encoder, asked in zip(encoders, (1, 2), strict=True):
        before = encoder.encode(TEXTS, batch_size=len(TEXTS))
        with _counting([model.model.layers[0]]) as calls:
            encoder.encode(TEXTS, batch_size=len(TEXTS), with_grad=asked == 2)
        assert calls == [asked]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    after = encoders[1].encode(TEXTS)
    _assert_same(after, Encoder(Host(model), tokenizer, config).encode(TEXTS))
    assert not torch.equal(after.places_nst, before.places_nst)


@contextmanager
def _counting(modules: Any) -> Iterator[list[int]]:
    calls = [0] * len(modules)

    def count(number: int) -> None:
        calls[number] += 1

    hooks = [
        module.register_forward_pre_hook(lambda _m, _i, number=number: count(number))
        for number, module in enumerate(modules)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def test_the_pass_ends_in_the_last_memory_layer(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_host("llama", num_hidden_layers=6)
    encoder = Encoder(Host(model), tokenizer, _config(layers=(0, 2)))
    ends = [model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp, model.model.norm]
    with _counting([*model.model.layers, *ends, model.lm_head]) as calls:
        encoder.encode(TEXTS[:2])
        encoder.queries(TEXTS[:2])
    assert calls == [2, 2, 2, 0, 0, 0, 0, 0, 0, 0]


def test_nothing_of_the_model_changes(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Modes, gradients, settings, outputs; dropout stays out of memories."""
    model = make_host("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.requires_grad_(False)
    encoder = Encoder(Host(model), tokenizer, _config(layers=(0, 1, 2)))

    def state() -> Any:
        return (
            [(name, module.training) for name, module in model.named_modules()],
            [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
            model.config.to_dict(),
            model.config._attn_implementation,
            [sorted(vars(module)) for module in model.modules()],
        )

    before = state()
    memories = encoder.encode(TEXTS)
    encoder.queries(TEXTS)
    assert state() == before
    assert not memories.keys_nstd.requires_grad
    _assert_same(encoder.encode(TEXTS), memories)
    _assert_same(memories, Encoder(Host(model.eval()), tokenizer, encoder.config).encode(TEXTS))


def test_encoding_nests_in_another_interception(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_host("llama")
    encoder = Encoder(Host(model), tokenizer, _config())
    want = encoder.encode(TEXTS)
    seen = []

    def spoil(underneath: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(module.layer_idx)
        out, weights = underneath(module, *args, **kwargs)
        return out * 0, weights

    with Host(model).intercepted(spoil):
        _assert_same(encoder.encode(TEXTS), want)
        assert seen == []
        model(torch.tensor([[5, 6]]))
        assert seen == [0, 1, 2, 3]
    _assert_same(encoder.encode(TEXTS), want)


def _gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_a_plain_forward(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of sparse memories, in a batch, against one plain pass a text with a cache."""
    model = make_host("llama")
    host = Host(model)
    encoder = Encoder(host, tokenizer, _config(layers=(0, 1, 2)))
    with torch.no_grad():  # asking for the graph is enough
        memories = encoder.encode(TEXTS, with_grad=True, batch_size=3)
    generator = torch.Generator().manual_seed(4)
    key_weight = torch.randn(memories.keys_nstd.shape, generator=generator)
    value_weight = torch.randn(memories.keys_nstd.shape, generator=generator)
    loss = (memories.keys_nstd * key_weight + memories.values_nstd * value_weight).sum()
    got = _gradients(model, loss)
    m = len(encoder.marker_ids)
    plain = torch.zeros(())
    for number, text in enumerate(TEXTS):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([encoder.marker_ids + _ids(tokenizer, text)]), past_key_values=cache)
        kept = int(memories.kept_n[number])
        for slot, (layer, head) in enumerate(encoder.shape.heads):
            at = m + memories.places_nst[number, slot, :kept].long()
            key_td = host.unrotate(layer, cache.layers[layer].keys[0, head, at], at)
            value_td = cache.layers[layer].values[0, head, at]
            plain = plain + (key_td * key_weight[number, slot, :kept]).sum()
            plain = plain + (value_td * value_weight[number, slot, :kept]).sum()
    want = _gradients(model, plain)
    assert set(got) == set(want) - {n for n in want if n.startswith("model.layers.3")}
    assert "model.embed_tokens.weight" in got and "model.layers.2.self_attn.k_proj.weight" in got
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable.*:FutureWarning")
def test_gradients_pass_through_checkpointed_layers(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Layers that are computed again in the backward pass, without the interception then."""
    model = make_host("llama").train()
    encoder = Encoder(Host(model), tokenizer, _config(layers=(0, 1, 2)))

    def gradients() -> dict[str, Tensor]:
        memories = encoder.encode(TEXTS, with_grad=True)
        return _gradients(model, (memories.keys_nstd**2 + memories.values_nstd**3).sum())

    want = gradients()
    model.gradient_checkpointing_enable()
    got = gradients()
    assert set(got) == set(want)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], atol=1e-5, rtol=1e-5)


def test_bf16_memories(make_host: MakeHost, tokenizer: PreTrainedTokenizerFast) -> None:
    """In the decoder's dtype, and near those in fp32; also under autocast."""
    wide = Encoder(Host(make_host("llama")), tokenizer, _config(selector="all")).encode(TEXTS)
    model = make_host("llama").to(torch.bfloat16)
    memories = Encoder(Host(model), tokenizer, _config(selector="all")).encode(TEXTS)
    assert memories.keys_nstd.dtype == memories.values_nstd.dtype == torch.bfloat16
    # bf16 has 8 bits; two layers of it.
    torch.testing.assert_close(memories.keys_nstd.float(), wide.keys_nstd, atol=3e-2, rtol=3e-2)
    encoder = Encoder(Host(make_host("llama")), tokenizer, _config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = encoder.encode(TEXTS)
    assert mixed.keys_nstd.dtype == torch.float32


@pytest.mark.parametrize(
    ("bos", "marker", "text"),
    [
        (True, "<s>Reference:", "Reference:"),
        (False, "<s>Reference:", "Reference:"),
        (True, "Note: ", "Note: "),
        (True, "<s>", ""),
        (False, "", ""),
    ],
)
def test_marker(
    make_host: MakeHost,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    bos: bool,
    marker: str,
    text: str,
) -> None:
    """A leading <s> is the tokenizer's own first token; nothing is read as <unk>."""
    tokenizer = make_tokenizer(bos=bos)
    encoder = Encoder(Host(make_host("llama")), tokenizer, _config(marker=marker))
    begins = bos and marker.startswith("<s>")
    assert encoder.marker_ids == [1] * begins + _ids(tokenizer, text)
    assert len(encoder.encode(TEXTS)) == len(TEXTS)


def test_queries_and_key_vectors(make_host: MakeHost, tokenizer: PreTrainedTokenizerFast) -> None:
    """Means of what the projections give, and the dot product is the mean of all q . k."""
    model = make_host("llama")
    encoder = Encoder(Host(model), tokenizer, _config(layers=(0, 2), heads=(1,)))
    queries_nsd = encoder.queries(TEXTS, batch_size=3)
    memories = encoder.encode(TEXTS)
    keys_nsd = key_vectors(memories)
    assert queries_nsd.shape == keys_nsd.shape == (7, 2, 8)
    for number, text in enumerate(TEXTS):
        caught = _before_rotary(model, [1, *_ids(tokenizer, text)])
        for slot, layer in enumerate((0, 2)):
            query_rtd = caught[layer]["q_proj"][2:, 1:]
            want = query_rtd.mean((0, 1)).float()
            torch.testing.assert_close(queries_nsd[number, slot], want, atol=1e-5, rtol=1e-5)
            key_td = memories.keys_nstd[number, slot, : memories.kept_n[number]]
            torch.testing.assert_close(keys_nsd[number, slot], key_td.mean(0))
            products = query_rtd.float() @ key_td.T
            torch.testing.assert_close(
                queries_nsd[number, slot] @ keys_nsd[number, slot], products.mean(),
                atol=1e-5, rtol=1e-5,
            )  # fmt: skip
    by_ids = encoder.queries([_ids(tokenizer, text) for text in TEXTS])
    torch.testing.assert_close(by_ids, queries_nsd, atol=1e-5, rtol=1e-5)
    long = ["So long " * 20 + TEXTS[6]]
    torch.testing.assert_close(encoder.queries(long)[0], queries_nsd[6], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.keys(TEXTS, batch_size=3), keys_nsd, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.keys(long)[0], keys_nsd[6], atol=1e-5, rtol=1e-5)
    assert not encoder.keys(TEXTS[:1]).requires_grad


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "no texts to encode: give at least one"),
        ("a text", "texts is one string: give a list"),
        (["fine", ""], "text 1 is empty: leave it out"),
        (["fine", "y" * 65], "text 1 has 65 tokens, above reference_tokens 64: cut it"),
    ],
)
def test_wrong_texts_are_refused(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast, texts: Any, says: str
) -> None:
    encoder = Encoder(Host(make_host("llama")), tokenizer, _config())
    with pytest.raises(DataError, match=says):
        encoder.encode(texts)


def test_wrong_settings_are_refused(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    host = Host(make_host("llama", max_position_embeddings=80))
    Encoder(host, tokenizer, _config())
    with pytest.raises(ConfigError, match="inputs of 81 tokens, above the 80 positions"):
        Encoder(host, tokenizer, _config(reference_tokens=70))
    with pytest.raises(ConfigError, match="above the 80 positions"):
        Encoder(host, tokenizer, _config(selector="reconstruction"))
    with pytest.raises(ConfigError, match="heads names no KV head"):
        Encoder(host, tokenizer, _config(heads={}))
    with pytest.raises(ConfigError, match="no selector 'best'"):
        Encoder(host, tokenizer, _config(selector="best"))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        Encoder(host, tokenizer, _config()).encode(TEXTS, batch_size=0)


def test_a_foreign_tokenizer_is_refused(
    make_host: MakeHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = Encoder(Host(make_host("llama", vocab_size=90)), tokenizer, _config())
    with pytest.raises(DataError, match="has token 95, and the model only 90"):
        encoder.encode(["quiz"])

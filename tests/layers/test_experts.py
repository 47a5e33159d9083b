"""Experts: against a plain loop, gradients, who takes which token, and as part of a saved model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import strata
from strata.errors import ConfigError, ModelError
from strata.layers import Experts, ExpertsConfig, insert_experts
from strata.models import ModelConfig, build, count, install_experts

D, E = 6, 4


@pytest.fixture
def experts() -> Experts:
    parts = [nn.Sequential(nn.Linear(D, 5), nn.SiLU(), nn.Linear(5, D)) for _ in range(E)]
    return Experts(D, parts, dtype=torch.float64).double()


@pytest.fixture(scope="module")
def tiny_host() -> Callable[..., ModelConfig]:
    def make(**fields: object) -> ModelConfig:
        host = {
            "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40,
            "max_position_embeddings": 32,
        }  # fmt: skip
        return ModelConfig(host=host, **fields)

    return make


def by_token(experts: Experts, hidden_nd: Tensor) -> Tensor:
    """Token after token, expert after expert, as the papers write it."""
    scores_ne = (hidden_nd @ experts.router.weight.T).softmax(dim=1)
    n = len(hidden_nd)
    chosen: list[list[int]] = [[] for _ in range(n)]
    for e in range(E):
        if experts.training:
            share = -(-int(experts.capacity_factor * n) // E)
            for token in sorted(range(n), key=lambda t: -scores_ne[t, e].item())[:share]:
                chosen[token].append(e)
    if not experts.training:
        chosen = [[int(scores_ne[token].argmax())] for token in range(n)]
    rows = []
    for token in range(n):
        row = torch.zeros(D, dtype=hidden_nd.dtype)
        for e in chosen[token]:
            row = row + scores_ne[token, e] * experts.experts[e](hidden_nd[token])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("tokens", "factor"), [(1, 1.0), (7, 1.0), (16, 2.0), (13, 4.0)])
def test_equal_to_a_loop_with_gradients(
    experts: Experts, tokens: int, factor: float, training: bool
) -> None:
    experts.capacity_factor = factor
    experts.train(training)
    hidden_nd = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    sources = [hidden_nd, *experts.parameters()]
    weights_nd = torch.randn(tokens, D, dtype=torch.float64)
    found, wanted = experts(hidden_nd), by_token(experts, hidden_nd)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    ours = torch.autograd.grad((found * weights_nd).sum(), sources, allow_unused=True)
    theirs = torch.autograd.grad((wanted * weights_nd).sum(), sources, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:  # an expert without a token
            assert not training and (one is None or not one.any())
        else:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_in_training_all_experts_are_equally_busy(experts: Experts) -> None:
    seen: list[int] = []
    for expert in experts.experts:
        expert.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    experts.train()(torch.randn(2, 9, D, dtype=torch.float64))
    assert seen == [5] * E  # 18 tokens over 4, rounded up
    assert experts.capacity(1) == 1 and experts.capacity(18) == 5
    experts.capacity_factor = 4.0
    assert experts.capacity(18) == 18


def test_in_evaluation_a_token_does_not_see_the_others(experts: Experts) -> None:
    hidden_nd = torch.randn(12, D, dtype=torch.float64)
    experts.eval()
    alone = torch.cat([experts(row[None]) for row in hidden_nd])
    torch.testing.assert_close(experts(hidden_nd), alone, rtol=1e-12, atol=1e-14)


def test_scores_are_fp32_under_autocast() -> None:
    experts = Experts(D, [nn.Linear(D, D) for _ in range(E)])
    hidden_nd = torch.randn(5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores_ne = experts.scores(hidden_nd)
    assert scores_ne.dtype == torch.float32
    torch.testing.assert_close(scores_ne, experts.scores(hidden_nd), rtol=0, atol=0)


def test_a_saved_model_answers_alike(tiny_host: Callable[..., ModelConfig], tmp_path: Path) -> None:
    torch.manual_seed(3)
    memory = strata.MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4, num_heads=2)
    ids = torch.randint(40, (2, 9))
    for name, layers in (("experts", None), ("both", memory)):
        model = build(tiny_host(experts=ExpertsConfig(num_experts=3)), layers).eval()
        model.save_pretrained(tmp_path / name)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(opened).__name__ == "StrataLlamaForCausalLM"
        assert torch.equal(opened(ids).logits, model(ids).logits)
        assert opened.state_dict().keys() == model.state_dict().keys()


def test_experts_are_drawn_apart_or_alike(tiny_host: Callable[..., ModelConfig]) -> None:
    fresh = build(tiny_host(experts=ExpertsConfig(num_experts=3, layers=(1,))), None)
    assert not any(isinstance(m, Experts) for m in fresh.model.layers[0].modules())
    first, second, third = (x.up_proj.weight for x in fresh.model.layers[1].mlp.experts)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    for weight in (first, second, third):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.2)
    trained = build(tiny_host(), None)
    wanted = trained.model.layers[0].mlp.up_proj.weight.clone()
    install_experts(trained, ExpertsConfig(num_experts=2), alike=True)
    for expert in trained.model.layers[0].mlp.experts:
        assert torch.equal(expert.up_proj.weight, wanted)


def test_counts(tiny_host: Callable[..., ModelConfig]) -> None:
    dense = count(build(tiny_host(), None), sequence_tokens=8)
    mixed = count(build(tiny_host(experts=ExpertsConfig(num_experts=3)), None), sequence_tokens=8)
    layer, router = 3 * 16 * 24, 3 * 16
    assert mixed.params_total == dense.params_total + 2 * (2 * layer + router)
    assert mixed.params_active == dense.params_active + 2 * router
    assert mixed.flops_per_token == dense.flops_per_token + 2 * 2 * router
    twice = ExpertsConfig(num_experts=3, capacity_factor=2.0)
    busy = count(build(tiny_host(experts=twice), None), sequence_tokens=8)
    assert busy.flops_per_token == mixed.flops_per_token + 2 * 2 * layer


def test_a_model_with_experts_trains(tiny_host: Callable[..., ModelConfig]) -> None:
    model = build(tiny_host(experts=ExpertsConfig(num_experts=4)), None).train()
    ids = torch.randint(40, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 1}, "num_experts"),
        ({"num_experts": 2, "capacity_factor": 3.0}, "lower it"),
        ({"num_experts": 2, "layers": (1, 1)}, "twice"),
        ({"num_experts": 2, "layers": (-1,)}, "counted from 0"),
        ({"num_experts": 2, "layers": ()}, "at least one"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertsConfig(**fields)


def test_refuses_what_does_not_fit(tiny_host: Callable[..., ModelConfig]) -> None:
    two = ExpertsConfig(num_experts=2)
    with pytest.raises(ConfigError, match=r"model\.experts\.layers names layer 2"):
        build(tiny_host(experts=ExpertsConfig(num_experts=2, layers=(2,))), None)
    model: PreTrainedModel = build(tiny_host(experts=two), None)
    with pytest.raises(ModelError, match="experts already"):
        install_experts(model, two)
    with pytest.raises(ModelError, match=r"layers\[i\]\.mlp"):
        insert_experts(nn.Linear(2, 2), two)
    memory = strata.MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4, num_heads=2)
    with pytest.raises(ModelError, match="before them"):
        install_experts(build(tiny_host(), memory), two)

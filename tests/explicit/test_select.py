"""Which tokens are kept: each selector beside its formula, written as loops over numbers."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from importlib import resources

import pytest
import torch
from torch import Tensor

from strata.errors import ConfigError
from strata.explicit.select import SELECTORS, LayerStates, keep_highest, make_selector

N, G, R, T, D, Q = 3, 2, 2, 7, 4, 5
LENGTHS = (7, 4, 1)


def _states(softcap: float | None = None, layer: int = 2) -> LayerStates:
    chance = torch.Generator().manual_seed(0)
    valid_nt = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    # Padding is garbage, as after a forward pass, and must not matter.
    keys_ngtd = torch.randn(N, G, T, D, generator=chance)
    keys_ngtd[~valid_nt[:, None].expand(N, G, T)] = 1e4
    queries_ngrtd = torch.randn(N, G, R, T, D, generator=chance) * 3
    queries_ngrtd[~valid_nt[:, None, None].expand(N, G, R, T)] = -1e4
    return LayerStates(
        layer=layer,
        heads=(0, 3),
        ids_nt=torch.randint(0, 50, (N, T), generator=chance),
        valid_nt=valid_nt,
        keys_ngtd=keys_ngtd,
        values_ngtd=torch.randn(N, G, T, D, generator=chance),
        scaling=0.4,
        softcap=softcap,
        make_queries=lambda: queries_ngrtd,
        make_repeat_weights=lambda: torch.rand(
            N, G, R, Q, T, generator=torch.Generator().manual_seed(1)
        ),
    )


def _valid(scores_ngt: Tensor) -> Tensor:
    return torch.stack(
        [scores_ngt[n, g, j] for n in range(N) for g in range(G) for j in range(LENGTHS[n])]
    ).double()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention(softcap: float | None) -> None:
    states = _states(softcap)
    got = make_selector("attention").scores(states)
    want = []
    for n in range(N):
        for g in range(G):
            total = [0.0] * LENGTHS[n]
            for r in range(R):
                for i in range(LENGTHS[n]):
                    query = states.queries_ngrtd[n, g, r, i].tolist()
                    exps = []
                    for j in range(LENGTHS[n]):
                        key = states.keys_ngtd[n, g, j].tolist()
                        logit = sum(a * b for a, b in zip(query, key, strict=True)) * 0.4
                        if softcap:
                            logit = math.tanh(logit / softcap) * softcap
                        exps.append(math.exp(logit))
                    for j in range(LENGTHS[n]):
                        total[j] += exps[j] / sum(exps) / R
            want += total
    # fp32 logits up to about 20, so weights to a few parts in a million.
    torch.testing.assert_close(_valid(got), torch.tensor(want).double(), atol=1e-6, rtol=2e-5)


def test_key_norm() -> None:
    states = _states()
    want = [
        -math.sqrt(sum(x * x for x in states.keys_ngtd[n, g, j].tolist()))
        for n in range(N) for g in range(G) for j in range(LENGTHS[n])
    ]  # fmt: skip
    got = _valid(make_selector("key_norm").scores(states))
    torch.testing.assert_close(got, torch.tensor(want).double(), atol=1e-6, rtol=1e-6)


def test_reconstruction() -> None:
    states = _states()
    want = [
        max(states.repeat_weights_ngrqt[n, g, r, q, j].item() for r in range(R) for q in range(Q))
        for n in range(N) for g in range(G) for j in range(LENGTHS[n])
    ]  # fmt: skip
    assert torch.equal(
        _valid(make_selector("reconstruction").scores(states)), torch.tensor(want).double()
    )
    assert [name for name in SELECTORS if make_selector(name).repeats] == ["reconstruction"]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_expected(softcap: float | None) -> None:
    """The mean weight over a reader's queries, whatever the reference itself looks for."""
    reader_grqd = torch.randn(G, R, Q, D, generator=torch.Generator().manual_seed(2)) * 3
    states = replace(_states(softcap), reader_queries_grqd=reader_grqd)
    got = make_selector("expected").scores(states)
    want = []
    for n in range(N):
        for g in range(G):
            total = [0.0] * LENGTHS[n]
            for query in reader_grqd[g].flatten(0, 1).tolist():
                exps = []
                for j in range(LENGTHS[n]):
                    key = states.keys_ngtd[n, g, j].tolist()
                    logit = sum(a * b for a, b in zip(query, key, strict=True)) * 0.4
                    if softcap:
                        logit = math.tanh(logit / softcap) * softcap
                    exps.append(math.exp(logit))
                for j in range(LENGTHS[n]):
                    total[j] += exps[j] / sum(exps) / (R * Q)
            want += total
    torch.testing.assert_close(_valid(got), torch.tensor(want).double(), atol=1e-6, rtol=2e-5)
    assert [name for name in SELECTORS if make_selector(name).asks] == ["expected"]


def test_the_invented_questions_stay_as_they_are() -> None:
    """Banks remember the selector by its name: other questions need another name."""
    text = resources.files("strata.explicit").joinpath("invented_questions.txt").read_bytes()
    assert hashlib.sha256(text).hexdigest() == (
        "066f580b0e741f94571b16a983e76d6bd9f0b055cd43aceff09c33463d69055e"
    )
    wholes = text.decode().strip().split("\n\n")
    assert len(wholes) == 32
    assert all(whole.startswith("Question: ") and "\nAnswer: " in whole for whole in wholes)


def test_random_depends_on_text_layer_and_head_only() -> None:
    selector = make_selector("random")
    states = _states()
    scores_ngt = selector.scores(states)
    assert torch.equal(selector.scores(states), scores_ngt)
    alone = LayerStates(
        layer=2, heads=(3,), ids_nt=states.ids_nt[1:2, :4], valid_nt=states.valid_nt[1:2, :4],
        keys_ngtd=states.keys_ngtd[1:2, 1:, :4], values_ngtd=states.values_ngtd[1:2, 1:, :4],
        scaling=1.0, softcap=None, make_queries=lambda: torch.empty(0),
    )  # fmt: skip
    assert torch.equal(selector.scores(alone)[0, 0], scores_ngt[1, 1, :4])
    assert not torch.equal(scores_ngt[0, 0], scores_ngt[0, 1])
    assert not torch.equal(selector.scores(_states(layer=3)), scores_ngt)


def test_random_is_fair() -> None:
    """Every place is kept about equally often: 8 of 32, over 400 texts."""
    ids_nt = torch.arange(400 * 32).reshape(400, 32)
    valid_nt = torch.ones(400, 32, dtype=torch.bool)
    states = LayerStates(
        layer=0, heads=(0,), ids_nt=ids_nt, valid_nt=valid_nt, keys_ngtd=torch.zeros(400, 1, 32, 2),
        values_ngtd=torch.zeros(400, 1, 32, 2), scaling=1.0, softcap=None,
        make_queries=lambda: torch.empty(0),
    )  # fmt: skip
    places = keep_highest(make_selector("random").scores(states), valid_nt, tokens=8)
    counts = places.flatten().bincount(minlength=32)
    # 100 expected, standard deviation 8.7.
    assert counts.min() > 60 and counts.max() < 140


def test_all_keeps_every_token() -> None:
    states = _states()
    places = keep_highest(make_selector("all").scores(states), states.valid_nt, tokens=T)
    assert places[0, 0].tolist() == list(range(T))
    assert places[1, 1, :4].tolist() == list(range(4))


def test_highest_are_kept_in_ascending_places() -> None:
    chance = torch.Generator().manual_seed(5)
    scores_ngt = torch.randn(4, 3, 20, generator=chance)
    lengths = [20, 9, 3, 1]
    valid_nt = torch.arange(20) < torch.tensor(lengths)[:, None]
    places = keep_highest(scores_ngt, valid_nt, tokens=5)
    for n, length in enumerate(lengths):
        for g in range(3):
            ranked = sorted(range(length), key=lambda j: -scores_ngt[n, g, j].item())
            want = sorted(ranked[:5])
            assert places[n, g, : len(want)].tolist() == want
            assert all(place >= length for place in places[n, g, len(want) :].tolist())
    assert keep_highest(scores_ngt, valid_nt, tokens=64).shape == (4, 3, 20)


@pytest.mark.parametrize("scale", [1.0, 1e-12, -1.0])
def test_equal_scores_keep_the_earlier_token(scale: float) -> None:
    """Also where rounding makes them differ, in any direction."""
    noise = 1 + 3e-7 * torch.randn(8, 1, 12, generator=torch.Generator().manual_seed(6))
    scores_ngt = scale * noise
    scores_ngt[..., 7] += abs(scale) * 1e-3
    places = keep_highest(scores_ngt, torch.ones(8, 12, dtype=torch.bool), tokens=4)
    assert places.tolist() == [[[0, 1, 2, 7]]] * 8
    assert scores_ngt.argsort(-1).unique(dim=0).shape[0] > 1  # the noise is there


def test_an_unknown_selector_is_refused() -> None:
    with pytest.raises(ConfigError, match="no selector 'best': choose from attention, key_norm, "):
        make_selector("best")

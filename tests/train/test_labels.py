"""Logits only where a loss falls: the same loss and gradients as from all of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from strata.layers import MemoryLayerConfig
from strata.models import ModelConfig, build
from strata.train.labels import count_labels, head_reads_only, label_tokens

VOCAB = 40


@pytest.fixture(params=["llama", "gemma2"])  # gemma2 caps its logits after the head
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    host = {
        "model_type": request.param,
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    memory = MemoryLayerConfig(layers=(1,), num_half_keys=4, top_k=2, num_heads=2, key_dim=4)
    built = build(ModelConfig(host=host), memory)
    with torch.no_grad():
        # Logits large enough that capping them matters.
        built.get_output_embeddings().weight.mul_(100)
    return built


def answers_only(shape: tuple[int, int] = (3, 11)) -> torch.Tensor:
    """Labels at some positions, at the first and the last among them, and one row with none."""
    labels_bt = torch.full(shape, -100)
    labels_bt[0, [0, 4, 5]] = torch.tensor([7, 8, 9])
    labels_bt[2, [1, shape[1] - 1]] = torch.tensor([0, VOCAB - 1])
    return labels_bt


def test_label_tokens_are_predicted_one_position_before() -> None:
    positions, targets = label_tokens(answers_only())
    assert positions.tolist() == [3, 4, 22, 31]
    assert targets.tolist() == [8, 9, 0, VOCAB - 1]
    assert count_labels(answers_only()) == 4


def test_no_labels_give_no_tokens() -> None:
    positions, targets = label_tokens(torch.full((2, 5), -100))
    assert positions.shape == targets.shape == (0,)
    assert count_labels(torch.full((2, 5), -100)) == 0


def test_loss_and_gradients_are_those_of_all_logits(model: PreTrainedModel) -> None:
    labels_bt = answers_only()
    ids_bt = torch.randint(VOCAB, labels_bt.shape)
    positions, targets = label_tokens(labels_bt)

    logits_btv = model(ids_bt, use_cache=False).logits
    targets_bt = F.pad(labels_bt[:, 1:], (0, 1), value=-100)
    whole = F.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten(), reduction="sum")
    whole.backward()
    expected = {name: p.grad.to_dense() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    with head_reads_only(model, positions):
        logits_nv = model(ids_bt, use_cache=False).logits
    assert logits_nv.shape == (4, VOCAB)
    some = F.cross_entropy(logits_nv, targets, reduction="sum")
    some.backward()

    torch.testing.assert_close(some, whole)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.to_dense(), expected[name], msg=name)


def test_the_head_is_whole_again_afterwards(model: PreTrainedModel) -> None:
    ids_bt = torch.randint(VOCAB, (2, 6))
    with pytest.raises(IndexError), head_reads_only(model, torch.tensor([99])):
        model(ids_bt)
    assert model(ids_bt).logits.shape == (2, 6, VOCAB)

"""A bank belongs to one exact model: what changes a fingerprint, and what the refusal says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from strata.errors import BankError
from strata.explicit import fingerprint as fingerprint_file
from strata.explicit.fingerprint import Fingerprint, fingerprint, refuse_other, weights_sha256
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig

Make = Callable[..., Fingerprint]


@pytest.fixture
def make(make_host, _tiny_model_master: Path) -> Make:
    """`make(model)`: its fingerprint, with a tiny tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(_tiny_model_master)

    def of(model: PreTrainedModel | None = None, given=tokenizer, **settings) -> Fingerprint:
        config = ExplicitMemoryConfig(**settings)
        model = model or make_host("llama")
        return fingerprint(model, given, config, Host(model).memory_shape(config))

    return of


def test_the_same_model_is_the_same(host_model: PreTrainedModel, make: Make) -> None:
    """Also after use, after a copy, and through JSON."""
    before = make(host_model)
    host_model(input_ids=torch.tensor([[3, 4, 5]]))
    refuse_other(before, make(host_model))
    refuse_other(Fingerprint.model_validate_json(before.model_dump_json()), make(host_model))
    assert make(copy.deepcopy(host_model)) == before


def test_every_weight_counts(host_model: PreTrainedModel) -> None:
    """One bit of any parameter changes the hash."""
    before = weights_sha256(host_model)
    seen = {before}
    for parameter in host_model.parameters():
        flat = parameter.data.view(-1)
        old = flat[-1].item()
        flat[-1] = old + 0.01
        seen.add(weights_sha256(host_model))
        flat[-1] = old
    assert len(seen) == 1 + len(list(host_model.parameters()))
    assert weights_sha256(host_model) == before


def test_blocks_change_no_hash(make_host, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_host("llama")
    want = weights_sha256(model)
    monkeypatch.setattr(fingerprint_file, "_STEP_BYTES", 200)
    assert weights_sha256(model) == want


def test_names_and_shapes_count() -> None:
    """Equal bytes under another name or shape are another model."""
    first = torch.nn.Linear(2, 3, bias=False)
    second = torch.nn.Linear(3, 2, bias=False)
    second.weight.data = first.weight.data.reshape(2, 3).clone()
    assert weights_sha256(first) != weights_sha256(second)
    assert weights_sha256(torch.nn.Sequential(first)) != weights_sha256(first)


def test_the_refusal_says_what_differs(make_host, make: Make) -> None:
    bank = make()
    refused = {
        "rotary base 10000, the model has 500000": make(
            make_host("llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
        ),
        "architecture LlamaForCausalLM, the model has MistralForCausalLM": make(
            make_host("mistral")
        ),
        "dtype float32, the model has bfloat16": make(make_host("llama").bfloat16()),
        "memory layers 0, 1, the model has 1, 2": make(layers=(1, 2)),
        "4 memory heads, the model has 2 or others of as many": make(heads=(1,)),
        "tokens kept per head: 8, the model has 4": make(tokens_per_head=4),
        "marker '<s>Reference:', the model has 'Fact:'": make(marker="Fact:"),
        "codec 'bf16', the model has 'int8'": make(codec="int8"),
        "references of at most 128, the model has 64": make(reference_tokens=64),
    }
    trained = make_host("llama")
    trained.model.layers[3].mlp.up_proj.weight.data[0, 0] += 1e-3
    refused["other weights of the same LlamaForCausalLM"] = make(trained)
    for says, model in refused.items():
        with pytest.raises(BankError) as error:
            refuse_other(bank, model)
        assert str(error.value).startswith(f"this bank was written with {says}"), error.value
        assert "open it with the model" in str(error.value) and "\n" not in str(error.value)


def test_the_tokenizer_counts_but_not_its_padding(make: Make, _tiny_model_master: Path) -> None:
    bank = make()
    tokenizer = AutoTokenizer.from_pretrained(_tiny_model_master)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3)
    assert make(given=tokenizer) == bank
    tokenizer.add_tokens(["Reference"])
    with pytest.raises(BankError, match="written with another tokenizer: open"):
        refuse_other(bank, make(given=tokenizer))


def test_weights_that_are_not_loaded_are_refused() -> None:
    with pytest.raises(BankError, match="weight weight of the model is not loaded"):
        weights_sha256(torch.nn.Linear(2, 2, bias=False, device="meta"))

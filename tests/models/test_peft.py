"""LoRA beside memory: training, adapters on disk, merging."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from strata.layers import memory_layers, value_tables
from strata.train.optim import RowOptimizer, parameter_groups

VOCAB = 97
Build = Callable[..., PreTrainedModel]


def lora(**options: object) -> LoraConfig:
    base: dict[str, object] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(base | options))  # type: ignore[arg-type]


def train(model: torch.nn.Module, steps: int = 10) -> list[float]:
    groups = parameter_groups(model)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups.decay + groups.no_decay, lr=1e-2)
    ]
    if groups.tables:
        optimizers.append(RowOptimizer(groups.tables, lr=1e-2))
    ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["q_proj", "query", "value_proj"],  # the memory's own projections too
        "all-linear",
    ],
    ids=str,
)
def test_trains_saves_opens_and_merges(
    build_tiny: Build, targets: list[str] | str, tmp_path: Path
) -> None:
    base = build_tiny()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    model = get_peft_model(copy.deepcopy(base), lora(target_modules=targets))
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05

    ids = torch.randint(3, VOCAB, (2, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, logits)

        merged = model.merge_and_unload().eval()
        assert type(merged).__name__ == "StrataLlamaForCausalLM"
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(opened(input_ids=ids).logits, merged(input_ids=ids).logits)
    touched = targets != ["q_proj", "v_proj"]
    for name, tensor in merged.state_dict().items():
        kept = torch.equal(tensor, before[name])
        if "memory_values" in name:
            assert kept, name
        elif not touched:
            assert kept == (not name.endswith(("q_proj.weight", "v_proj.weight"))), name


def test_adapters_and_the_table_train_together(build_tiny: Build) -> None:
    """LoRA freezes the base; a table unfrozen afterwards is trained by its RowOptimizer."""
    model = get_peft_model(build_tiny(), lora())
    (table,) = value_tables(model).values()
    table.weight.requires_grad_(True)
    before = table.weight.detach().clone()
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    assert not torch.equal(table.weight, before)


def test_keys_can_be_saved_as_a_whole(build_tiny: Build, tmp_path: Path) -> None:
    """`modules_to_save` keeps a trained copy of a module beside the adapter."""
    base = build_tiny()
    model = get_peft_model(copy.deepcopy(base), lora(modules_to_save=["keys"]))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("half_keys" in name for name in trained)
    train(model)
    ids = torch.randint(3, VOCAB, (2, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, logits)
    assert len(list(memory_layers(again))) == 2


def test_generates(build_tiny: Build) -> None:
    model = get_peft_model(build_tiny(), lora()).eval()
    out = model.generate(input_ids=torch.randint(3, VOCAB, (2, 5)), max_new_tokens=4)
    assert out.shape[0] == 2 and out.shape[1] > 5

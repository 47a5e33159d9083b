"""Restarting positions keep packed documents apart in transformers, if no cache is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_documents import Prepare, make_texts, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from strata.data.dataset import TokenDataset
from strata.data.loader import Loader, LoaderConfig

EOS = 2
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,  # large, so that a leak is seen
}


@pytest.fixture
def batch(tmp_path: Path, prepare_to: Prepare) -> dict[str, torch.Tensor]:
    """Two rows of packed documents."""
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    prepare_to(tmp_path / "out", source)
    config = LoaderConfig(batch_size=2, sequence_tokens=200, packing="document", document_mask=True)
    return next(Loader(TokenDataset.open(tmp_path / "out"), config))


def worst_difference(model: torch.nn.Module, batch: dict[str, torch.Tensor], **options) -> float:
    """The greatest difference of logits between a document in its row and the document alone."""
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], **options
        ).logits
        worst, num_documents = 0.0, 0
        for row, ids in enumerate(batch["input_ids"]):
            start = 0
            for stop in (torch.nonzero(ids == EOS).flatten() + 1).tolist():
                alone = model(input_ids=ids[None, start:stop]).logits[0]
                worst = max(worst, (packed[row, start:stop] - alone).abs().max().item())
                start, num_documents = stop, num_documents + 1
    assert num_documents >= 4
    return worst


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)],
)
def test_documents_are_isolated_without_a_cache(
    batch: dict[str, torch.Tensor], model_class: type, config_class: type, attention: str
) -> None:
    model = model_class(config_class(**SIZES, attn_implementation=attention)).eval()
    # float32 sums in another order; logits are of order 10.
    assert worst_difference(model, batch, use_cache=False) < 1e-4
    # The trap that the docstring of Loader warns of. Should this ever fail, drop the warning.
    assert worst_difference(model, batch) > 1e-2


def test_loss_of_a_packed_batch_is_that_of_its_documents(batch: dict[str, torch.Tensor]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss.item()
        total, count = 0.0, 0
        for ids in batch["input_ids"]:
            start = 0
            for stop in (torch.nonzero(ids == EOS).flatten() + 1).tolist():
                document = ids[None, start:stop]
                targets = stop - start - 1
                total += model(input_ids=document, labels=document).loss.item() * targets
                start, count = stop, count + targets
    assert packed == pytest.approx(total / count, rel=1e-5)

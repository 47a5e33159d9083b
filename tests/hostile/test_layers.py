"""What users can get wrong about memory layers and hosts: one clear line, and nothing half-done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import strata
from strata.config import validate
from strata.errors import ConfigError, ModelError, StrataError
from strata.layers import MemoryLayerConfig, memory_layers
from strata.models import ModelConfig, build

HOST: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
MEMORY: dict[str, Any] = {"layers": [1], "num_half_keys": 8, "top_k": 4, "num_heads": 2}


def one_line(error: BaseException, *says: str) -> None:
    text = str(error)
    assert text and "\n" not in text and "Traceback" not in text
    for part in says:
        assert part in text, text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": []}, "layers is empty"),
        ({"layers": [1, 1]}, "names a layer twice"),
        ({"layers": [-1]}, "counted from 0"),
        ({"layers": "1,2"}, "layers"),
        ({"layers": None}, "layers"),
        ({"top_k": 9}, "top_k 9 is more than the 8 half-keys"),
        ({"top_k": 0}, "top_k"),
        ({"num_half_keys": 0}, "num_half_keys"),
        ({"num_heads": 0}, "num_heads"),
        ({"key_dim": 7}, "key_dim 7 is odd"),
        ({"key_dim": 0}, "key_dim"),
        ({"value_dim": 0}, "value_dim"),
        ({"kind": "peer"}, "set gate to none for peer"),
        ({"kind": "tucker"}, "kind"),
        ({"placement": "above"}, "placement"),
        ({"gate": "swish"}, "gate"),
        ({"query_norm": "batch"}, "query_norm"),
        ({"input_dropout": 1.0}, "input_dropout"),
        ({"value_dropout": -0.1}, "value_dropout"),
        ({"seed": -1}, "seed"),
        ({"num_halfkeys": 8}, "unknown key memory.num_halfkeys"),
    ],
    ids=str,
)
def test_memory_options(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(_Recipe, {"memory": MEMORY | change}, origin="recipe.yaml")
    one_line(caught.value, "recipe.yaml", says)


def test_memory_options_in_python() -> None:
    """Made by hand, the configuration raises pydantic's ValueError with the same sentence."""
    with pytest.raises(ValueError, match="top_k 9 is more than the 8 half-keys"):
        MemoryLayerConfig(**MEMORY | {"top_k": 9})
    config = MemoryLayerConfig(**MEMORY)
    with pytest.raises(ValueError, match="frozen"):
        config.top_k = 2  # type: ignore[misc]


class _Recipe(strata.config.FrozenConfig):
    memory: MemoryLayerConfig


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hiden_size": 64}, "model.host.hiden_size is not a field of LlamaConfig"),
        ({"model_type": "lama"}, "lama"),
        ({"model_type": None}, "model.host"),
        ({"model_type": 5}, "model.host"),
        ({"hidden_size": "wide"}, "model.host"),
        ({"hidden_size": -4}, "model.host"),
        ({"vocab_size": None}, "model.host"),
        ({"num_attention_heads": 0}, "model.host"),
        ({"hidden_size": 33}, "model.host"),
        ({"hidden_act": "no_such_activation"}, "model.host"),
        ({"model_type": "bert"}, "model.host"),
    ],
    ids=str,
)
def test_host_fields(change: dict[str, Any], says: str) -> None:
    with pytest.raises(StrataError) as caught:
        build(ModelConfig(host=HOST | change), None)
    one_line(caught.value, says)


@pytest.mark.parametrize(
    "source", [{}, {"host": HOST, "path": "somewhere"}, {"host": {"hidden_size": 32}}], ids=str
)
def test_one_source_of_the_host(source: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(ModelConfig, source, origin="recipe.yaml")
    one_line(caught.value, "host")


@pytest.mark.parametrize("path", ["nowhere/at/all", "no-such-organisation/no-such-model", ""])
def test_a_path_that_is_no_model(path: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(ModelConfig(path=path), None)
    one_line(caught.value)


def test_an_unknown_attention(tmp_path: Path) -> None:
    config = ModelConfig(host=HOST, attn_implementation="telepathy")
    with pytest.raises(StrataError) as caught:
        build(config, None)
    one_line(caught.value, "telepathy")


def plain_model() -> PreTrainedModel:
    torch.manual_seed(0)
    fields = {name: value for name, value in HOST.items() if name != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**fields)).eval()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"layers": [2]}, ConfigError, "layer 2, the decoder has 2: 0..1"),
        ({"layers": [0, 99]}, ConfigError, "layer 99"),
        (
            {"kind": "peer", "gate": "none", "value_dim": 16},
            ConfigError,
            "value_dim 16 does not fit a PEER layer",
        ),
    ],
    ids=str,
)
def test_a_refused_install_leaves_the_model_as_it_was(
    change: dict[str, Any], error: type[StrataError], says: str, tmp_path: Path
) -> None:
    model = plain_model()
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids).logits
    with pytest.raises(error) as caught:
        strata.install(model, MemoryLayerConfig(**MEMORY | {"freeze_base": True} | change))
    one_line(caught.value, says)
    assert type(model) is LlamaForCausalLM and type(model.config) is LlamaConfig
    assert not hasattr(model.config, "memory_layers") and not list(memory_layers(model))
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, before)
    model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    strata.install(model, MemoryLayerConfig(**MEMORY))  # and it still takes memory


def test_installing_twice() -> None:
    model = plain_model()
    strata.install(model, MemoryLayerConfig(**MEMORY))
    kept = model.config.memory_layers
    with pytest.raises(ModelError) as caught:
        strata.install(model, MemoryLayerConfig(**MEMORY | {"layers": [0]}))
    one_line(caught.value, "already")
    assert model.config.memory_layers is kept


def test_a_model_that_is_no_decoder() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    before = type(model)
    with pytest.raises(ModelError) as caught:
        strata.install(model, MemoryLayerConfig(**MEMORY | {"layers": [0]}))
    one_line(caught.value, "GPT2LMHeadModel", "layers[i].mlp")
    assert type(model) is before


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_model_without_a_language_model_head(name: str) -> None:
    """Registered, its class would be what the Auto classes open every strata Llama as."""
    fields = {key: value for key, value in HOST.items() if key != "model_type"}
    model = getattr(transformers, name)(LlamaConfig(**fields))
    with pytest.raises(ModelError) as caught:
        strata.install(model, MemoryLayerConfig(**MEMORY))
    one_line(caught.value, name, "ForCausalLM")
    assert type(model).__name__ == name and not list(memory_layers(model))


def test_a_model_of_text_and_pictures() -> None:
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config())
    with pytest.raises(ModelError) as caught:
        strata.install(model, MemoryLayerConfig(**MEMORY))
    one_line(caught.value, "Gemma3ForConditionalGeneration")

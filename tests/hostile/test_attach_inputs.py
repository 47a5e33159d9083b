"""What attach and generate refuse, in one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    PreTrainedModel,
)

from strata.errors import StrataError
from strata.explicit.attach import attach, presets
from strata.explicit.memories import Memories
from strata.explicit.settings import ExplicitMemoryConfig

TINY = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SETTINGS = ExplicitMemoryConfig(layers=(0,), tokens_per_head=4, reference_tokens=16)
IDS = torch.randint(5, 96, (1, 9), generator=torch.Generator().manual_seed(6))


class Tokenizer:
    """As much of one as attach asks for."""

    bos_token_id = 1

    def __repr__(self) -> str:
        return "Tokenizer()"  # without its address: names of tests are the same in every process

    def __init__(self, size: int = 96) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [3, 4]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


class Hit:
    id, score, text, source, start, end = "a", 1.0, "a", "a.txt", 0, 1


class OneMemory:
    """A source that always finds one memory."""

    def __init__(self, memory: Memories | None = None) -> None:
        self.memory = memory or Memories(
            torch.randn(1, 2, 4, 8),
            torch.randn(1, 2, 4, 8),
            torch.arange(4, dtype=torch.int16).expand(1, 2, 4),
            torch.tensor([4]),
        )

    def find(self, queries: Sequence[str], top_k: int) -> list[list[Any]]:
        return [[Hit()] for _ in queries]

    def load(self, ids: Sequence[str]) -> Memories:
        return self.memory


@pytest.fixture
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).eval()


Refused = Callable[[Any, str], None]


def refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(StrataError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None


def try_attach(model: Any, source: Any = None, tokenizer: Any = None, **options: Any) -> None:
    settings = {"config": SETTINGS, **options}
    with attach(model, source or OneMemory(), tokenizer=tokenizer or Tokenizer(), **settings):
        pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, given 0"),
        ({"top_k": 0}, "top_k must be at least 1, given 0"),
        ({"prefetch_tokens": 64}, r"from 0 to chunk_tokens - 1 \(63\), given 64"),
        ({"prefetch_tokens": -1}, "given -1"),
        ({"prompt_query": "next"}, "prompt_query is own or previous, given 'next'"),
        ({"tokenizer": Tokenizer(97)}, "the tokenizer has 97 tokens and the model 96"),
        ({"config": ExplicitMemoryConfig(layers=(7,))}, "memory layer 7 does not exist"),
    ],
    ids=str,
)
def test_wrong_arguments(model: PreTrainedModel, options: dict[str, Any], says: str) -> None:
    refused(lambda: try_attach(model, **options), says)
    assert "generate" not in vars(model)


def test_wrong_presets_and_sources(model: PreTrainedModel) -> None:
    refused(lambda: presets.Preset(temperature=0.0), "temperature must be above 0, given 0.0")
    refused(lambda: presets.Preset(scale=float("nan")), "scale must be above 0, given nan")
    refused(lambda: presets.Preset(positions="around"), "parallel or sequential, given 'around'")
    refused(lambda: try_attach(model, source=[1]), "list has no find")


def test_a_model_with_rows_to_spare_is_not_refused() -> None:
    """A tokenizer trained on few documents is far smaller than the model made for it."""
    wide = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**TINY, "vocab_size": 4096})
    )
    refused(lambda: try_attach(wide, tokenizer=Tokenizer(4097)), "4097 tokens and the model 4096")
    try_attach(wide, tokenizer=Tokenizer(96))


def test_other_kinds_of_model() -> None:
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=96)
    )
    refused(lambda: try_attach(t5), "has an encoder")
    bert = BertModel(
        BertConfig(
            vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    refused(lambda: try_attach(bert), "decoder")
    refused(lambda: try_attach(torch.nn.Linear(2, 2)), "a transformers model is needed")


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_other_attention(model: PreTrainedModel, name: str) -> None:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = name
    refused(lambda: try_attach(model), f"attention is '{name}'.*attn_implementation='sdpa'")
    assert "generate" not in vars(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_memory_layer_with_a_window() -> None:
    settings = {**TINY, "sliding_window": 16}
    sliding = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **settings))
    refused(lambda: try_attach(sliding), "layer 0 sees a sliding window only")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"assistant_model": "model"}, "assisted generation"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "DoLa"),
        ({"num_beams": 4, "num_beam_groups": 2}, "group beam search"),
        ({"guidance_scale": 2.0}, "classifier-free guidance"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"custom_generate": lambda **_: None}, "custom generation"),
        ({"inputs": None}, "the prompt has no token"),
        ({"inputs": torch.zeros(1, 0, dtype=torch.long)}, "the prompt has no token"),
        ({"attention_mask": torch.zeros(1, 9)}, "row 0 of the prompt has no token"),
        ({"attention_mask": torch.ones(1, 8)}, r"mask has shape \[1, 8\], the prompt \[1, 9\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_generating_as_memory_cannot_follow(
    model: PreTrainedModel, options: dict[str, Any], says: str
) -> None:
    options = {k: model if v == "model" else v for k, v in options.items()} if (
        "assistant_model" in options
    ) else options  # fmt: skip
    with attach(model, OneMemory(), tokenizer=Tokenizer(), config=SETTINGS) as memory:
        refused(lambda: model.generate(**{"inputs": IDS, "max_new_tokens": 2, **options}), says)
        assert memory.used == []
        assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 11)


def test_a_cache_that_holds_the_whole_prompt(model: PreTrainedModel) -> None:
    with attach(model, OneMemory(), tokenizer=Tokenizer(), config=SETTINGS):
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        refused(
            lambda: model.generate(IDS[:, :3], past_key_values=cache),
            "the cache holds 9 tokens and the prompt 3; give the whole conversation",
        )


@pytest.mark.parametrize("change", ["heads", "tokens", "width", "places", "number"])
def test_memories_of_another_shape(model: PreTrainedModel, change: str) -> None:
    good = OneMemory().memory
    keys, places = good.keys_nstd, good.places_nst
    if change == "number":
        bad = Memories.cat([good, good])
    elif change == "places":
        bad = replace(good, places_nst=places[:, :, :3])
    else:
        axis = {"heads": 1, "tokens": 2, "width": 3}[change]
        narrow = keys.narrow(axis, 0, keys.shape[axis] - 1)
        bad = replace(good, keys_nstd=narrow, values_nstd=narrow)
    with attach(model, OneMemory(bad), tokenizer=Tokenizer(), config=SETTINGS):
        refused(lambda: model.generate(IDS, max_new_tokens=2), "the memories have shape")


def test_a_direct_call_with_a_mask_of_its_own(model: PreTrainedModel) -> None:
    with attach(model, OneMemory(), tokenizer=Tokenizer(), config=SETTINGS):
        refused(
            lambda: model(input_ids=IDS, attention_mask=torch.ones(1, 1, 9, 9)),
            r"mask of shape \(rows, tokens\)",
        )


def test_a_source_that_answers_another_number_of_queries(model: PreTrainedModel) -> None:
    source = OneMemory()
    source.find = lambda queries, top_k: []  # type: ignore[method-assign]
    with attach(model, source, tokenizer=Tokenizer(), config=SETTINGS):
        refused(lambda: model(input_ids=IDS), "answered 1 queries with 0 lists of hits")

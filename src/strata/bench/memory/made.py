"""A decoder with random weights, a tokenizer of whole words, and texts of exact lengths."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from strata.bench.memory.sizes import MemorySize
from strata.data.facts.factbook import load_facts, training_statements
from strata.explicit.cut import cut
from strata.explicit.documents import Document
from strata.explicit.settings import ExplicitMemoryConfig
from strata.models import ModelConfig, build

_PROMPTS = 100


def make_decoder(size: MemorySize, vocab_size: int) -> PreTrainedModel:
    """A Llama of this size, always the same."""
    torch.manual_seed(0)
    host: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "vocab_size": vocab_size,
    }
    return build(ModelConfig(host=host), None)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, so that lengths in tokens are exact."""
    words = sorted({word for text in _sentences() for word in text.split()})
    names = ["<pad>", "<s>", "<unk>", "Reference:", *words]
    vocabulary = {word: number for number, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )


def make_texts(size: MemorySize, tokenizer: Any) -> tuple[list[Document], list[list[int]]]:
    """References as long as they may be, and prompts, of facts in ever another order."""
    sentences, shuffle = _sentences(), random.Random(0).shuffle

    def text(tokens: int) -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < 8 * tokens:  # characters: more than any tokenizer's tokens
            shuffle(sentences)
            parts += sentences
        return " ".join(parts)

    config = ExplicitMemoryConfig(reference_tokens=size.reference_tokens)
    whole = Document(text(size.references * size.reference_tokens), "facts")
    references = cut(whole, tokenizer, config)[: size.references]
    documents = [Document(r.text, f"facts/{n}") for n, r in enumerate(references)]
    ids = tokenizer.encode(text(_PROMPTS * size.prompt_tokens), add_special_tokens=False)
    starts = range(0, _PROMPTS * size.prompt_tokens, size.prompt_tokens)
    return documents, [ids[start : start + size.prompt_tokens] for start in starts]


def _sentences() -> list[str]:
    """The quickstart's facts in their wordings, without what would end a reference early."""
    stated = [f"{s.prompt}{s.completion}" for s in training_statements(load_facts())]
    return ["".join(c for c in text if c.isalnum() or c == " ") for text in stated]

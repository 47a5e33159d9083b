"""What reading memories costs: decoding, prompts and refreshes, against the same model without.

    python benchmarks/read_memory.py

A random Llama of 56M parameters, fp32; 5 memories of 8 tokens in each KV head of the first half of
its layers. Both sides are measured in one run, in turns; medians.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from strata.explicit.attach import attach
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.settings import ExplicitMemoryConfig

SETTINGS = ExplicitMemoryConfig(tokens_per_head=8)


@dataclass(frozen=True)
class Hit:
    id: str
    score: float = 1.0
    source: str = "random"
    start: int = 0
    end: int = 1

    @property
    def text(self) -> str:
        return self.id


class Numbers:
    """A tokenizer whose words are numbers."""

    bos_token_id = 1

    def __len__(self) -> int:
        return 32_000

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [5, 6]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


class FiveMemories:
    def __init__(self, model: LlamaForCausalLM) -> None:
        shape = Host(model).memory_shape(SETTINGS)
        size = (5, len(shape.heads), shape.tokens)
        places = torch.arange(0, 128, 16, dtype=torch.int16)
        self.memories = Memories(
            torch.randn(*size, shape.head_dim),
            torch.randn(*size, shape.head_dim),
            places.expand(size),
            torch.full((5,), 8),
        )

    def find(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        return [[Hit(str(n)) for n in range(5)] for _ in queries]

    def load(self, ids: Sequence[str]) -> Memories:
        return self.memories[[int(name) for name in ids]]


def cache_of(model: LlamaForCausalLM, kind: str, tokens: int) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=tokens + 512)
    return DynamicCache(config=model.config)


def decode_s(model: LlamaForCausalLM, cache: Any, steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        at = torch.tensor([[int(cache.get_seq_length())]])
        start = time.perf_counter()
        model(input_ids=torch.tensor([[7]]), past_key_values=cache, position_ids=at)
        times.append(time.perf_counter() - start)
    return times


def prompt_s(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()
    reading = copy.deepcopy(plain)
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}\n")
    print("| | context | without | with memory | tokens/s, of without |")
    print("|---|---:|---:|---:|---:|")
    with attach(reading, FiveMemories(reading), tokenizer=Numbers(), config=SETTINGS) as memory:

        def row(name: str, tokens: int, sides: tuple[list[float], list[float]]) -> None:
            a, b = (statistics.median(side) * 1000 for side in sides)
            print(f"| {name} | {tokens} | {a:.1f} ms | {b:.1f} ms | {a / b:.2f} |", flush=True)

        for kind in ("dynamic", "static"):
            for tokens in (256, 1024, 4096):
                ids = torch.randint(5, 32_000, (1, tokens))
                caches = [cache_of(model, kind, tokens) for model in (plain, reading)]
                sides: tuple[list[float], list[float]] = ([], [])
                pairs = list(zip((plain, reading), caches, sides, strict=True))
                for model, cache, _ in pairs:
                    model(input_ids=ids, past_key_values=cache)
                for turn in range(options.rounds):
                    for model, cache, times in pairs if turn % 2 else pairs[::-1]:
                        times += decode_s(model, cache, 8)
                row(f"decode, {kind} cache", tokens, sides)
        for tokens in (256, 1024, 4096):
            ids = torch.randint(5, 32_000, (1, tokens))
            sides = ([], [])
            for turn in range(max(3, 8192 // tokens // 2)):
                pairs = list(zip((plain, reading), sides, strict=True))
                for model, times in pairs if turn % 2 else pairs[::-1]:
                    times.append(prompt_s(model, ids))
            row("prompt", tokens, sides)
        memory.stats.inject_ms = 0.0
        reading.generate(ids[:, :64], max_new_tokens=642, min_new_tokens=642, do_sample=False)
        each = memory.stats.inject_ms / 12  # the prompt, what follows it, and ten more
    print(f"\nOne refresh (5 memories to their positions in all layers): {each:.1f} ms.")


if __name__ == "__main__":
    main()

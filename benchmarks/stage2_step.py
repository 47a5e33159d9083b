"""A training step that encodes and reads references, beside a plain step of the same tokens.

    python benchmarks/stage2_step.py --rounds 5

Each of the row's chunks of 64 tokens has a reference of its own of 128 tokens, all of them
different: the worst case, for neighbours often find the same one. A step is the forward pass, the
loss, the backward pass and AdamW. "constant memories" reads the same ones without encoding them;
"encoding" encodes alone, with a backward pass. Everybody runs in turns. The aim is 2.3 of plain.
"""

from __future__ import annotations

import argparse
import os
import random
from typing import Any

import torch
from encode_throughput import DECODER, TOKENS, VOCAB, words
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from strata.bench.timing import race
from strata.explicit.encode import Encoder
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.reading import Documents, Reading
from strata.explicit.settings import ExplicitMemoryConfig

CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--encode-batch", type=int, default=32)
    parser.add_argument("--selector", default="attention")
    parser.add_argument("--documents", type=int, default=1, help="in a row, kept apart")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu")
    step = Step(parser.parse_args())
    times_ms = race(
        {
            "plain": step.plain,
            "with memories": step.with_memories,
            "constant memories": step.constant_memories,
            "encoding": step.encoding,
        },
        rounds=step.options.rounds,
        device=step.device,
    )
    print(step)
    for name, time_ms in times_ms.items():
        print(f"{name:18s} {time_ms:9.1f} ms   {time_ms / times_ms['plain']:.2f} of plain")


class Step:
    """A model, a batch, and the ways to train on it."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.device = torch.device(options.device)
        torch.manual_seed(0)
        settings = {**DECODER, "max_position_embeddings": options.tokens}
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
        self.model.to(self.device).train()
        if options.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        config = ExplicitMemoryConfig(selector=options.selector)
        tokenizer = words()
        self.encoder = Encoder(Host(self.model), tokenizer, config)
        self.reading = Reading(self.model, tokenizer, config)
        shape = (options.rows, options.tokens)
        self.ids = torch.randint(3, VOCAB, shape, device=self.device)
        self.own = torch.arange(self.ids.numel() // CHUNK).view(options.rows, -1)
        draw = random.Random(0)
        self.texts = [
            " ".join(f"w{draw.randrange(VOCAB - 3)}" for _ in range(TOKENS))
            for _ in range(self.own.numel())
        ]
        self.inputs: dict[str, Any] = {"input_ids": self.ids, "use_cache": False}
        self.documents = None
        if options.documents > 1:
            length = -(-options.tokens // options.documents)
            at = torch.arange(options.tokens)
            self.inputs["position_ids"] = (at % length).expand(shape).to(self.device)
            of_tokens = (at // length).expand(shape)
            self.documents = Documents(of_tokens, of_tokens[:, ::CHUNK])
        with torch.no_grad():
            self.constant = self.encode()

    def __str__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        return (
            f"{parameters:.1f}M parameters, {self.options}, {torch.get_num_threads()} threads of "
            f"{os.cpu_count()}, torch {torch.__version__}; {len(self.texts)} references of "
            f"{TOKENS} tokens"
        )

    def encode(self) -> Memories:
        """The references of the batch, with a graph where gradients are on."""
        return self.encoder.encode(
            self.texts, batch_size=self.options.encode_batch, with_grad=torch.is_grad_enabled()
        )

    def plain(self) -> None:
        """As any model is trained."""
        self.update(self.loss)

    def with_memories(self) -> None:
        """References are encoded within the step."""

        def loss() -> torch.Tensor:
            with self.reading(self.encode(), self.own, documents=self.documents):
                return self.loss()

        self.update(loss)

    def constant_memories(self) -> None:
        """What reading alone costs."""

        def loss() -> torch.Tensor:
            with self.reading(self.constant, self.own, documents=self.documents):
                return self.loss()

        self.update(loss)

    def encoding(self) -> None:
        """What encoding alone costs, forward and backward."""

        def loss() -> torch.Tensor:
            memories = self.encode()
            return memories.keys_nstd.square().mean() + memories.values_nstd.square().mean()

        self.update(loss)

    def loss(self) -> torch.Tensor:
        """Cross-entropy of the next token."""
        logits = self.model(**self.inputs).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), self.ids[:, 1:].flatten())

    def update(self, loss: Any) -> None:
        """One step."""
        low = self.options.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
            value = loss()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()

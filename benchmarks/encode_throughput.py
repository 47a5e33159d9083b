"""Encodes references, and reads the same tokens with the same layers alone, in turns.

    python benchmarks/encode_throughput.py --rounds 7

Everybody runs the same batches, each in one forward pass without a mask. "bare" is the decoder up
to the end of its last memory layer. An encoder tokenizes, ends in that layer's attention, takes
positions out, scores, chooses and copies; because it leaves out most of the last layer it may be
faster than "bare", so "bare, ended alike" leaves out the same and shows what is added. The aim is
0.8 of bare.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from strata.bench.timing import race
from strata.explicit.encode import Encoder
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig

VOCAB, TOKENS = 8_000, 128
DECODER = dict(
    hidden_size=512,
    intermediate_size=2816,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=VOCAB,
    max_position_embeddings=1024,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--references", type=int, default=32)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--selectors", nargs="+", default=["attention", "key_norm", "all"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DECODER)).eval()
    model = model.to(device=device, dtype=getattr(torch, options.dtype))
    host, tokenizer = Host(model), words()
    draw = random.Random(0)
    texts = [
        " ".join(f"w{draw.randrange(VOCAB - 3)}" for _ in range(TOKENS))
        for _ in range(options.references)
    ]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{parameters:.1f}M parameters {options.dtype} on {device}, {torch.get_num_threads()} "
        f"threads of {os.cpu_count()}; {options.references} references of {TOKENS} tokens"
    )
    for batch_size in options.batch_size:
        contestants = {}
        for selector in options.selectors:
            encoder = Encoder(host, tokenizer, ExplicitMemoryConfig(selector=selector))
            contestants[selector] = partial(encoder.encode, texts, batch_size=batch_size)
        compare(
            encoder, tokenizer, texts, contestants, batch_size=batch_size, rounds=options.rounds
        )


def compare(
    encoder: Encoder,
    tokenizer: Any,
    texts: Sequence[str],
    contestants: dict[str, Callable[[], object]],
    *,
    batch_size: int,
    rounds: int,
) -> None:
    """Race what encodes texts against its decoder's first layers alone, and print the rates.

    Args:
        encoder: says which layers, and what stands before each text.
        tokenizer: the encoder's.
        texts: of any lengths; batches are made and padded as the encoder makes them.
        contestants: what encodes them, by name.
    """
    host = encoder.host
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows = sorted((encoder.marker_ids + row for row in ids), key=len)
    inputs = [
        padded(rows[n : n + batch_size], host.device) for n in range(0, len(rows), batch_size)
    ]
    last = encoder.shape.layers[-1]
    everybody = contestants | {
        "bare": partial(bare, host.model, inputs, num_layers=last + 1),
        "bare, ended alike": partial(ended, host, inputs, last=last),
    }
    times_ms = race(everybody, rounds=rounds, device=host.device)
    tokens = sum(map(len, rows))
    for name, time_ms in times_ms.items():
        print(
            f"batches of {batch_size:3d}  {name:17s} {time_ms:8.1f} ms  "
            f"{tokens / time_ms * 1e3:9.0f} tokens/s  "
            f"{times_ms['bare'] / time_ms:.2f} of bare, "
            f"{times_ms['bare, ended alike'] / time_ms:.2f} of bare, ended alike"
        )


def padded(rows: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """Rows of ids, filled up on the right with id 0."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows]).to(device)


@torch.no_grad()
def bare(model: Any, inputs: Sequence[torch.Tensor], *, num_layers: int) -> None:
    """The decoder's first layers over the inputs, and nothing else."""
    layers = model.model.layers
    model.model.layers = layers[:num_layers]
    try:
        for batch in inputs:
            model.model(input_ids=batch, use_cache=False)
    finally:
        model.model.layers = layers


class Ended(Exception):
    """The last memory layer has its queries, keys and values."""


@torch.no_grad()
def ended(host: Host, inputs: Sequence[torch.Tensor], *, last: int) -> None:
    """The same, up to the attention of the last layer."""

    def attend(underneath: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx == last:
            raise Ended
        return underneath(module, *args, **kwargs)

    for batch in inputs:
        with host.intercepted(attend), contextlib.suppress(Ended):
            host.model.get_decoder()(input_ids=batch, use_cache=False)


def words() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocab = {"<unk>": 0, "<s>": 1, "Reference:": 2}
    vocab |= {f"w{number}": number + 3 for number in range(VOCAB - 3)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


if __name__ == "__main__":
    main()

"""References a second of `add` in one process and with workers of Ray, in one run.

python benchmarks/ray_encoding.py [--workers 1 2] [--articles 40] [--width 256]

A random Llama encodes country articles that come with strata. Workers are timed from the first
commit to the last, so that starting them is left out and said apart; one process likewise.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from strata.data.facts.factbook import load_articles
from strata.explicit.bank import Bank
from strata.explicit.bank.own import Own
from strata.explicit.bank.partition import WorkerMeans
from strata.explicit.bank.ray_add import running
from strata.explicit.documents import Document
from strata.explicit.settings import ExplicitMemoryConfig

CONFIG = ExplicitMemoryConfig(codec="int4")


def make_model(folder: Path, texts: list[str], width: int) -> None:
    """A random decoder of eight layers and a tokenizer of these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=["<eos>", "<pad>"])
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=8,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), head_dim=64,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def opened(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def means(folder: Path, settings: Any) -> WorkerMeans:
    """A worker's."""
    own = Own.of(*opened(folder), settings.config)
    return WorkerMeans(own.cut, own.encoder, None, own.fingerprint)


def timed(add: Callable[..., Any]) -> tuple[Any, float, float]:
    """The report of an `add`, seconds to its first commit, and references a second from there."""
    begun, marks = time.perf_counter(), []

    def note(report: Any) -> None:
        marks.append((time.perf_counter(), report.references))

    report = add(on_progress=note)
    (start, before), (end, after) = marks[0], marks[-1]
    return report, start - begun, (after - before) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--articles", type=int, default=40)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as a worker has
    given = list(load_articles().items())[: options.articles]
    documents = [Document(text, name) for name, text in given]
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        make_model(top / "model", [text for _, text in given], options.width)
        model, tokenizer = opened(top / "model")
        print("| | references | first commit, s | references/s from there |\n|---|---:|---:|---:|")
        digests = set()

        def row(name: str, bank: Bank, add: Callable[..., Any]) -> None:
            report, first_s, rate = timed(add)
            digests.add(bank.digest())
            print(f"| {name} | {report.references:,} | {first_s:.1f} | {rate:.1f} |", flush=True)

        bank = Bank.create(top / "one", model=model, tokenizer=tokenizer, config=CONFIG)
        row("one process", bank, partial(bank.add, documents, batch_references=64))
        with running(max(options.workers)):
            for count in options.workers:
                bank = Bank.create(
                    top / str(count), model=model, tokenizer=tokenizer, config=CONFIG
                )
                add = partial(
                    bank.add_with_ray, documents, open_means=partial(means, top / "model"),
                    num_workers=count, device="cpu", batch_references=64,
                    partition_characters=16_384,
                )  # fmt: skip
                row(f"Ray, {count} workers", bank, add)
        print(f"\n{len(digests)} different contents")


if __name__ == "__main__":
    main()

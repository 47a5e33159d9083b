"""A bank so small that a test makes one in milliseconds, and a script that fills it.

python tests/tiny_bank.py add BANK COUNT [PAUSE_S]    adds documents(COUNT)
python tests/tiny_bank.py churn BANK ROUNDS           replaces, removes and compacts
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strata.explicit.bank import Bank
from strata.explicit.fingerprint import Fingerprint
from strata.explicit.memories import Memories, MemoryShape, Reference
from strata.explicit.settings import ExplicitMemoryConfig

SHAPE = MemoryShape(heads=((0, 0), (0, 1), (1, 0)), tokens=4, head_dim=8)
CONFIG = ExplicitMemoryConfig(codec="int8", tokens_per_head=4)
WORDS = ("granite", "heron", "ladle", "moss", "nickel", "otter", "plum", "quartz", "raven", "silt")


@dataclass(frozen=True)
class Doc:
    text: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class TinyEncoder:
    """Memories that are a function of the text alone."""

    shape = SHAPE

    def __init__(self, pause_s: float = 0.0) -> None:
        self.calls, self._pause_s = 0, pause_s

    def encode(self, texts: Sequence[str]) -> Memories:
        self.calls += 1
        time.sleep(self._pause_s)
        s, t, d = len(SHAPE.heads), SHAPE.tokens, SHAPE.head_dim
        parts = []
        for text in texts:
            rng = torch.Generator().manual_seed(_number(text))
            kept = 1 + _number(text) % t
            filled = (torch.arange(t) < kept).float()[:, None]
            keys, values = (torch.randn(1, s, t, d, generator=rng) * filled for _ in range(2))
            places = (torch.arange(t) * filled[:, 0]).to(torch.int16).expand(1, s, t)
            parts.append(Memories(keys, values, places, torch.tensor([kept])))
        return Memories.cat(parts)


class TinyEmbedder:
    """A bag of words, hashed."""

    name, width = "tiny", 16

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.full((len(texts), self.width), 0.01, np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[_number(word) % self.width] += 1
        return vectors


def cut(document: Doc) -> list[Reference]:
    """A reference a sentence."""
    return [
        Reference(match[0], document.source, match.start(), match.end(), dict(document.metadata))
        for match in re.finditer(r"[^.]+\.", document.text)
    ]


def documents(count: int, *, start: int = 0) -> Iterator[Doc]:
    """Documents of one to four sentences."""
    for number in range(start, start + count):
        sentences = [
            f"Stone {number} lies {place} paces from the {WORDS[(number + place) % 10]}."
            for place in range(1 + number % 4)
        ]
        colour = "red" if number % 2 else 'it\'s "blue"; --'
        yield Doc(" ".join(sentences), f"stones/{number}.txt", {"colour": colour, "n": number % 5})


def fingerprint(**changes: Any) -> Fingerprint:
    """Of no model in particular."""
    fields: dict[str, Any] = dict(
        architecture="Tiny", dtype="float32", rotary='{"rope_theta": 10000.0}',
        layers=SHAPE.layers, heads=SHAPE.heads, head_dim=8, tokens=4, selector="attention",
        reference_tokens=128, marker="<s>Reference:", codec="int8", tokenizer="t", weights="w",
    )  # fmt: skip
    return Fingerprint(**{**fields, **changes})


def create(path: Path, *, config: ExplicitMemoryConfig = CONFIG) -> Bank:
    return Bank.create(
        path,
        config=config,
        embedder=TinyEmbedder(),
        shape=SHAPE,
        fingerprint=fingerprint(codec=config.codec),
    )


def reopen(path: Path) -> Bank:
    bank = Bank.open(path)
    bank.check(fingerprint())
    return bank


def add(bank: Bank, given: Any, *, encoder: TinyEncoder | None = None, **settings: Any) -> Any:
    settings = {"batch_references": 40, "batch_size": 16, **settings}
    encoder = encoder or TinyEncoder()
    return bank.add(given, cut=cut, encoder=encoder, embedder=TinyEmbedder(), **settings)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")


def main(verb: str, path: str, count: str, pause_s: str = "0") -> None:
    bank = reopen(Path(path))
    print("ready", flush=True)
    if verb == "add":
        add(bank, documents(int(count)), encoder=TinyEncoder(float(pause_s)))
        return
    for number in range(int(count)):
        changed = [Doc(f"{d.text} Turn {number}.", d.source, d.metadata) for d in documents(12)]
        add(bank, changed)
        bank.remove([f"stones/{20 + number % 10}.txt"])
        add(bank, documents(1, start=20 + number % 10))
        if number % 3 == 2:
            bank.compact(keep_s=0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])

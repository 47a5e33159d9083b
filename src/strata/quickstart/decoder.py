"""Opening the decoder that the quickstart's second part asks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from strata.config import validate
from strata.errors import ModelError
from strata.explicit.settings import ExplicitMemoryConfig
from strata.models import load

PACKED = Path(__file__).with_name("reader")  # where `strata reader pack` puts the one of strata
CARD = "reader.json"  # written by `strata reader pack`; `memory` says what references become


@dataclass(frozen=True)
class Reader:
    """A decoder with what it reads memories by.

    Attributes:
        folder: where it lies as it is here.
        learned: whether it is a packed reader.
        memory: what references become.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: Any
    memory: ExplicitMemoryConfig
    learned: bool


def open_reader(folder: Path, copy: Path) -> Reader:
    """Open a packed reader, or any decoder.

    A packed one is bf16, to be small. It is widened, and written so, because many CPUs are slow in
    bf16 and a bank belongs to one exact model: `strata ask` has to find that one.

    Args:
        folder: of the decoder.
        copy: where the widened one goes, if it has to be widened.

    Raises:
        ModelError: not a model folder, or damaged.
        ConfigError: settings of memories that cannot be.
    """
    model, tokenizer = load(folder)
    learned = (folder / CARD).is_file()
    memory = _memory(folder / CARD) if learned else ExplicitMemoryConfig()
    if model.dtype != torch.float32:
        model.float()
        model.save_pretrained(copy)
        tokenizer.save_pretrained(copy)
        folder = copy
    return Reader(folder, model, tokenizer, memory, learned)


def _memory(card: Path) -> ExplicitMemoryConfig:
    tree = json.loads(card.read_text(encoding="utf-8"))  # JSON, or it would not have been opened
    if not isinstance(tree, dict) or not isinstance(tree.get("memory"), dict):
        raise ModelError(f"{card} says no settings of memory: pack the reader again")
    return validate(ExplicitMemoryConfig, tree["memory"], origin=f"{card}: memory")

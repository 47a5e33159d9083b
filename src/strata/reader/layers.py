"""Which layer of a decoder looks answers up: RUN/layer.json.

A decoder that learnt to read text has one layer, or few, whose heads fetch the answer from the
reference. Which one differs from seed to seed, and memories anywhere else answer nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.errors import DataError
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig
from strata.files import replace_text, storage_errors

if TYPE_CHECKING:
    from strata.reader.probe import Probe

LAYER_NAME = "layer.json"


def ask_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    memory: ExplicitMemoryConfig,
) -> dict[int, dict[str, float]]:
    """What memories in each layer alone answer, of all tokens of the references.

    Args:
        model, tokenizer: whom to ask.
        probe: with ways of memories only.
        memory: what else is said of memories.

    Returns:
        Shares of exact answers by way, by layer; sliding layers cannot have memory.
    """
    host = Host(model)
    found = {}
    for layer in range(host.num_layers):
        if not host.is_sliding(layer):
            whole = {"layers": (layer,), "heads": None, "selector": "all"}
            alone = memory.model_copy(update=whole)
            answers = probe.ask(model, tokenizer, alone)
            found[layer] = {way: result.exact for way, result in answers.items()}
    return found


def best_layer(shares: Mapping[int, Mapping[str, float]]) -> int:
    """The layer with the largest sum of shares, the lowest of equal ones: it is read soonest."""
    return max(shares, key=lambda layer: (sum(shares[layer].values()), -layer))


def read_layer(out: Path) -> int | None:
    """The layer that was found for a run; None before that.

    Raises:
        DataError: the file was changed by others.
    """
    path = out / LAYER_NAME
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["layer"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: delete it, the layer is found again") from None


def write_layer(out: Path, shares: Mapping[int, Mapping[str, float]]) -> int:
    """Write down what was found; the layer.

    Raises:
        StorageError: the disk is full.
    """
    path, layer = out / LAYER_NAME, best_layer(shares)
    with storage_errors(path):
        tree = {"layer": layer, "exact": {str(name): dict(by) for name, by in shares.items()}}
        replace_text(path, json.dumps(tree, indent=1) + "\n")
    return layer

"""Documents to shards of tokens, shards to batches.

The names below load their file when first used: preparing data needs no torch. The function
`prepare` shares its name with its file and is imported from there: `strata.data.prepare.prepare`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strata.data.dataset import TokenDataset
    from strata.data.loader import Loader, LoaderConfig
    from strata.data.manifest import TokenManifest, read_manifest
    from strata.data.prepare import PrepareConfig
    from strata.data.tokenizer import train_tokenizer

_FILES = {
    "Loader": "loader",
    "LoaderConfig": "loader",
    "PrepareConfig": "prepare",
    "TokenDataset": "dataset",
    "TokenManifest": "manifest",
    "read_manifest": "manifest",
    "train_tokenizer": "tokenizer",
}

__all__ = [
    "Loader",
    "LoaderConfig",
    "PrepareConfig",
    "TokenDataset",
    "TokenManifest",
    "read_manifest",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)

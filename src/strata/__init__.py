"""Memory for language models: memory layers in any Hugging Face decoder.

Importing strata registers its models with transformers' Auto classes and does nothing else.
"""

from typing import Any

from strata.layers import (
    PEER,
    MemoryLayerConfig,
    ProductKeyMemory,
    ValueTable,
    health,
    track_usage,
)
from strata.models import install, quantize_values, register_hosts, strata_class

__version__ = "0.1.0"

__all__ = [
    "PEER",
    "MemoryLayerConfig",
    "OptimConfig",
    "ProductKeyMemory",
    "RowOptimizer",
    "ValueTable",
    "health",
    "install",
    "optimizers",
    "quantize_values",
    "strata_class",
    "track_usage",
]

_FROM_TRAIN = ("OptimConfig", "RowOptimizer", "optimizers")


def __getattr__(name: str) -> Any:
    """The training room's public names, imported when first asked for."""
    if name in _FROM_TRAIN:
        from strata.train import optim

        return getattr(optim, name)
    raise AttributeError(f"module 'strata' has no attribute {name!r}")


register_hosts()

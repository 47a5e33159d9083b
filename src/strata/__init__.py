"""Memory for language models: memory layers in any Hugging Face decoder.

Importing strata registers its models with transformers' Auto classes and does nothing else.
"""

import importlib
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
    "Bank",
    "Document",
    "ExplicitMemoryConfig",
    "MemoryLayerConfig",
    "OptimConfig",
    "ProductKeyMemory",
    "RowOptimizer",
    "ValueTable",
    "attach",
    "health",
    "install",
    "optimizers",
    "quantize_values",
    "strata_class",
    "track_usage",
]

_LATER = {
    "OptimConfig": "strata.train.optim",
    "RowOptimizer": "strata.train.optim",
    "optimizers": "strata.train.optim",
    "Bank": "strata.explicit.bank",
    "Document": "strata.explicit.documents",
    "ExplicitMemoryConfig": "strata.explicit.settings",
    "attach": "strata.explicit.attach",
}


def __getattr__(name: str) -> Any:
    """Public names of the rooms for training and explicit memory, imported when asked for."""
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'strata' has no attribute {name!r}")


register_hosts()

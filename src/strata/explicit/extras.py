"""Libraries that only explicit memory needs, imported when first used and never before."""

from __future__ import annotations

import importlib
from typing import Any

from strata.errors import ConfigError

_EXTRA = {
    "lance": "bank",
    "faiss": "bank",
    "sentence_transformers": "bank",
    "markitdown": "documents",
}


def require(module: str) -> Any:
    """Import a library of an extra.

    Raises:
        ConfigError: it is not installed; the line says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = _EXTRA[module]
        raise ConfigError(
            f'{module} cannot be imported ({error}): pip install "strata-lm[{extra}]"'
        ) from None

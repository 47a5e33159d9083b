"""Which implementation of an operation a device gets: `cpu`, `triton` or `reference`.

Triton's modules are imported when a GPU first asks for them; where Triton is missing, a GPU runs
the reference, in plain torch.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

from torch import Tensor


def implementation(operation: str, tensor: Tensor) -> ModuleType:
    """The module of `strata.ops.<operation>` for the device of a tensor."""
    package = f"strata.ops.{operation}"
    if tensor.device.type == "cpu":
        return importlib.import_module(f"{package}.cpu")
    if tensor.device.type == "cuda" and triton_available():
        return importlib.import_module(f"{package}.triton")
    return importlib.import_module(f"{package}.reference")


@functools.cache
def triton_available() -> bool:
    """Whether Triton can be imported; says so once where it cannot."""
    try:
        importlib.import_module("triton")
    except ImportError:
        warnings.warn(
            "Triton cannot be imported here: memory layers run on their reference, in plain torch",
            stacklevel=3,
        )
        return False
    return True

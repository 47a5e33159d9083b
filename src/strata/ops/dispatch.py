"""Which implementation of an operation a device gets, and whether torch must see the call.

The implementations are `cpu`, `triton` and `reference`.

Triton's modules are imported when a GPU first asks for them; where Triton is missing, a GPU runs
the reference, in plain torch.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def implementation(operation: str, tensor: Tensor) -> ModuleType:
    """The module of `strata.ops.<operation>` for the device of a tensor."""
    package = f"strata.ops.{operation}"
    if tensor.device.type == "cpu":
        return importlib.import_module(f"{package}.cpu")
    if tensor.device.type == "cuda" and triton_available():
        return importlib.import_module(f"{package}.triton")
    return importlib.import_module(f"{package}.reference")


def unwatched(*tensors: Tensor) -> bool:
    """Whether nothing has to see an operation on these: it may then skip torch's dispatcher.

    Autograd, compilers, tracers, function transforms, and modes such as fake tensors or the FLOP
    counter see operators only. In decoding there is none of them, and the dispatcher's way through
    Python costs as much as reading the rows of a token.
    """
    return (
        not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(tensor) in _PLAIN and tensor.device.type != "meta" for tensor in tensors)
    )


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

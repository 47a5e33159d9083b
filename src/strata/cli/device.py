"""Opening a model for use on a device named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from strata.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_model(
    folder: Path, *, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model folder and its tokenizer, ready for evaluation on a device.

    Raises:
        ModelError: the folder cannot be opened.
        ConfigError: there is no such device.
    """
    target = pick_device(device)  # first: a wrong device should not wait for a large model
    import torch

    from strata.models import load

    try:
        model, tokenizer = load(folder)
    except OSError as error:
        raise ModelError(f"{str(folder)[:200]} cannot be read: {error.strerror or error}") from None
    torch.nn.Module.to(model, target)
    return model.eval(), tokenizer


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first GPU where there is one, else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        known = device.type in ("cpu", "cuda", "mps", "xpu")
    except (RuntimeError, AssertionError, NotImplementedError):
        known = False
    if not known:
        raise ConfigError(f"no device {name!r} here: give auto, cpu or cuda")
    return device

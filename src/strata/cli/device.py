"""Opening a model for use on a device named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_model(
    folder: Path, *, device: str = "auto", values: str | None = None, cache_gb: float = 1.0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model folder and its tokenizer, ready for evaluation on a device.

    Args:
        folder: written by save_pretrained.
        device: auto, cpu or cuda.
        values: int8, fp8 or mapped, see `strata.models.load`.
        cache_gb: of mapped tables.

    Raises:
        ModelError: the folder cannot be opened.
        ConfigError: there is no such device, or no such storage of values.
    """
    import torch

    from strata.device import pick_device
    from strata.models import load

    target = pick_device(device)  # first: a wrong device should not wait for a large model

    try:
        storage: Any = values  # checked there
        model, tokenizer = load(folder, values=storage, cache_gb=cache_gb)
    except OSError as error:
        raise ModelError(f"{str(folder)[:200]} cannot be read: {error.strerror or error}") from None
    torch.nn.Module.to(model, target)
    return model.eval(), tokenizer

"""Devices by name: how recipes and the command line choose where a model lives."""

from __future__ import annotations

import torch

from strata.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        known = device.type in ("cpu", "cuda", "mps", "xpu")
    except (RuntimeError, AssertionError, NotImplementedError):
        known = False
    if not known:
        gpus = torch.cuda.device_count()
        raise ConfigError(
            f"no device {name!r} here (torch sees {gpus} GPUs): give auto, cpu or cuda"
        )
    return device

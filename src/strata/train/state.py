"""What a run must remember to go on exactly: weights, both optimizers, random numbers.

Every tensor is saved under a name: a weight's own, or `WEIGHT/STATE` for the optimizers
(`model.norm.weight/exp_avg`). Nothing here is needed to use the trained model; that is
`save_pretrained`'s folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from strata.train.checkpoint import Checkpoint, TensorGroups

MODEL = "model"
DENSE = "dense_optimizer"
VALUES = "value_optimizer"
RNG = "rng"

Optimizers = dict[str, torch.optim.Optimizer]


def tensor_groups(
    model: nn.Module, optimizers: Optimizers, *, device: torch.device
) -> TensorGroups:
    """All tensors of a run, by checkpoint group; nothing is copied but the random state.

    Args:
        model: the model in training.
        optimizers: by checkpoint group, `DENSE` and `VALUES`.
        device: the device whose random state counts beside the CPU's.
    """
    names = weight_names(model)
    groups = {group: dict(_state_tensors(opt, names)) for group, opt in optimizers.items()}
    return {MODEL: named_weights(model), RNG: rng_state(device), **groups}


def optimizer_numbers(optimizers: Optimizers) -> dict[str, dict[str, int | float]]:
    """What an optimizer keeps beside the state of its weights, by checkpoint group; JSON-able."""
    return {
        group: {
            key: value
            for key, value in optimizer.state_dict().items()
            if key not in ("state", "param_groups")
        }
        for group, optimizer in optimizers.items()
    }


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizers: Optimizers, *, device: torch.device
) -> None:
    """Copy a checkpoint's tensors into a freshly built model and its optimizers.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    restore_weights(checkpoint, model)
    names = weight_names(model)
    for group, optimizer in optimizers.items():
        _restore_optimizer(checkpoint, group, optimizer, names)
    set_rng_state(dict(checkpoint.tensors(RNG)), device)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a tied or shared one once under its first name."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor
    return weights


def weight_names(model: nn.Module) -> dict[int, str]:
    """Name of each weight, by the identity of its tensor."""
    return {id(tensor): name for name, tensor in named_weights(model).items()}


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the CPU's random numbers, and of a GPU's if the run is on one."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on with random numbers where `rng_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _state_tensors(
    optimizer: torch.optim.Optimizer, names: dict[int, str]
) -> Iterator[tuple[str, Tensor]]:
    for parameter in parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{names[id(parameter)]}/{key}", torch.as_tensor(value)


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's parameters, in the order by which its state_dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def restore_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy a checkpoint's weights into a model.

    Raises:
        CheckpointError: one is missing, unknown or of another shape.
    """
    weights = named_weights(model)
    missing = set(weights)
    for name, tensor in checkpoint.tensors(MODEL):
        if name not in weights:
            raise checkpoint.mismatch(MODEL, f"the recipe's model has no weight {name}")
        if tensor.shape != weights[name].shape:
            raise checkpoint.mismatch(
                MODEL,
                f"{name} is {tuple(tensor.shape)}, the recipe's model has "
                f"{tuple(weights[name].shape)}",
            )
        weights[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise checkpoint.mismatch(MODEL, f"it lacks the weight {min(missing)}")


def _restore_optimizer(
    checkpoint: Checkpoint,
    group: str,
    optimizer: torch.optim.Optimizer,
    names: dict[int, str],
) -> None:
    weights = parameters(optimizer)
    numbers = {names[id(parameter)]: number for number, parameter in enumerate(weights)}
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in checkpoint.tensors(group):
        weight, _, key = name.rpartition("/")
        if weight not in numbers:
            raise checkpoint.mismatch(group, f"the recipe trains no weight {weight}")
        state.setdefault(numbers[weight], {})[key] = tensor
    # The rates and rules come from the recipe, which is known to be the same.
    param_groups = optimizer.state_dict()["param_groups"]
    numbers_too = checkpoint.state["optimizers"][group]
    optimizer.load_state_dict({"state": state, "param_groups": param_groups, **numbers_too})

"""Optimizers: AdamW for the dense part, one row-wise pass for the value tables."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from strata.config import FrozenConfig
from strata.layers import RowTable, ValueTable, value_tables
from strata.layers.stored import training_error
from strata.ops import UseQueue, collect_uses, row_update
from strata.ops.pages import use_huge_pages
from strata.ops.row_update import TableGradients, new_state

Rounding = Literal["nearest", "stochastic"]


class OptimConfig(FrozenConfig):
    """Both optimizers; both follow the same schedule, each from its own learning rate."""

    lr: float = Field(default=1e-4, gt=0, description="dense part")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0, description="dense matrices; never on values")
    value_lr: float = Field(default=1e-3, gt=0, description="value tables")
    value_algorithm: Literal["adagrad", "adam", "sgd"] = "adagrad"
    value_betas: tuple[float, float] = Field(default=(0.9, 0.95), description="adam only")
    value_eps: float = Field(default=1e-10, gt=0)
    value_rounding: Rounding = Field(default="stochastic", description="bf16 tables only")


@dataclass(frozen=True)
class ParameterGroups:
    """The trainable parameters of a model, each in exactly one place.

    Attributes:
        decay: matrices of the dense part.
        no_decay: norms, biases, gates and scales of the dense part.
        tables: value tables, for a `RowOptimizer`.
    """

    decay: list[nn.Parameter]
    no_decay: list[nn.Parameter]
    tables: list[ValueTable]


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Sort a model's trainable parameters; frozen ones are left out.

    Raises:
        ModelError: a value table is read-only (int8, fp8 or mapped).
    """
    all_tables = _trainable(value_tables(model).values())
    tables = [table for table in all_tables if table.weight.requires_grad]
    values = {id(table.weight) for table in all_tables}
    dense = [p for p in model.parameters() if p.requires_grad and id(p) not in values]
    return ParameterGroups(
        decay=[p for p in dense if p.ndim >= 2],
        no_decay=[p for p in dense if p.ndim < 2],
        tables=tables,
    )


def optimizers(
    model: nn.Module,
    config: OptimConfig,
    *,
    max_norm_values: float | None = None,
    seed: int = 0,
    make_rows: Callable[..., RowOptimizer] | None = None,
) -> tuple[torch.optim.AdamW, RowOptimizer | None]:
    """Make the two optimizers of a model with memory layers.

    Args:
        model: any module; frozen parameters are left out.
        config: rates, decay, algorithms.
        max_norm_values: clip the value tables' gradient norm to this; None leaves it.
        seed: of stochastic rounding.
        make_rows: makes the row optimizer; None makes a `RowOptimizer`.

    Returns:
        AdamW for the dense part, and the row optimizer for the value tables, None if the model
        has no trainable table.
    """
    groups = parameter_groups(model)
    dense = torch.optim.AdamW(
        [
            {"params": groups.decay, "weight_decay": config.weight_decay},
            {"params": groups.no_decay, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    if not groups.tables:
        return dense, None
    rows = (make_rows or RowOptimizer)(
        groups.tables,
        lr=config.value_lr,
        algorithm=config.value_algorithm,
        betas=config.value_betas,
        eps=config.value_eps,
        max_norm=max_norm_values,
        rounding=config.value_rounding,
        seed=seed,
    )
    return dense, rows


class RowOptimizer(torch.optim.Optimizer):
    """Updates value tables once a step from all uses that backward queued.

    While it exists its tables queue (rows, weights, grad_out) in backward and their `.grad` stays
    None; a table that was not read since the last step is left alone. State is allocated at once,
    so that memory does not grow during training. On a CPU tables are moved to huge pages, which
    takes seconds a GiB for a table that was loaded from a file.

    Args:
        tables: the tables to train.
        lr: learning rate; a torch scheduler may change `param_groups[...]["lr"]`.
        algorithm: "adagrad" (row-wise), "adam" (lazy) or "sgd".
        betas: Adam's decay rates.
        eps: added to the root.
        max_norm: clip the gradient norm over all tables together to this; None leaves it.
        rounding: how bf16 tables round.
        seed: of stochastic rounding.

    Raises:
        ModelError: a table is read-only (int8, fp8 or mapped).

    Attributes:
        grad_norm: norm over all tables at the last step, before clipping.
        rows_updated: rows changed at the last step, over all tables.

    Source: "Memory Layers at Scale" (arXiv 2412.09764), section 3; the update is `row_update`.
    """

    def __init__(
        self,
        tables: Sequence[ValueTable],
        *,
        lr: float,
        algorithm: Literal["adagrad", "adam", "sgd"] = "adagrad",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        max_norm: float | None = None,
        rounding: Rounding = "stochastic",
        seed: int = 0,
    ) -> None:
        if not tables:
            raise ValueError("no value tables given: a RowOptimizer needs at least one")
        self.tables = _trainable(tables)
        self.max_norm = max_norm
        self.grad_norm = 0.0
        self.rows_updated = 0
        self._seed, self._steps = seed, 0
        super().__init__(
            [table.weight for table in self.tables],
            {"lr": lr, "algorithm": algorithm, "betas": betas, "eps": eps, "rounding": rounding},
        )
        for table in self.tables:
            self.state[table.weight] = new_state(table.weight, algorithm=algorithm)
            use_huge_pages(table.weight.detach(), collapse=True)
            for tensor in self.state[table.weight].values():
                use_huge_pages(tensor)
            table.queue, table.queued = UseQueue(), True
        taken = [(table, table.queue) for table in self.tables]
        self._release = weakref.finalize(self, _give_back, taken)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every row that was read since the last step, then forget the uses."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = [(table, table.queue.take()) for table in self.tables]
        gradients = [(table, collect_uses(uses)) for table, uses in taken if uses]
        self.rows_updated = sum(len(g.rows_u) for _, g in gradients)
        scale = 1.0
        if self.max_norm is not None:
            self.grad_norm = _norm(gradients)
            scale = min(1.0, self.max_norm / max(self.grad_norm, 1e-30))
        group = self.param_groups[0]
        self._steps += 1
        for number, (table, gradient) in enumerate(gradients):
            row_update(
                table.weight,
                self.state[table.weight],
                gradient,
                algorithm=group["algorithm"],
                lr=group["lr"],
                scale=scale,
                betas=group["betas"],
                eps=group["eps"],
                rounding=group["rounding"],
                generator=self._generator(table, number),
            )
        if self.max_norm is None:
            self.grad_norm = _norm(gradients)  # on a CPU the update has found it
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget queued uses."""
        for table in self.tables:
            table.queue.clear()
        super().zero_grad(set_to_none)

    def release(self) -> None:
        """Give the tables back, as dropping the optimizer does: `.grad` is sparse again."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only: torch's own layout and the number of steps taken."""
        return {**super().state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        torch's own way would round the state to the tables' dtype and share it with its source;
        here it is copied into the state that is there.

        Raises:
            ValueError: the state is of other tables, or of another algorithm.
        """
        loaded = state_dict["state"]
        own = [self.state[table.weight] for table in self.tables]
        for number, entries in enumerate(own):
            wanted = {name: tuple(tensor.shape) for name, tensor in entries.items()}
            given = {n: tuple(tensor.shape) for n, tensor in loaded.get(number, {}).items()}
            if given != wanted:
                raise ValueError(
                    f"the optimizer state of table {number} holds {given}, its {wanted} are "
                    "needed: it was saved for another table or algorithm"
                )
        state = self.state
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state = state
        for number, entries in enumerate(own):
            for name, tensor in entries.items():
                tensor.copy_(loaded[number][name])
        self._steps = int(state_dict["steps"])

    def go_on_after(self, steps: int) -> None:
        """Count on from so many steps; the state is then put into place by others."""
        self._steps = steps

    def _generator(self, table: ValueTable, number: int) -> torch.Generator | None:
        """Random numbers named by (seed, step, table), so that a resumed run draws the same."""
        if table.weight.dtype != torch.bfloat16:
            return None
        generator = torch.Generator(device=table.weight.device)
        return generator.manual_seed((self._seed * 1_000_003 + self._steps) * 1_009 + number)


def _trainable(tables: Iterable[RowTable]) -> list[ValueTable]:
    """The same tables, if all of them can be trained."""
    found = []
    for table in tables:
        if not isinstance(table, ValueTable):
            raise training_error(table.storage)
        found.append(table)
    return found


def _norm(gradients: Sequence[tuple[ValueTable, TableGradients]]) -> float:
    """Euclidean norm over the rows of all tables."""
    norms = [gradient.norm().to("cpu", torch.float64) for _, gradient in gradients]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _give_back(taken: list[tuple[ValueTable, UseQueue]]) -> None:
    """Stop the queueing of tables that no other optimizer has taken since."""
    for table, queue in taken:
        queue.clear()
        if table.queue is queue:
            table.queued = False

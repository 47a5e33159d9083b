"""`strata bench train`: tokens/s of the quickstart's models, and of strata's loop by a bare one.

Three contestants make one training step each in turn: the Memory+ model and its dense control in
strata's loop, and the Memory+ model in a bare loop of plain torch, without the train room's loop.
The bare loop takes transformers' own loss, with logits at every position, as a script would;
strata's loop computes logits at label tokens only, so that saving is part of its ratio.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from strata.bench.timing import race
from strata.data.loader import Loader, TokenDataset
from strata.models import build, count
from strata.quickstart.run import make_tokens, read_recipe
from strata.train.feed import Feed
from strata.train.loop import Training, start_or_resume, take_step
from strata.train.optim import optimizers
from strata.train.recipe import Recipe
from strata.train.run import RunFolder
from strata.train.world import World


@dataclass(frozen=True)
class TrainResult:
    """Training speed of the quickstart's recipe.

    Attributes:
        tokens_per_s: medians of `memory` and `dense` in strata's loop, `bare` for Memory+ in plain
            torch.
        flops_per_token: forward, of `memory` and `dense`.
        memory_over_dense: tokens/s of `memory` over those of `dense`.
        strata_over_bare: tokens/s of `memory` over those of `bare`.
    """

    tokens_per_s: dict[str, float]
    flops_per_token: dict[str, int]

    @property
    def memory_over_dense(self) -> float:
        return self.tokens_per_s["memory"] / self.tokens_per_s["dense"]

    @property
    def strata_over_bare(self) -> float:
        return self.tokens_per_s["memory"] / self.tokens_per_s["bare"]

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            **asdict(self),
            "memory_over_dense": self.memory_over_dense,
            "strata_over_bare": self.strata_over_bare,
        }


def bench_train(
    *,
    device: torch.device,
    rounds: int = 15,
    overrides: tuple[str, ...] = (),
    on_progress: Callable[[str], None] | None = None,
) -> TrainResult:
    """Time training steps of the quickstart's recipe, in turns.

    Args:
        device: where to train.
        rounds: steps of each contestant that count.
        overrides: `a.b=c` for the quickstart's recipe.
        on_progress: told what is done.

    Raises:
        ConfigError: an override is wrong.
    """
    say = on_progress or (lambda text: None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        out = Path(folder)
        say("preparing tokens")
        settings = (f"run.device={device}", "run.health_every=1000000", *overrides)
        memory = read_recipe(out, settings)
        make_tokens(out, memory)
        recipes = {"memory": _renamed(memory, out, "memory")}
        recipes["dense"] = _renamed(memory, out, "dense").model_copy(update={"memory": None})
        trainings: dict[str, Training] = {}
        for name, recipe in recipes.items():
            run_folder = stack.enter_context(RunFolder(recipe))
            trainings[name] = start_or_resume(
                recipe, folder=run_folder, feed=Feed(recipe), world=World(device)
            )
        bare = bare_loop(memory, device)
        say("timing steps")
        steps: dict[str, Callable[[], object]] = {
            "memory": lambda: take_step(trainings["memory"]),
            "dense": lambda: take_step(trainings["dense"]),
            "bare": lambda: next(bare),
        }
        times_ms = race(steps, rounds=rounds, device=device)
    flops = {
        name: count(training.model, sequence_tokens=memory.data.sequence_tokens).flops_per_token
        for name, training in trainings.items()
    }
    rates = {name: memory.tokens_per_step / (ms * 1e-3) for name, ms in times_ms.items()}
    return TrainResult(tokens_per_s=rates, flops_per_token=flops)


def bare_loop(recipe: Recipe, device: torch.device) -> Iterator[float]:
    """A training loop as one would write it in a script; yields each step's loss."""
    torch.manual_seed(recipe.seed)
    model = build(recipe.model, recipe.memory, device=device).train()
    dense, values = optimizers(model, recipe.optim)
    weights = [weight for group in dense.param_groups for weight in group["params"]]
    data = TokenDataset.open(recipe.data.dir, split="train")
    batches = iter(Loader(data, recipe.data.loader_config(seed=recipe.seed)))
    low_precision = recipe.run.precision == "bf16"
    while True:
        batch: dict[str, Any] = {name: t.to(device) for name, t in next(batches).items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low_precision):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.run.clip_norm or float("inf"))
        dense.step()
        dense.zero_grad()
        if values is not None:
            values.step()
        yield float(loss.detach())


def _renamed(recipe: Recipe, out: Path, name: str) -> Recipe:
    run = recipe.run.model_copy(update={"dir": out / name})
    return recipe.model_copy(update={"name": name, "run": run})

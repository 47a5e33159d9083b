"""Checkpoints in another form, without starting processes: a model's folder, or the other kind.

Training needs none of it: a run goes on from either kind, see `sharded_checkpoint.restore`. It is
for what reads one or neither: `from_pretrained`, programs that know safetensors or torch's DCP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from strata.errors import CheckpointError, ConfigError, DataError
from strata.models import build
from strata.train import sharded_checkpoint
from strata.train.checkpoint import Checkpoint, CheckpointFolder
from strata.train.feed import open_tokenizer
from strata.train.recipe import RECIPE_NAME, Recipe
from strata.train.run import RunFolder, stored_recipe, write_model
from strata.train.state import MODEL, RNG, restore_weights
from strata.train.world import World

Form = Literal["model", "single", "sharded"]
FORMS: tuple[Form, ...] = ("model", "single", "sharded")


@dataclass(frozen=True)
class Converted:
    """What was made.

    Attributes:
        step: updates made when the checkpoint was written.
        num_bytes: of all files in the new folder.
        recipe: what `strata train` goes on with; None of a model.
    """

    step: int
    num_bytes: int
    recipe: Path | None


def convert(
    source: Path,
    out: Path,
    *,
    to: Form,
    tokenizer: Path | None = None,
    on_group: Callable[[str], None] = lambda name: None,
) -> Converted:
    """Write a checkpoint of `strata train` in another form, with the same numbers, bit for bit.

    Args:
        source: the folder of a step, or a run folder, of which the newest is taken.
        out: folder to make.
        to: "model", the weights and tokenizer as save_pretrained writes them; or a run folder with
            one checkpoint, as one process writes it ("single") or many do ("sharded"): weights,
            both optimizers, step, place in the data, and the random numbers of a single process.
        tokenizer: a folder of it, for a model; None takes the data's own.
        on_group: told the name of each part before it is read.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of that kind already.
        ConfigError: `out` holds something, or `to` is none of these.
        DataError: the tokenizer cannot be opened.
        StorageError: `out` cannot be written.
    """
    if to not in FORMS:
        raise ConfigError(f"no form {to!r}: give one of {', '.join(FORMS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: name a new folder")
    if tokenizer is not None and to != "model":
        raise ConfigError("a tokenizer goes with a model only: leave it out")
    checkpoint = open_newest(source)
    recipe = stored_recipe(checkpoint)
    step = int(checkpoint.state["progress"]["step"])
    if to == "model":
        _to_model(checkpoint, recipe, out, tokenizer)
    else:
        if checkpoint.is_sharded == (to == "sharded"):
            raise CheckpointError(
                f"{checkpoint.path} is {to} already: strata train goes on from it"
            )
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": out})})
        groups = _Groups(checkpoint, recipe, on_group)
        with RunFolder(recipe) as folder:
            if to == "single":
                folder.checkpoints.save(step, groups=groups, state=checkpoint.state)
            else:
                world = World(torch.device("cpu"))
                sharded_checkpoint.save(folder.checkpoints, step, groups, checkpoint.state, world)
            folder.write_recipe()
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Converted(step, num_bytes, None if to == "model" else out / RECIPE_NAME)


def open_newest(source: Path) -> Checkpoint:
    """A step's checkpoint, or the newest one of a run folder, checked from end to end.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (source / "checkpoints").is_dir():
        folder = CheckpointFolder(source / "checkpoints")
        steps = folder.steps()
    else:
        folder = CheckpointFolder(source.parent)
        steps = [step for step in folder.steps() if folder.path(step).name == source.name]
    if not steps:
        raise CheckpointError(
            f"no checkpoint of strata train at {source}: give a run folder, or a folder "
            "checkpoints/step_... in it"
        )
    return folder.open(steps[-1])


class _Groups(Mapping[str, Mapping[str, Tensor]]):
    """The tensors of a checkpoint by group, as the other kind names them; read when asked for."""

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, on_group: Callable[[str], None]
    ) -> None:
        self._source = sharded_checkpoint.open_tensors(checkpoint)
        self._sharded, self._on_group = checkpoint.is_sharded, on_group
        self._names = [MODEL, RNG, *checkpoint.state["optimizers"]]
        step = int(checkpoint.state["progress"]["step"])
        self._seed = sharded_checkpoint.seed_after(recipe.seed, step=step, rank=0)

    def __getitem__(self, group: str) -> Mapping[str, Tensor]:
        self._on_group(group)
        if group == RNG and self._sharded and self._source.num_processes > 1:
            # As a process draws that goes on with what several began.
            return {"cpu": torch.Generator().manual_seed(self._seed).get_state()}
        tensors = self._source.tensors(group)
        if group == RNG:
            rank = ".0"
            return {
                name.removesuffix(rank) if self._sharded else name + rank: tensor
                for name, tensor in tensors.items()
            }
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _to_model(checkpoint: Checkpoint, recipe: Recipe, out: Path, tokenizer: Path | None) -> None:
    opened = _open_tokenizer(recipe.data.dir, tokenizer)
    model = build(recipe.model, recipe.memory)
    if checkpoint.is_sharded:
        sharded_checkpoint.read_model(checkpoint.path, model)
    else:
        restore_weights(checkpoint, model)
    write_model(out, model, opened, consequence="the checkpoint is intact")


def _open_tokenizer(data_dir: Path, folder: Path | None) -> PreTrainedTokenizerBase:
    if folder is None:
        try:
            return open_tokenizer(data_dir)
        except DataError as error:
            raise DataError(f"{error}; or give --tokenizer FOLDER") from None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        message = " ".join(str(error).split())[:200]
        raise DataError(f"no tokenizer can be opened in {folder}: {message}") from None

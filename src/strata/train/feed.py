"""What a run reads: training batches in order, fixed validation batches, and the tokenizer."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from strata.data.loader import Loader, TokenDataset
from strata.data.manifest import read_manifest
from strata.errors import CheckpointError, ConfigError, DataError
from strata.train.continual import References
from strata.train.recipe import Recipe
from strata.train.world import World

Batch = dict[str, torch.Tensor]


class Feed:
    """The data of one run.

    Args:
        recipe: the run.
        world: the processes of it; each reads its own rows of every batch. None for one.

    Attributes:
        tokenizer: the data's own, saved beside the finished model.
        validation: the batches of every validation, the same each time; empty if never validated.
        references: what chunks read; None if nothing is read.

    Raises:
        DataError: the data folder, its references, its validation split or its tokenizer cannot be
            read.
    """

    def __init__(self, recipe: Recipe, world: World | None = None) -> None:
        self._recipe = recipe
        rank, size = (0, 1) if world is None else (world.data_rank, world.data_size)
        self.references = (
            None if recipe.reading is None else References(recipe.reading, recipe.data)
        )
        chunk_tokens = None if self.references is None else self.references.chunk_tokens
        config = recipe.data.loader_config(seed=recipe.seed, chunk_tokens=chunk_tokens)
        if world is not None:
            share = world.share_of(config.batch_size, name="data.batch_size")
            config = config.model_copy(update={"batch_size": share})
        self.tokenizer = open_tokenizer(recipe.data.dir)
        self._loader = Loader(
            TokenDataset.open(recipe.data.dir, split="train"), config, rank=rank, world_size=size
        )
        self._batches = iter(self._loader)
        self._data_sha256 = _train_sha256(recipe.data.dir)
        self.validation: list[Batch] = []
        if recipe.run.validate_every is not None:
            dataset = TokenDataset.open(recipe.data.dir, split="val")
            validation = Loader(dataset, config, rank=rank, world_size=size)
            batches = islice(iter(validation), recipe.run.validate_batches)
            self.validation = [self._with_references(batch, "val") for batch in batches]

    def next_batch(self) -> Batch:
        """The next micro-batch of the training split."""
        return self._with_references(next(self._batches), "train")

    def _with_references(self, batch: Batch, split: str) -> Batch:
        return batch if self.references is None else self.references.add_to(batch, split)

    def check_model(self, model: PreTrainedModel) -> None:
        """Check that the model can read this data.

        Raises:
            ConfigError: too small a vocabulary, or too short a context.
        """
        text = model.config.get_text_config()
        if len(self.tokenizer) > text.vocab_size:
            raise ConfigError(
                f"the tokenizer of {self._recipe.data.dir} has {len(self.tokenizer)} tokens but "
                f"the model's vocab_size is {text.vocab_size}: raise model.host.vocab_size"
            )
        positions = getattr(text, "max_position_embeddings", None)
        if positions is not None and self._recipe.data.sequence_tokens > positions:
            raise ConfigError(
                f"data.sequence_tokens is {self._recipe.data.sequence_tokens} but the model has "
                f"{positions} positions: lower it"
            )

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, JSON-able."""
        state = {"data_sha256": self._data_sha256, "loader": self._loader.state_dict()}
        if self.references is not None:
            state["references_sha256"] = self.references.sha256
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place in the same data.

        Raises:
            CheckpointError: the data folder holds other data than the checkpoint was made with.
        """
        if state["data_sha256"] != self._data_sha256:
            raise CheckpointError(
                f"{self._recipe.data.dir} holds other data than the run in {self._recipe.run_dir} "
                "was started with: give back its data.dir, or start over with --fresh"
            )
        if self.references is not None and state["references_sha256"] != self.references.sha256:
            raise CheckpointError(
                f"{self.references.folder} holds other references than the run in "
                f"{self._recipe.run_dir} was started with: give them back as reading.references, "
                "or start over with --fresh"
            )
        self._loader.load_state_dict(state["loader"])
        self._batches = iter(self._loader)


def _train_sha256(data_dir: Path) -> str:
    """Identity of the training split: its manifest entry holds the sha256 of every shard."""
    entry = read_manifest(data_dir).splits["train"]
    return hashlib.sha256(entry.model_dump_json().encode()).hexdigest()


def open_tokenizer(data_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of prepared data.

    Raises:
        DataError: there is none, or it is damaged.
    """
    folder = data_dir / "tokenizer"
    if not folder.is_dir():
        raise DataError(
            f"no prepared data at {data_dir} ({folder} is missing): run strata data prepare, "
            "or set data.dir"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        message = " ".join(str(error).split())[:200]
        raise DataError(f"the tokenizer in {folder} cannot be opened: {message}") from None

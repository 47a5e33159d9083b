"""Layers split by heads and features change nothing: the losses of one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from test_same_curve import assert_same_curve, launch

from strata.errors import ConfigError
from strata.layers.collectives import Group
from strata.models import build
from strata.train import Recipe, train
from strata.train.checkpoint import CheckpointFolder
from strata.train.shares import shares_of
from strata.train.tensor_parallel import partly_used, split_layers, split_weights
from strata.train.world import DistributedConfig, memory_group_size

MakeRecipe = Callable[..., Recipe]
TWO = "distributed.tensor_group=2"
# Norms of queries and keys within heads; biases of what is split by outputs.
QWEN3 = ["model.host.model_type=qwen3", "model.host.head_dim=8"]
QWEN2 = ["model.host.model_type=qwen2"]
STEPS = ["run.steps=20", "run.validate_every=10", "run.validate_batches=2"]

TWICE = ["run.accumulate=2", "model.gradient_checkpointing=true", "run.clip_norm=null"]
BESIDE = ["memory.placement=beside", "memory.scalar_gate=sigmoid"]

# A batch of one row, which two processes could not share in any other way.
SOME: dict[str, list[str]] = {
    "one_row": ["data.batch_size=1", *QWEN3],
    "beside_twice": ["data.batch_size=1", *QWEN2, *BESIDE, *TWICE],
}
ALL: dict[str, list[str]] = {
    "memory": [],
    "two_rows": ["data.batch_size=2"],
    "qwen3": QWEN3,
    "qwen2_dense": [*QWEN2, "memory=null"],
    "beside": BESIDE,
    "peer_twice": ["memory.kind=peer", "memory.gate=none", *TWICE],
    "biases": ["model.host.attention_bias=true", "model.host.mlp_bias=true"],
    "replicated": ["distributed.dense=replicated"],
    "replicated_qwen3": [*QWEN3, "distributed.dense=replicated"],
    "groups_of_two": ["distributed.memory_group=2"],
    "frozen_base": ["memory.freeze_base=true"],
    "narrow": ["memory.value_dim=16"],
    "adam": ["optim.value_algorithm=adam"],
    "four": ["distributed.tensor_group=4", "model.host.num_key_value_heads=4"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_split_layers_learn_what_whole_ones_do(
    tiny_recipe: MakeRecipe, tiny_recipe_file: Path, tmp_path: Path, processes: int
) -> None:
    jobs = []
    variants = SOME if processes == 2 else ALL
    for name, overrides in variants.items():
        options = [*STEPS, TWO, *overrides]
        jobs.append([str(tmp_path / "many" / name), options, None])
        train(tiny_recipe(*options, f"run.dir={tmp_path / 'one' / name}"), progress=False)
    assert launch(tiny_recipe_file, jobs, processes=processes) == 0
    for name in variants:
        many, one = (tmp_path / kind / name for kind in ("many", "one"))
        assert_same_curve(many, one)
        ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (many, one))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert (tensor - theirs[key]).norm() <= 0.02 * theirs[key].norm(), (name, key)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_goes_on_with_layers_split_or_whole(
    tiny_recipe: MakeRecipe, tiny_recipe_file: Path, tmp_path: Path, processes: int
) -> None:
    whole, keep = tmp_path / "whole", "run.keep_checkpoints=null"
    train(tiny_recipe(keep, f"run.dir={whole}"), progress=False)
    jobs: list[Any] = [[str(tmp_path / "split"), [keep, TWO], None]]
    assert launch(tiny_recipe_file, jobs, processes=processes) == 0
    shutil.copytree(tmp_path / "split", tmp_path / "split_then_one")
    shutil.copytree(whole, tmp_path / "one")
    for name in ("split", "split_then_one", "one"):
        for step in (8, 12):
            shutil.rmtree(CheckpointFolder(tmp_path / name / "checkpoints").path(step))
        shutil.rmtree(tmp_path / name / "model")
    train(tiny_recipe(f"run.dir={tmp_path / 'split_then_one'}"), progress=False)
    jobs = [[str(tmp_path / name), [keep, TWO], None] for name in ("split", "one")]
    assert launch(tiny_recipe_file, jobs, processes=processes) == 0
    for name in ("split", "split_then_one", "one"):
        assert_same_curve(tmp_path / name, whole)


def group_of(size: int, rank: int = 0) -> Group:
    """What says who shares; nothing is sent."""
    return cast(Group, SimpleNamespace(size=lambda: size, rank=lambda: rank))


@pytest.mark.parametrize("overrides", [QWEN3, QWEN2, ["memory.placement=beside"]])
def test_parts_make_up_the_whole(tiny_recipe: MakeRecipe, overrides: list[str]) -> None:
    recipe = tiny_recipe(*overrides)

    def make() -> Any:
        torch.manual_seed(0)
        return build(recipe.model, recipe.memory)

    whole, parts = make(), [make(), make()]
    for rank, part in enumerate(parts):
        split_layers(part, group_of(2, rank), sequence_tokens=32)
    ours, theirs = (dict(model.named_parameters()) for model in parts)
    dims = split_weights(parts[0])
    names = {name for name, weight in ours.items() if id(weight) in dims}
    projections = [name for name in whole.state_dict() if "_proj.weight" in name]
    assert names >= {n for n in projections if "value_proj" not in n}
    for name, weight in whole.named_parameters():
        if name in names:
            joined = torch.cat([ours[name], theirs[name]], dim=dims[id(ours[name])])
            assert joined.equal(weight), name
        else:
            assert ours[name].equal(weight), name
    assert {id(w) for w in partly_used(parts[0])}.isdisjoint(dims)


def test_what_cannot_be_split_is_said_in_one_line(tiny_recipe: MakeRecipe) -> None:
    for overrides, size, tokens, said in (
        ([], 3, 30, "does not divide model.host.num_attention_heads 4"),
        ([], 4, 32, "does not divide model.host.num_key_value_heads 2"),
        (["model.host.intermediate_size=47"], 2, 32, "the 47 features of gate_proj"),
        ([], 2, 31, "does not divide data.sequence_tokens 31"),
    ):
        recipe = tiny_recipe(*overrides)
        model = build(recipe.model, recipe.memory)
        with pytest.raises(ConfigError, match=said) as caught:
            split_layers(model, group_of(size), sequence_tokens=tokens)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="tensor_group 2 does not divide the 3 processes"):
        memory_group_size(DistributedConfig(tensor_group=2), world_size=3)
    with pytest.raises(ConfigError, match="tensor_group 4 does not divide the 2 processes"):
        memory_group_size(DistributedConfig(tensor_group=4, memory_group=2), world_size=4)
    with pytest.raises(ConfigError, match="dry run does not count tensor parallelism"):
        shares_of(tiny_recipe(TWO), processes=2)

"""Recipes: what is refused, what is written back, and the published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from strata.config import dump_yaml, load_config
from strata.errors import ConfigError
from strata.train import Recipe
from strata.train.recipe import MAY_DIFFER_ON_RESUME, require_same_run

MakeRecipe = Callable[..., Recipe]
TUNING = ("sft_", "dpo_")  # recipes of their own, see test_tune_runs.py
RECIPES = sorted(
    path
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml")
    if not path.name.startswith(TUNING)
)


def test_resolved_recipe_reads_back_equal(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe("schedule.decay_fraction=0.5", "run.wandb=project")
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(recipe))
    assert load_config(Recipe, path) == recipe


def test_run_dir_follows_the_name(tiny_recipe: MakeRecipe) -> None:
    assert tiny_recipe("run.dir=null", "name=mine").run_dir == Path("runs/mine")


def test_tokens_per_step(tiny_recipe: MakeRecipe) -> None:
    assert tiny_recipe("run.accumulate=3").tokens_per_step == 3 * 4 * 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rl=1", "unknown key optim.rl; allowed here: lr, "),
        ("run.step=1", "unknown key run.step; allowed here: dir, steps, "),
        ("nmae=x", "unknown key nmae"),
        ("name=a/b", "name"),
        ("run.steps=0", "run.steps"),
        ("run.device=gpu", "run.device"),
        ("run.precision=fp16", "run.precision"),
        ("run.clip_norm=0", "run.clip_norm"),
        ("data.packing=tight", "data.packing"),
        ("schedule.warmup_steps=13", "schedule.warmup_steps is 13 but run.steps is 12"),
        ("schedule.decay_steps=11", "warmup of 3 and decay of 11 updates exceed run.steps = 12"),
        ("data.sequence_tokens=65", "max_position_embeddings is 64"),
        ("memory.layers=[]", "layers is empty"),
    ],
)
def test_refuses(tiny_recipe: MakeRecipe, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_recipe(override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_flash_attention_would_let_documents_see_one_another(tiny_recipe: MakeRecipe) -> None:
    flash = ("data.document_mask=true", "model.attn_implementation=flash_attention_2")
    with pytest.raises(ConfigError, match=r"isolates documents at data\.batch_size 1 only"):
        tiny_recipe(*flash)
    tiny_recipe(*flash, "data.batch_size=1")


def test_every_key_that_may_differ_exists(tiny_recipe: MakeRecipe) -> None:
    tree = tiny_recipe("reading.references=somewhere").model_dump()
    for key in MAY_DIFFER_ON_RESUME:
        node = tree
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_dense_and_memory_are_different_runs(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match="memory was None, is given"):
        require_same_run(tiny_recipe("memory=null"), tiny_recipe())


# Totals to 0.3% of the published sizes; the dense ones are the same decoders without memory.
PUBLISHED_PARAMS = {
    "dense_373m": 0.373e9,
    "pkplus_373m_1024k": 1.440e9,
    "dense_1p3b": 1.262e9,
    "pkplus_1p3b_1m": 3.377e9,
    "pkplus_1p3b_4m": 9.823e9,
    "pkplus_1p3b_16m": 35.618e9,
    "pkplus_1p3b_64m": 138.748e9,
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_published_recipes_have_their_published_sizes(path: Path) -> None:
    from strata.models import build, count

    recipe = load_config(Recipe, path)
    assert recipe.name == path.stem
    counts = count(build(recipe.model, recipe.memory, device="meta"), sequence_tokens=4096)
    if path.stem in PUBLISHED_PARAMS:
        assert counts.params_total == pytest.approx(PUBLISHED_PARAMS[path.stem], rel=3e-3)


def test_all_published_recipes_are_there() -> None:
    assert PUBLISHED_PARAMS.keys() <= {path.stem for path in RECIPES}

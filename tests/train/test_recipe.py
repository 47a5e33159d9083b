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


# Parameters in billions: published, or the sum of what is; docs/recipes.md says which.
PUBLISHED_PARAMS = {
    "dense_134m": 0.134,
    "moe_134m": 0.134 + 15 * 12 * 3 * 768 * 2048e-9,
    "peer_134m": 0.134 + 2 * 768**2 * 768e-9,
    "memory_134m_1m": 0.134 + 2**20 * 768e-9,
    "pkplus_134m_1m": 0.134 + 2**20 * 768e-9,
    "dense_373m": 0.373,
    "moe_373m": 0.373 + 7 * 24 * 3 * 1024 * 2816e-9,
    "peer_373m": 0.373 + 2 * 768**2 * 1024e-9,
    "memory_373m_1m": 0.373 + 2**20 * 1024e-9,
    "pkplus_373m_1024k": 0.367 + 1.07,
    "dense_720m": 0.720,
    "moe_720m": 0.720 + 5 * 22 * 3 * 1536 * 4096e-9,
    "peer_720m": 0.720 + 2 * 768**2 * 1536e-9,
    "memory_720m_1m": 0.720 + 2**20 * 1536e-9,
    "pkplus_720m_1m": 0.720 + 2**20 * 1536e-9,
    "dense_1p3b": 1.262,
    "moe_1p3b": 3.545,
    "peer_1p3b": 3.646,
    "memory_1p3b_1m": 3.377,
    "pkplus_1p3b_1m": 3.377,
    "pkplus_1p3b_4m": 9.823,
    "pkplus_1p3b_16m": 35.618,
    "pkplus_1p3b_64m": 138.748,
    "dense_8b": 8.03,
    "pkplus_8b_16m": 8.03 + 2**24 * 4096e-9,
}
OWN = {"pkplus_laptop"}  # sizes of nobody else
TABLE = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_published_recipes_have_their_published_sizes(path: Path) -> None:
    from strata.models import build, count

    recipe = load_config(Recipe, path)
    assert recipe.name == path.stem
    counts = count(build(recipe.model, recipe.memory, device="meta"), sequence_tokens=4096)
    if path.stem in OWN:
        return
    billions = counts.params_total / 1e9
    published = PUBLISHED_PARAMS[path.stem]
    assert billions == pytest.approx(published, rel=0.015)
    (row,) = (
        line for line in TABLE.read_text().splitlines() if line.startswith(f"| `{path.stem}` |")
    )
    _, wanted, ours, deviation, *_ = (cell.strip() for cell in row.strip("|").split("|"))
    assert float(wanted.removesuffix("B")) == pytest.approx(published, abs=6e-4)
    assert float(ours.removesuffix("B")) == pytest.approx(billions, abs=6e-4)
    assert float(deviation.removesuffix("%")) == pytest.approx(
        100 * (billions / published - 1), abs=0.06
    )


def test_all_published_recipes_are_there() -> None:
    assert PUBLISHED_PARAMS.keys() | OWN == {path.stem for path in RECIPES}


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((RECIPES[0].parent / "pkplus_laptop.yaml").read_text())
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nrun: {steps: 500}\n")
    top = tmp_path / "top.yaml"
    top.write_text(f"extends: {tmp_path / 'middle.yaml'}\nname: top\nmemory: null\n")
    base, found = load_config(Recipe, tmp_path / "base.yaml"), load_config(Recipe, top)
    assert found.name == "top" and found.memory is None and found.run.steps == 500
    assert found.run == base.run.model_copy(update={"steps": 500}) and found.optim == base.optim
    middle = load_config(Recipe, tmp_path / "middle.yaml", ["memory.top_k=8"])
    assert base.memory is not None
    assert middle.memory == base.memory.model_copy(update={"top_k": 8})
    (tmp_path / "resolved.yaml").write_text(dump_yaml(found))
    assert load_config(Recipe, tmp_path / "resolved.yaml") == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: gone.yaml\n", "no recipe at"),
        ("extends: [a.yaml]\n", "extends holds ['a.yaml'], not the path of a YAML file"),
        ("extends: other.yaml\n", "extends one.yaml, which extends this one in turn"),
        ("extends: one.yaml\n", "extends one.yaml, which extends this one in turn"),
        ("extends: .\n", "is a folder"),
    ],
)
def test_refuses_to_extend(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "one.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("extends: one.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, tmp_path / "one.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)

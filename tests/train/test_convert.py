"""Checkpoints in another form hold the same numbers, and training goes on from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from strata.config import load_config
from strata.train import Recipe, train
from strata.train.checkpoint import CheckpointFolder

MakeRecipe = Callable[..., Recipe]
Run = Callable[..., tuple[int, str, str]]
DROPOUT = ("model.host.attention_dropout=0.1", "memory.value_dropout=0.1")


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def contents(folder: Path) -> dict[str, object]:
    """The sha256 of every file of tensors, and the state."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    hashes = {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}
    return {**hashes, "state": json.loads((folder / "state.json").read_text())}


@pytest.fixture
def trained(tiny_recipe: MakeRecipe) -> Path:
    """A run folder with the checkpoints of steps 4, 8 and 12 and the finished model."""
    recipe = tiny_recipe("run.keep_checkpoints=null", *DROPOUT)
    train(recipe, progress=False)
    return recipe.run_dir


@pytest.mark.parametrize("algorithm", ["adagrad", "sgd"])
def test_there_and_back(tiny_recipe: MakeRecipe, tmp_path: Path, run: Run, algorithm: str) -> None:
    recipe = tiny_recipe(f"optim.value_algorithm={algorithm}", "run.steps=4")
    train(recipe, progress=False)
    first, there, back = recipe.run_dir, tmp_path / "there", tmp_path / "back"
    code, out, _ = run("checkpoint", "convert", first, "--to", "sharded", "--out", there)
    assert code == 0 and "step 4" in out and f"strata train {there / 'recipe.yaml'}" in out
    assert (checkpoint(there, 4) / ".metadata").is_file()
    assert not list(checkpoint(there, 4).glob("*.safetensors"))
    code, out, error = run(
        "checkpoint", "convert", checkpoint(there, 4), "--to", "single", "--out", back, "--json"
    )
    assert (code, error) == (0, "")
    size = sum(path.stat().st_size for path in back.rglob("*") if path.is_file())
    assert json.loads(out) == {"out": str(back), "step": 4, "bytes": size}
    assert contents(checkpoint(back, 4)) == contents(checkpoint(first, 4))


def test_training_goes_on_from_what_was_made(trained: Path, tmp_path: Path, run: Run) -> None:
    """With the bits of the run that was not interrupted, random numbers included."""
    there, back = tmp_path / "there", tmp_path / "back"
    run("checkpoint", "convert", checkpoint(trained, 8), "--to", "sharded", "--out", there)
    run("checkpoint", "convert", there, "--to", "single", "--out", back)
    whole = contents(checkpoint(trained, 12))
    for folder in (there, back):
        assert CheckpointFolder(folder / "checkpoints").steps() == [8]
        train(load_config(Recipe, folder / "recipe.yaml", ()), progress=False)
        got = contents(checkpoint(folder, 12))
        assert {n: h for n, h in got.items() if n != "state"} == {
            n: h for n, h in whole.items() if n != "state"
        }


def test_a_model_has_the_weights_of_its_step(trained: Path, tmp_path: Path, run: Run) -> None:
    sharded = tmp_path / "sharded"
    run("checkpoint", "convert", trained, "--to", "sharded", "--out", sharded)
    for number, source in enumerate((trained, sharded)):
        out = tmp_path / "models" / str(number)
        assert run("checkpoint", "convert", source, "--out", out)[0] == 0
        finished = trained / "model"
        assert {p.name for p in out.iterdir()} == {p.name for p in finished.iterdir()}
        ours, theirs = (load_file(f / "model.safetensors") for f in (out, finished))
        assert ours.keys() == theirs.keys()
        assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    early = tmp_path / "early"
    run("checkpoint", "convert", checkpoint(trained, 4), "--out", early)
    saved = load_file(checkpoint(trained, 4) / "model.safetensors")
    opened = AutoModelForCausalLM.from_pretrained(early).state_dict()
    assert all(opened[name].equal(tensor) for name, tensor in saved.items())
    assert not torch.equal(opened["lm_head.weight"], theirs["lm_head.weight"])
    assert len(AutoTokenizer.from_pretrained(early)) == 320


def test_a_tokenizer_of_ones_own(trained: Path, tiny_model: Path, tmp_path: Path, run: Run) -> None:
    """Where the data are gone."""
    folder = checkpoint(trained, 12)
    state = json.loads((folder / "state.json").read_text())
    state["recipe"]["data"]["dir"] = str(tmp_path / "gone")
    manifest = json.loads((folder / "manifest.json").read_text())
    moved = CheckpointFolder(tmp_path / "moved" / "checkpoints")
    names = [name.removesuffix(".safetensors") for name in manifest["files"]]
    groups = {n: load_file(folder / f"{n}.safetensors") for n in names if n != "state.json"}
    moved.save(12, groups=groups, state=state)
    command = ("checkpoint", "convert", moved.path(12), "--out", tmp_path / "out")
    code, _, error = run(*command)
    assert code == 2 and "give --tokenizer FOLDER" in error and error.count("\n") == 1
    assert run(*command, "--tokenizer", tiny_model)[0] == 0
    code, _, error = run(*command[:-1], tmp_path / "other", "--tokenizer", tmp_path)
    assert code == 2 and "no tokenizer can be opened" in error and error.count("\n") == 1


def test_what_cannot_be_converted_is_said_in_one_line(
    trained: Path, tmp_path: Path, run: Run
) -> None:
    full, damaged = tmp_path / "full", tmp_path / "damaged"
    full.mkdir()
    (full / "note").write_text("mine")
    shutil.copytree(trained, damaged)
    (checkpoint(damaged, 12) / "model.safetensors").write_bytes(b"cut")
    out = tmp_path / "out"
    for arguments, said in (
        ((tmp_path / "nothing", "--out", out), "no checkpoint of strata train"),
        ((full, "--out", out), "no checkpoint of strata train"),
        ((trained, "--out", full), "is there already: name a new folder"),
        ((trained, "--out", full / "note"), "is there already: name a new folder"),
        ((trained, "--out", out, "--to", "single"), "is single already"),
        ((trained, "--out", out, "--to", "onnx"), "give one of model, single, sharded"),
        ((trained, "--out", out, "--to", "sharded", "--tokenizer", full), "with a model only"),
        ((damaged, "--out", out), "3 bytes, written as"),
    ):
        code, _, error = run("checkpoint", "convert", *arguments)
        assert code == 2 and said in error and error.count("\n") == 1, error
    assert not out.exists()

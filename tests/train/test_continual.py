"""Continual training: references are encoded within the step and read beside the text."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from strata.data.dataset import TokenDataset
from strata.data.find_references import find_references
from strata.data.loader import Loader
from strata.data.references import ChunkReferences, ReferencesConfig
from strata.errors import CheckpointError, ConfigError, DataError, StrataError
from strata.train import Recipe, StepEvent, read_metrics, train
from strata.train import loop as loop_module
from strata.train.continual import References
from strata.train.feed import Feed
from strata.train.run import RunFolder
from strata.train.world import World

MakeRecipe = Callable[..., Recipe]
SHELF = [f"House {number} was built by {name}." for number in range(9) for name in ("Ada", "Farah")]


@dataclass(frozen=True)
class Hit:
    id: str
    text: str
    source: str = "shelf"


def find(queries: Sequence[str], top_k: int) -> list[list[Hit]]:
    """One reference, drawn by the letters of the text; none for a third of all texts."""
    draws = [sum(map(ord, query)) for query in queries]
    return [[Hit(str(n % 18), SHELF[n % 18])] if n % 3 else [] for n in draws]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """For every chunk of eight tokens of the tiny data."""
    folder = tmp_path_factory.mktemp("references") / "found"
    config = ReferencesConfig(chunk_tokens=8, part_chunks=100)
    find_references(tiny_data, out=folder, find=find, searched={"bank": "shelf"}, config=config)
    return folder


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe, references: Path) -> MakeRecipe:
    """The tiny recipe, of a model with memory layers, reading; twelve steps."""

    def make(*overrides: str) -> Recipe:
        return tiny_recipe(
            f"reading.references={references}",
            "reading.memory.reference_tokens=32",
            "reading.memory.tokens_per_head=3",
            "reading.reach=3",
            *overrides,
        )

    return make


def final_bits(run_dir: Path) -> dict[str, object]:
    """Everything of the last checkpoint but the clock."""
    folder = run_dir / "checkpoints" / "step_00000012"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    state = json.loads((folder / "state.json").read_text())
    for clock in ("wall_s", "tokens_per_s"):
        del state["progress"][clock]
    del state["recipe"]  # run.dir differs
    return {name: e["sha256"] for name, e in files.items() if name != "state.json"} | state


@pytest.mark.parametrize(
    "overrides",
    [
        ("run.accumulate=2",),
        ("data.packing=document", "data.document_mask=true", "memory=null"),
        ("run.precision=bf16", "model.gradient_checkpointing=true"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_killed_and_resumed_equals_uninterrupted(
    recipe: MakeRecipe, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    whole = recipe(*overrides, f"run.dir={tmp_path / 'whole'}")
    train(whole, progress=False)
    broken = recipe(*overrides, f"run.dir={tmp_path / 'broken'}")

    def kill(event: StepEvent) -> None:
        if event.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            train(broken, progress=False, on_step=kill)
        finally:
            os._exit(7)  # not reached: it is killed before
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    torch.manual_seed(12345)  # a new process knows nothing of the old one's random state
    train(broken, progress=False)
    assert final_bits(whole.run_dir) == final_bits(broken.run_dir)


def test_what_is_read_moves_the_weights(recipe: MakeRecipe, tmp_path: Path) -> None:
    reads = recipe(f"run.dir={tmp_path / 'reads'}", "run.steps=4", "run.validate_every=2")
    plain = recipe(f"run.dir={tmp_path / 'plain'}", "run.steps=4", "reading=null")
    results = [train(reads, progress=False), train(plain, progress=False)]
    assert results[0].validation_loss is not None
    losses = [[record["loss"] for record in read_metrics(r.run_dir)] for r in (reads, plain)]
    assert losses[0][0] != losses[1][0] and losses[0][-1] != losses[1][-1]


def start(recipe: Recipe) -> tuple[loop_module.Training, Feed]:
    feed = Feed(recipe)
    with RunFolder(recipe) as folder:
        training = loop_module.start_or_resume(
            recipe, folder=folder, feed=feed, world=World(torch.device("cpu"))
        )
    training.model.train()
    return training, feed


def test_accumulating_is_one_larger_batch(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Both see the same rows; references are encoded once a micro-batch."""
    found = []
    for options in (("data.batch_size=4",), ("data.batch_size=2", "run.accumulate=2")):
        made = recipe(*options, "memory=null", f"run.dir={tmp_path / options[0]}")
        training, feed = start(made)
        batches = [feed.next_batch() for _ in range(made.run.accumulate)]
        loss = loop_module.backward(training, batches)
        found.append((loss, {n: p.grad for n, p in training.model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_reach_how_memories_are_written_unless_detached(
    recipe: MakeRecipe, tmp_path: Path, detach: bool
) -> None:
    """Tokens that stand in references or the marker alone get their gradient through these."""
    options = ("memory=null", f"reading.detach={str(detach).lower()}")
    training, feed = start(recipe(*options, f"run.dir={tmp_path / 'run'}"))
    batch = feed.next_batch()
    assert feed.references is not None
    numbers = {n for n in batch["own_references"].flatten().tolist() if n >= 0}
    told = [feed.references.text(n) for n in sorted(numbers)] + ["Reference:"]
    read = {n for text in told for n in feed.tokenizer.encode(text, add_special_tokens=False)}
    only_read = sorted(read - set(batch["input_ids"].flatten().tolist()))
    assert len(only_read) > 3
    loop_module.backward(training, [batch])
    grads = training.model.get_input_embeddings().weight.grad
    assert grads is not None and bool(grads.any())
    assert bool(grads[only_read].any(1).all()) != detach
    assert bool(grads[only_read].any()) != detach


def test_a_chunk_may_read_what_the_one_before_asked_for(recipe: MakeRecipe, tmp_path: Path) -> None:
    late = start(recipe("memory=null", "reading.query=previous", f"run.dir={tmp_path / 'late'}"))
    training, feed = start(recipe("memory=null", f"run.dir={tmp_path / 'own'}"))
    batch, same = late[1].next_batch(), feed.next_batch()
    assert torch.equal(batch["input_ids"], same["input_ids"])
    plain = {name: tensor.clone() for name, tensor in same.items()}
    same["own_references"] = torch.nn.functional.pad(same["own_references"], (1, -1), value=-1)
    with torch.no_grad():
        losses = [
            float(loop_module.summed_loss(run, given))
            for run, given in ((late[0], batch), (training, same), (training, plain))
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-4


def test_compiled_it_is_the_same(recipe: MakeRecipe, tmp_path: Path) -> None:
    losses = []
    for compiled in ("false", "true"):
        made = recipe("memory=null", f"run.dir={tmp_path / compiled}")
        training, feed = start(made)
        if compiled == "true":
            torch.compiler.reset()
            training.forward = torch.compile(training.model, backend="aot_eager")
        losses.append(
            [float(loop_module.backward(training, [feed.next_batch()])) for _ in range(3)]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_a_chunk_of_a_row_reads_for_most_of_its_tokens(recipe: MakeRecipe, packing: str) -> None:
    made = recipe("data.sequence_tokens=30", f"data.packing={packing}")
    assert made.reading is not None
    named = References(made.reading, made.data)
    for split in ("train", "val"):
        dataset = TokenDataset.open(made.data.dir, split=split)
        found = ChunkReferences.open(made.reading.references, tokens=made.data.dir, split=split)
        loader = Loader(dataset, made.data.loader_config(seed=1, chunk_tokens=8))
        texts = set()
        for _ in range(5):
            batch = next(loader)
            chunks, documents = batch["chunks"].clone(), batch["documents"].clone()
            batch = named.add_to(batch, split)
            assert batch["own_references"].shape == (4, 4) and "chunks" not in batch
            for row in range(4):
                for column in range(4):
                    part = slice(8 * column, min(8 * column + 8, 30))
                    mine = chunks[row, part].tolist()
                    mine = [n for n in mine if n >= 0]
                    number = int(batch["own_references"][row, column])
                    if not mine:
                        assert number == -1
                        continue
                    most = max(mine.count(n) for n in mine)
                    own = next(n for n in mine if mine.count(n) == most)
                    at = 8 * column + chunks[row, part].tolist().index(own)
                    assert batch["own_documents"][row, column] == documents[row, at]
                    (want,) = found.numbers(torch.tensor([own]).numpy()).tolist()
                    assert (number >= 0) == (want >= 0)
                    if want >= 0:
                        assert named.text(number) == found[want].text
                        texts.add(named.text(number))
            assert torch.equal(batch["token_documents"], documents)
        assert len(texts) > 3


def test_what_is_wrong_is_said_in_one_line(
    recipe: MakeRecipe, tmp_path: Path, tiny_data: Path
) -> None:
    with pytest.raises(DataError, match="run strata data references"):
        train(recipe(f"reading.references={tmp_path / 'nowhere'}"), progress=False)
    with pytest.raises(DataError, match=r"above reference_tokens 8.*cut it"):
        train(recipe("reading.memory.reference_tokens=8"), progress=False, fresh=True)
    with pytest.raises(StrataError, match="attention_dropout to 0"):
        train(recipe("model.host.attention_dropout=0.1"), progress=False, fresh=True)
    with pytest.raises(StrataError, match="memory layer 7 does not exist"):
        train(recipe("reading.memory.layers=[7]"), progress=False, fresh=True)
    with pytest.raises(ConfigError, match=r"reading.query: Input should be 'own' or 'previous'"):
        recipe("reading.query=next")
    with pytest.raises(ConfigError, match=r"sequential .* data.document_mask"):
        recipe("reading.memory.positions=sequential", "data.document_mask=true")


def test_other_references_are_refused_on_resumption(
    recipe: MakeRecipe, tmp_path: Path, tiny_data: Path
) -> None:
    train(recipe("run.steps=4"), progress=False)
    other = tmp_path / "other"
    config = ReferencesConfig(chunk_tokens=8, part_chunks=100, leak_threshold=0.0)
    find_references(tiny_data, out=other, find=find, searched={"bank": "x"}, config=config)
    with pytest.raises(CheckpointError, match="other references"):
        train(recipe("run.steps=4", f"reading.references={other}"), progress=False)

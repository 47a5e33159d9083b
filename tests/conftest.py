"""What several rooms' tests start from: a tiny saved decoder, tiny prepared data, a tiny recipe.

Every test runs offline, with one thread and from the same seeds.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from strata.train import Recipe

# Before torch and transformers are imported, and for the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    OMP_NUM_THREADS="1",  # sums split over threads differ in the last bits
    MALLOC_PERTURB_="0",  # as it is; a command run in this process leaves the allocator alone
    MKL_NUM_THREADS="1",
    TRITON_INTERPRET="0" if Path("/dev/nvidiactl").exists() else "1",  # no GPU: its CPU interpreter
    TOKENIZERS_PARALLELISM="false",
)

NAMES = ("Ada", "Bruno", "Chidi", "Dolores", "Emeka", "Farah", "Goran", "Hana")
PLACES = ("Accra", "Bergen", "Cusco", "Dakar", "Essen", "Fez", "Genoa", "Hanoi")

WORDS = (
    "The capital of France is Paris. The capital of Chad is N'Djamena. Question: which city?\n"
    "Answer: Rome. It lies on the river, and the river runs to the sea.\n"
)

TOWNS = {
    "aral.txt": "Aral has a harbour of salt. Its mayor is called Orla Venn.",
    "bryn.md": "# Bryn\n\nThe bridge of Bryn was built by Tomas Quill in the year of the flood.",
    "cairn.txt": "Cairn sells wool. The market opens at nine. Foreigners are welcome there.",
}


@pytest.fixture(scope="session")
def tiny_quickstart() -> tuple[str, ...]:
    """Overrides that make the quickstart's recipe so small that a step takes milliseconds."""
    return (
        "model.host.hidden_size=16",
        "model.host.intermediate_size=16",
        "model.host.num_hidden_layers=2",
        "model.host.num_attention_heads=2",
        "model.host.vocab_size=512",
        "memory.layers=[1]",
        "memory.num_half_keys=8",
        "memory.num_heads=1",
        "memory.top_k=4",
        "memory.key_dim=8",
        "data.batch_size=2",
        "run.steps=2",
        "run.checkpoint_every=1",
        "run.precision=fp32",
        "schedule.warmup_steps=1",
    )


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """One thread and fixed seeds, whatever the tests before did."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: `run("bank", "ls", folder)`.

    Gives its exit code and what it wrote to stdout and stderr; `stdin="..."` is what it reads.
    """

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        from strata.cli.main import main

        monkeypatch.setattr(sys, "argv", ["strata", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills what torch leaves uninitialised: NaN in floats, a huge number in integers.

    An output that is not wholly written then shows, whatever the allocator hands out.
    """
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def _tiny_model_master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 64 positions and a byte-level tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>", model_max_length=64
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,  # large: greedy decoding does not stay on one token
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(_tiny_model_master: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    folder = tmp_path / "tiny_model"
    shutil.copytree(_tiny_model_master, folder)
    return folder


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    """The model of that folder, opened."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of that folder, opened."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def towns(tmp_path: Path) -> Path:
    """A folder of three short documents: aral.txt, bryn.md and cairn.txt."""
    folder = tmp_path / "towns"
    folder.mkdir()
    for name, text in TOWNS.items():
        (folder / name).write_text(text)
    return folder


TINY_RECIPE = """
name: tiny
seed: 7
model:
  host:
    model_type: llama
    hidden_size: 32
    num_hidden_layers: 3
    num_attention_heads: 4
    num_key_value_heads: 2
    intermediate_size: 48
    vocab_size: 320
    max_position_embeddings: 64
memory: {layers: [1, 2], num_heads: 2, top_k: 4, num_half_keys: 16, key_dim: 16}
data: {batch_size: 4, sequence_tokens: 32}
optim: {lr: 3.0e-3, value_lr: 1.0e-2}
schedule: {kind: wsd, warmup_steps: 3}
run: {steps: 12, device: cpu, log_every: 1, health_every: 5, checkpoint_every: 4}
"""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, _tiny_model_master: Path) -> Path:
    """A prepared token folder: three hundred short documents, some of them for validation."""
    from strata.data.prepare import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("tiny_data")
    rng = random.Random(0)
    rows = [
        {"text": f"{rng.choice(NAMES)} lives in {rng.choice(PLACES)}, house {rng.randrange(90)}."}
        for _ in range(300)
    ]
    source = folder / "documents.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(memory_gb=1.0, val_fraction=0.1)
    prepare([source], out=folder / "tokens", tokenizer=_tiny_model_master, config=config)
    return folder / "tokens"


@pytest.fixture
def tiny_recipe_file(tmp_path: Path, tiny_data: Path) -> Path:
    """A complete recipe of a tiny Llama with memory; its run folder is `tmp_path / "run"`."""
    tree = yaml.safe_load(TINY_RECIPE)
    tree["data"]["dir"] = str(tiny_data)
    tree["run"]["dir"] = str(tmp_path / "run")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def tiny_recipe(tiny_recipe_file: Path) -> Callable[..., Recipe]:
    """Makes the tiny recipe with `a.b=c` overrides, as the command line does."""

    def make(*overrides: str) -> Recipe:
        from strata.config import load_config
        from strata.train import Recipe

        return load_config(Recipe, tiny_recipe_file, overrides)

    return make


@pytest.fixture
def tiny_memory_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The same model with a memory layer of 64 rows, saved beside its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import strata

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    memory = strata.MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4, num_heads=2)
    strata.install(model, memory)
    folder = tmp_path / "tiny_memory_model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder

"""Saved models: opened bit-identical by a fresh process, never half-loaded without strata."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

import strata
from strata.errors import ModelError
from strata.layers import MemoryLayerConfig, ProductKeyMemory, memory_layers, value_tables
from strata.models import HOSTS, ModelConfig, build, load, strata_class
from strata.train.optim import RowOptimizer, parameter_groups

HOST_TYPES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2")
VOCAB = 97


def run_python(code: str, *arguments: str) -> str:
    """Run a program in a fresh interpreter; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def train(model: PreTrainedModel, steps: int = 20) -> list[float]:
    """AdamW for the dense part, a RowOptimizer for the tables, one batch over and over."""
    groups = parameter_groups(model)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": groups.decay, "weight_decay": 0.1}, {"params": groups.no_decay}], lr=3e-3
        )
    ]
    if groups.tables:
        optimizers.append(RowOptimizer(groups.tables, lr=1e-2, max_norm=1.0))
    ids = torch.randint(3, VOCAB, (4, 16))
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@dataclass(frozen=True)
class Saved:
    """One trained host: where it lies and what it must give again."""

    folder: Path
    losses: list[float]


@pytest.fixture(scope="module")
def saved_hosts(
    build_tiny: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Saved]:
    root = tmp_path_factory.mktemp("hosts")
    torch.set_num_threads(1)
    saved = {}
    for model_type in HOST_TYPES:
        torch.manual_seed(0)
        model = build_tiny(model_type)
        losses = train(model)
        folder = root / model_type
        model.save_pretrained(folder)
        ids = torch.randint(3, VOCAB, (2, 14))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            tokens = model.generate(ids, max_new_tokens=10, do_sample=False)
        save_file({"ids": ids, "logits": logits, "tokens": tokens}, root / f"{model_type}.expected")
        saved[model_type] = Saved(folder, losses)
    return saved


OPEN_ALL = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import strata

torch.set_num_threads(1)
report = {}
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = load_file(folder.with_suffix(".expected"))
    with torch.no_grad():
        logits = model(input_ids=expected["ids"]).logits
        tokens = model.generate(expected["ids"], max_new_tokens=10, do_sample=False)
    report[folder.name] = {
        "class": type(model).__name__,
        "training": model.training,
        "logits": torch.equal(logits, expected["logits"]),
        "tokens": torch.equal(tokens, expected["tokens"]),
        "distinct": len(expected["tokens"][:, 14:].unique()),
    }
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def opened(saved_hosts: dict[str, Saved]) -> dict[str, dict[str, Any]]:
    """What a fresh process finds; one process for all hosts, for imports take seconds."""
    found: dict[str, dict[str, Any]] = json.loads(
        run_python(OPEN_ALL, *(str(saved.folder) for saved in saved_hosts.values()))
    )
    return found


WITHOUT_STRATA = """
import json, sys
from pathlib import Path
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

CLASSES = json.loads(sys.argv[1])
report = {}
for folder in map(Path, sys.argv[2:]):
    name = CLASSES[folder.name]
    host = getattr(transformers, name)
    for opener in (AutoConfig, AutoModel, AutoModelForCausalLM, host, host.config_class):
        try:
            opener.from_pretrained(folder)
            report[f"{folder.name} {opener.__name__}"] = None
        except Exception as error:
            report[f"{folder.name} {opener.__name__}"] = str(error)
assert "strata" not in sys.modules
print(json.dumps(report))
"""


class TestEveryHost:
    @pytest.mark.parametrize("model_type", HOST_TYPES)
    def test_the_loss_falls(self, saved_hosts: dict[str, Saved], model_type: str) -> None:
        losses = saved_hosts[model_type].losses
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.parametrize("model_type", HOST_TYPES)
    def test_a_fresh_process_opens_it_bit_identical(
        self, opened: dict[str, dict[str, Any]], model_type: str
    ) -> None:
        found = opened[model_type]
        assert found["class"].startswith("Strata") and found["class"].endswith("ForCausalLM")
        assert found["logits"] and found["tokens"] and not found["training"]
        assert found["distinct"] > 1  # or equal tokens would mean nothing

    def test_without_strata_nothing_opens(self, saved_hosts: dict[str, Saved]) -> None:
        """Neither the Auto classes nor the host's own class half-loads the folder."""
        classes = {t: HOSTS["gemma3" if t == "gemma3_text" else t] for t in HOST_TYPES}
        folders = [str(saved.folder) for saved in saved_hosts.values()]
        report = json.loads(run_python(WITHOUT_STRATA, json.dumps(classes), *folders))
        assert len(report) == 5 * len(HOST_TYPES)
        assert [name for name, error in report.items() if error is None] == []
        for name, error in report.items():
            assert "strata" in error, name

    def test_the_hosts_tested_are_the_hosts_supported(self) -> None:
        assert {t.removesuffix("_text") for t in HOST_TYPES} == set(HOSTS)


class TestTheFolder:
    @pytest.fixture
    def folder(self, build_tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
        build_tiny().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_config(self, folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text())
        assert tree["model_type"] == "strata_llama"
        assert tree["architectures"] == ["StrataLlamaForCausalLM"]
        assert "import strata" in json.dumps(tree["vocab_size"])
        config = AutoConfig.from_pretrained(folder)
        assert config.vocab_size == VOCAB
        assert MemoryLayerConfig.model_validate(config.memory_layers).layers == (1, 2)

    def test_no_pickle_and_each_table_once(self, folder: Path) -> None:
        assert not [p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if "values" in name]  # noqa: SIM118
        assert names == ["model.memory_values.0.weight"]

    def test_saving_again_gives_the_same_bytes(self, folder: Path, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path / "again")
        for name in ("config.json", "model.safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name

    def test_sharded(self, build_tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
        model = build_tiny().eval()
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same_weights(model, again)

    def test_dtype(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_shared_tables_stay_shared(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        first, second = (layer for _, layer in memory_layers(model))
        assert isinstance(first, ProductKeyMemory) and isinstance(second, ProductKeyMemory)
        assert first.table is second.table is next(iter(value_tables(model).values()))

    @pytest.mark.parametrize(
        "memory",
        [
            {"share_values": False},
            {"kind": "peer", "gate": "none"},
            {"value_dim": 20, "query_norm": "layer", "key_norm": "none", "query_bias": True},
            {"gate": "none", "scalar_gate": "zero", "placement": "beside"},
            {"shuffle_rows": True, "seed": 4, "scalar_gate": "sigmoid"},
        ],
        ids=str,
    )
    def test_every_kind_of_memory(
        self, build_tiny: Callable[..., PreTrainedModel], memory: dict[str, Any], tmp_path: Path
    ) -> None:
        model = build_tiny(memory=memory)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same_weights(model, again)
        ids = torch.randint(3, VOCAB, (2, 9))
        with torch.no_grad():
            assert torch.equal(
                model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits
            )

    def test_tied_embeddings(
        self, build_tiny: Callable[..., PreTrainedModel], tmp_path: Path
    ) -> None:
        model = build_tiny(tie_word_embeddings=True)
        train(model, steps=2)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert_same_weights(model, again)

    def test_resized_embeddings(
        self, build_tiny: Callable[..., PreTrainedModel], tmp_path: Path
    ) -> None:
        """The sealed vocabulary size is the one of the moment."""
        model = build_tiny()
        model.resize_token_embeddings(VOCAB + 4)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.config.vocab_size == VOCAB + 4
        assert_same_weights(model, again)

    def test_with_a_device_map(self, folder: Path) -> None:
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert_same_weights(plain, AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"))

    def test_from_config_builds_it_with_memory(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        assert len(list(memory_layers(model))) == 2
        assert all(p.isfinite().all() for p in model.parameters())
        losses = train(model, steps=8)
        assert losses[-1] < losses[0]

    def test_opened_models_train_on(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert all(p.requires_grad for p in model.parameters())
        losses = train(model, steps=8)
        assert losses[-1] < losses[0]

    def test_freezing_belongs_to_the_run_not_to_the_folder(
        self, build_tiny: Callable[..., PreTrainedModel], tmp_path: Path
    ) -> None:
        model = build_tiny(memory={"freeze_base": True})
        assert not model.model.embed_tokens.weight.requires_grad
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert all(p.requires_grad for p in again.parameters())


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


class TestInstall:
    def test_into_a_saved_plain_model(
        self, tiny_model_config: Callable[..., ModelConfig], tmp_path: Path
    ) -> None:
        plain = build(tiny_model_config(), None)
        plain.save_pretrained(tmp_path / "plain")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert (
            strata.install(model, MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4)) is model
        )
        assert type(model).__name__ == "StrataLlamaForCausalLM"
        model.save_pretrained(tmp_path / "with")
        assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "with"))

    def test_the_plain_class_is_left_alone(
        self, tiny_model_config: Callable[..., ModelConfig], tmp_path: Path
    ) -> None:
        """Another plain model of the same host still is, saves and opens as one."""
        strata.install(
            build(tiny_model_config(), None),
            MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4),
        )
        plain = build(tiny_model_config(), None)
        assert type(plain).__name__ == "LlamaForCausalLM"
        assert not list(memory_layers(plain))
        plain.save_pretrained(tmp_path)
        assert "memory_layers" not in (tmp_path / "config.json").read_text()
        assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == VOCAB
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "LlamaForCausalLM"

    def test_a_derived_class_does_not_take_its_parents_place(
        self, tiny_model_config: Callable[..., ModelConfig], tmp_path: Path
    ) -> None:
        """A user's subclass saves, and opens as what transformers knows: the class above it."""
        standard = type(build(tiny_model_config(), None))
        derived = type("MyLlama", (standard,), {})
        plain = build(tiny_model_config(), None)
        plain.__class__ = derived
        memory = MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4)
        strata.install(plain, memory)
        assert isinstance(plain, derived) and type(plain).__name__ == "StrataMyLlama"
        plain.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is strata_class(standard)
        assert_same_weights(plain, again)

    def test_two_models_of_one_configuration_object(
        self, tiny_model_config: Callable[..., ModelConfig], tmp_path: Path
    ) -> None:
        """Memory in one of them changes nothing for the other."""
        config = build(tiny_model_config(), None).config
        first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
        strata.install(first, MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4))
        assert second.config is config and type(config).__name__ == "LlamaConfig"
        for model, name in ((first, "StrataLlamaForCausalLM"), (second, "LlamaForCausalLM")):
            model.save_pretrained(tmp_path / name)
            again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert type(again).__name__ == name
            assert_same_weights(model, again)
        first.set_attn_implementation("eager")
        implementations = {
            module.config._attn_implementation
            for module in first.modules()
            if hasattr(module, "config")
        }
        assert implementations == {"eager"}

    def test_a_host_outside_the_list(self, tmp_path: Path) -> None:
        """Any decoder with layers[i].mlp; the opening program names its class first."""
        from transformers import StableLmConfig, StableLmForCausalLM

        config = StableLmConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = StableLmForCausalLM(config)
        strata.install(model, MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4))
        model.save_pretrained(tmp_path)
        assert strata_class(StableLmForCausalLM) is type(model)
        assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))


class TestDamage:
    """A folder that is not whole is refused in one line."""

    @pytest.fixture
    def folder(
        self,
        build_tiny: Callable[..., PreTrainedModel],
        tiny_model: Path,
        tmp_path: Path,
    ) -> Path:
        folder = tmp_path / "model"
        build_tiny().save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        return folder

    def refused(self, folder: Path) -> str:
        with pytest.raises(ModelError) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_whole_it_opens(self, folder: Path) -> None:
        model, tokenizer = load(folder)
        assert not model.training and len(tokenizer) > 0

    def test_a_missing_weight(self, folder: Path) -> None:
        for name in (
            "model.memory_values.0.weight",
            "model.layers.1.mlp.keys.half_keys",
            "model.layers.0.mlp.up_proj.weight",
        ):
            weights = load_file(folder / "model.safetensors")
            kept = {k: t for k, t in weights.items() if k != name}
            save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
            assert name in self.refused(folder)
            with pytest.raises(ModelError, match="lacks 1 weights"):
                AutoModelForCausalLM.from_pretrained(folder)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def test_a_weight_of_the_wrong_shape(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        table = weights["model.memory_values.0.weight"]
        weights["model.memory_values.0.weight"] = table[:-1].contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.refused(folder)

    def test_a_missing_shard(
        self, build_tiny: Callable[..., PreTrainedModel], folder: Path
    ) -> None:
        (folder / "model.safetensors").unlink()
        build_tiny().save_pretrained(folder, max_shard_size="20KB")
        sorted(folder.glob("model-*.safetensors"))[1].unlink()
        self.refused(folder)

    @pytest.mark.parametrize("keep", [0, 5, 400, -1])
    def test_truncated_weights(self, folder: Path, keep: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert "model.safetensors" in self.refused(folder)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", '{"model_type": 3}', "{}", "\x00\x01", '{"a": NaN}']
    )
    def test_a_corrupt_config(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text)
        self.refused(folder)

    def test_a_config_of_another_kind(self, folder: Path) -> None:
        path = folder / "config.json"
        good = json.loads(path.read_text())
        for change in (
            {"model_type": "no_such_model"},
            {"vocab_size": "many"},
            {"vocab_size": {"value": -1}},
            {"vocab_size": {}},
            {"memory_layers": None},
            {"memory_layers": {"layers": [1], "unknown": 2}},
            {"memory_layers": {"layers": [77], "num_half_keys": 16, "top_k": 4}},
            {"memory_layers": "1,2"},
            {"hidden_size": "wide"},
        ):
            path.write_text(json.dumps(good | change))
            self.refused(folder)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_corrupt_tokenizer(self, folder: Path, name: str) -> None:
        (folder / name).write_text("{")
        assert name in self.refused(folder)

    def test_no_weights_no_config_no_folder(self, folder: Path, tmp_path: Path) -> None:
        (folder / "model.safetensors").unlink()
        self.refused(folder)
        (folder / "config.json").unlink()
        assert "config.json" in self.refused(folder)
        assert "nowhere" in self.refused(tmp_path / "nowhere")

    def test_a_file_is_not_a_folder(self, folder: Path) -> None:
        self.refused(folder / "config.json")

"""A taught reader as a small folder: what is in it, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from test_reader_train import DATA, SMALL, WAYS

from strata.errors import ConfigError, DataError, ModelError
from strata.models import load
from strata.quickstart.decoder import open_reader
from strata.reader import pack as pack_module
from strata.reader.curves import read_looks
from strata.reader.data import make_data, read_settings
from strata.reader.pack import pack_reader
from strata.reader.stages import read_stages
from strata.reader.train import train_reader

LAYERS = "memory={layers: [1], num_half_keys: 8, top_k: 4, num_heads: 1, key_dim: 8, " \
         "placement: beside}"  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "data"
    make_data(None, (), out=out, config=read_settings(DATA, extract=True))
    return out


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Three stages of a step or two, with memory layers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("packed") / "run"
    steps = [f"stages.{name}.steps={n}" for name, n in (("text1", 1), ("memory1", 1), ("know", 0))]
    config = read_stages(None, [*SMALL, *steps, "probe.every=null", LAYERS])
    train_reader(data, out=out, config=config, progress=False)
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def run_copy(taught: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(taught, tmp_path / "run"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_folder_opens_and_says_what_it_is(data: Path, taught: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed = pack_reader(taught, data=data, out=out)
    files = {path.name for path in out.iterdir()}
    assert files >= {
        "config.json", "model.safetensors", "tokenizer.json", "reader.json", "stages.yaml",
        "curves.png", "README.md",
    }  # fmt: skip
    assert packed.num_bytes == sum(path.stat().st_size for path in out.iterdir())
    assert not list(tmp_path.glob("*.tmp"))

    model, tokenizer = load(out)
    trained, its = load(taught / "03-memory2" / "model")
    assert len(model.get_decoder().memory_values) == 1
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16()), name
    assert tokenizer("Who? Ada.")["input_ids"] == its("Who? Ada.")["input_ids"]

    card = json.loads((out / "reader.json").read_text(encoding="utf-8"))
    assert card["stage"] == packed.stage == "03-memory2"
    assert card["parameters"] == packed.num_parameters == sum(p.numel() for p in model.parameters())
    assert card["memory"]["tokens_per_head"] == 4 and card["memory"]["reference_tokens"] == 128
    assert list(card["exact"]) == WAYS and card["num_questions"] == 7 and card["exam"] is None
    assert [look["exact"] for look in card["looks"]] == [look.exact for look in read_looks(taught)]
    assert card["tokens_read"] == read_looks(taught)[-1].tokens == 4 * 256
    sums = card["sha256"]
    assert sums.pop("model.safetensors") == sha256(out / "model.safetensors")
    assert set(sums) >= {
        "tokenizer/tokenizer.json", "made_from.yaml", "text/level1/tokens/manifest.json",
        "memory/level1/references/manifest.json", "eval/test/questions.jsonl",
    }  # fmt: skip
    assert {name: sha256(data / name) for name in sums} == sums
    assert sha256(out / "made_from.yaml") == sums["made_from.yaml"]
    stages = yaml.safe_load((out / "stages.yaml").read_text(encoding="utf-8"))
    assert stages["stages"]["memory2"]["tokens_per_head"] == 4
    assert "threads" not in stages["common"]["run"]
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert f"| {card['exact']['memory_1']:.1%} |" in readme and str(tmp_path) not in readme


def test_what_is_packed_is_asked(data: Path, taught: Path, tmp_path: Path) -> None:
    """Not the model before rounding, nor another stage's."""
    asked: list[torch.Tensor] = []

    class Probe(pack_module.Probe):
        def ask(self, model: torch.nn.Module, *args: object) -> object:
            asked.append(model.get_input_embeddings().weight.clone())
            return super().ask(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "Probe", Probe)
        packed = pack_reader(taught, data=data, out=tmp_path / "out", stage="text1")
    model, _ = load(tmp_path / "out")
    (weight,) = asked
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.get_input_embeddings().weight.float())
    assert packed.stage == "01-text1"
    card = json.loads((tmp_path / "out" / "reader.json").read_text(encoding="utf-8"))
    assert card["tokens_read"] == 256 and [look["stage"] for look in card["looks"]] == ["text1"]
    # A stage that reads text only is asked to read memories as the next stage makes them.
    assert card["memory"]["selector"] == "all"


def test_the_quickstart_opens_it(data: Path, taught: Path, tmp_path: Path) -> None:
    pack_reader(taught, data=data, out=tmp_path / "out")
    reader = open_reader(tmp_path / "out", tmp_path / "copy")
    assert reader.learned and reader.memory.tokens_per_head == 4
    assert reader.folder == tmp_path / "copy"
    wide, _ = load(tmp_path / "copy")
    packed, _ = load(tmp_path / "out")
    for name, tensor in packed.state_dict().items():
        assert torch.equal(reader.model.state_dict()[name], tensor.float()), name
        assert torch.equal(wide.state_dict()[name], tensor.float()), name
    plain = open_reader(taught / "03-memory2" / "model", tmp_path / "other")
    assert not plain.learned and not (tmp_path / "other").exists()
    (tmp_path / "out" / "reader.json").write_text("[]")
    with pytest.raises(ModelError, match=r"reader\.json says no settings of memory"):
        open_reader(tmp_path / "out", tmp_path / "copy")


def test_the_exam_is_packed_without_its_answers(
    run: Callable[..., tuple[int, str, str]], data: Path, run_copy: Path, tmp_path: Path
) -> None:
    score = {"format": "text", "accuracy": 0.5, "num_questions": 8, "kib_per_reference": 0.25}
    one = {"found": 0.75, "scores": [score], "records": [{"text": "never shown"}]}
    report = run_copy / "exam" / "03-memory2" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"stage": "03-memory2", "oracle": one, "search": one}))
    command = ("--data", data, "--run", run_copy, "--out", tmp_path / "out")
    code, printed, err = run("reader", "pack", *command)
    assert code == 0, err
    assert "03-memory2, 0." in printed and "memory_3" in printed
    card = (tmp_path / "out" / "reader.json").read_text(encoding="utf-8")
    assert json.loads(card)["exam"]["search"] == {"found": 0.75, "scores": [score]}
    assert "never shown" not in card
    assert "| text | 50.0% | 0.2 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    report.write_text("{}")
    code, _, err = run("reader", "pack", *command)
    assert code == 2 and "make it again with strata reader eval" in err and err.count("\n") == 1
    assert (tmp_path / "out" / "reader.json").read_text(encoding="utf-8") == card


def test_what_cannot_be_packed_is_refused(
    data: Path, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="no reader in"):
        pack_reader(tmp_path / "nowhere", data=data, out=out)
    with pytest.raises(ModelError, match="no stage 'text9': give one of text1, memory1, memory2"):
        pack_reader(run_copy, data=data, out=out, stage="text9")
    other = Path(shutil.copytree(data, tmp_path / "other"))
    (other / "eval" / "val" / "questions.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="begun with another tokenizer or other"):
        pack_reader(run_copy, data=other, out=out)
    shutil.copy(data / "eval" / "val" / "questions.jsonl", other / "eval" / "val")
    (other / "memory" / "level1" / "references" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"references/manifest\.json: give the --data"):
        pack_reader(run_copy, data=other, out=out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConfigError, match="something else than a packed reader"):
        pack_reader(run_copy, data=data, out=out)
    (out / "mine").unlink()
    pack_reader(run_copy, data=data, out=out)  # an empty folder will do
    before = sha256(out / "reader.json")
    monkeypatch.setattr(pack_module, "MAX_MB", 0.05)
    with pytest.raises(ModelError, match=r"makes a folder of 0\.\d MB in bf16, .* at most 0\.05"):
        pack_reader(run_copy, data=data, out=out, stage="text1")
    assert sha256(out / "reader.json") == before and not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    (out / "stale").touch()
    pack_reader(run_copy, data=data, out=out, stage="text1")
    assert not (out / "stale").exists() and sha256(out / "reader.json") != before
    shutil.rmtree(run_copy / "03-memory2" / "model")
    with pytest.raises(ModelError, match=r"memory2 .* not finished: .* one of text1, memory1"):
        pack_reader(run_copy, data=data, out=out)

"""Quantized and mapped value tables in whole models: saved, opened, counted, refused."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import strata
from strata.errors import ConfigError, ModelError, StrataError
from strata.layers import MappedTable, QuantizedTable, cache_counts, value_tables
from strata.models import count, load, quantize_values
from strata.models.tensor_file import find_tensors

SMALL_GB = 1e-5  # 10 KiB: a few dozen rows
KINDS = {
    "shared": {},
    "apart": {"share_values": False},
    "peer": {"kind": "peer", "gate": "none"},
}
Build = Callable[..., PreTrainedModel]
Folder = Callable[..., Path]


@pytest.fixture
def saved(build_tiny: Build, tiny_model: Path, tmp_path: Path) -> Folder:
    """Saves a tiny model with memory beside a tokenizer."""

    def make(kind: str = "shared", *, dtype: str = "float32", codes: str | None = None) -> Path:
        torch.manual_seed(0)
        model = build_tiny("llama", memory=KINDS[kind], dtype=dtype)
        if codes is not None:
            quantize_values(model, codes)  # type: ignore[arg-type]
        folder = tmp_path / "saved"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        return folder

    return make


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids).logits


def generated(model: PreTrainedModel) -> list[list[int]]:
    ids = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False).tolist()  # type: ignore[operator]


@pytest.mark.parametrize("codes", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_mapped_is_in_memory_bit_for_bit(
    saved: Folder, kind: str, dtype: str, codes: str | None
) -> None:
    folder = saved(kind, dtype=dtype, codes=codes)
    whole, _ = load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped, _ = load(folder, values="mapped", cache_gb=SMALL_GB)
    assert all(isinstance(table, MappedTable) for table in value_tables(mapped).values())
    assert list(value_tables(mapped)) == list(value_tables(whole))
    assert torch.equal(logits(mapped), logits(whole))
    assert generated(mapped) == generated(whole)
    counts = cache_counts(mapped)
    assert list(counts) == list(value_tables(mapped))
    assert all(c.misses > 0 and c.hits > 0 for c in counts.values())
    assert count(mapped, sequence_tokens=8) == count(whole, sequence_tokens=8)


def test_opening_mapped_says_nothing(
    saved: Folder, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved()
    capsys.readouterr()
    load(folder, values="mapped")
    assert "UNEXPECTED" not in capsys.readouterr().err and not caplog.records


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_while_opening_is_quantized_and_saved(
    saved: Folder, kind: str, codes: str, tmp_path: Path
) -> None:
    folder = saved(kind)
    whole, _ = load(folder)
    opened, _ = load(folder, values=codes)  # type: ignore[arg-type]
    quantized = quantize_values(load(folder)[0], codes)  # type: ignore[arg-type]
    assert torch.equal(logits(opened), logits(quantized))
    # int8 rows err by 1/254 of their largest entry, fp8 by 1/16 of each
    difference = (logits(opened) - logits(whole)).abs().max() / logits(whole).abs().max()
    assert 0 < float(difference) < (0.02 if codes == "int8" else 0.1)
    assert count(opened, sequence_tokens=8) == count(whole, sequence_tokens=8)

    opened.save_pretrained(tmp_path / "codes")
    config = json.loads((tmp_path / "codes" / "config.json").read_text())
    assert config["memory_layers"]["value_storage"] == codes
    names = [n for n in find_tensors(tmp_path / "codes") if "memory_values" in n]
    assert names and all(n.endswith((".codes", ".scales")) for n in names)


FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
import strata
from strata.layers import value_tables

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
tokens = model.generate(
    ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
)
tables = {type(table).__name__ for table in value_tables(model).values()}
print(json.dumps({"tokens": tokens.tolist(), "tables": sorted(tables)}))
"""


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_a_fresh_process_opens_a_quantized_folder(saved: Folder, codes: str) -> None:
    folder = saved(dtype="bfloat16", codes=codes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 97, (1, 9))
    truth = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
    )
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), json.dumps(ids.tolist())],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found == {"tokens": truth.tolist(), "tables": ["QuantizedTable"]}
    assert len(set(found["tokens"][0])) > 3


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opening_in_another_dtype_leaves_the_codes(
    saved: Folder, codes: str, dtype: torch.dtype
) -> None:
    folder = saved(codes=codes)
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    (table,) = value_tables(model).values()
    assert isinstance(table, QuantizedTable) and model.lm_head.weight.dtype == dtype
    saved_codes = stored["model.memory_values.0.codes"]
    assert table.codes.dtype == saved_codes.dtype
    assert torch.equal(table.codes.view(torch.int8), saved_codes.view(torch.int8))
    assert torch.equal(table.scales, stored["model.memory_values.0.scales"])


@pytest.mark.parametrize("values", ["mapped", "int8"])
def test_shards(saved: Folder, tmp_path: Path, values: str) -> None:
    folder = saved("apart")
    whole, tokenizer = load(folder)
    shards = tmp_path / "shards"
    whole.save_pretrained(shards, max_shard_size="20KB")
    tokenizer.save_pretrained(shards)
    assert len(list(shards.glob("*.safetensors"))) > 3
    opened, _ = load(shards, values=values, cache_gb=SMALL_GB)  # type: ignore[arg-type]
    truth = whole if values == "mapped" else quantize_values(whole, "int8")
    assert torch.equal(logits(opened), logits(truth))


def test_a_table_that_is_not_aligned(saved: Folder) -> None:
    folder = saved()
    truth = logits(load(folder)[0])
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.unlink()  # a new file: the opened model's weights are views of the old one
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ")
    header += b" " * ((-len(header)) % 8 + 3)  # the format asks for no alignment
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    (place,) = (p for n, p in find_tensors(folder).items() if "memory_values" in n)
    assert place.offset % 4 != 0
    mapped, _ = load(folder, values="mapped", cache_gb=SMALL_GB)
    assert torch.equal(logits(mapped), truth)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lost_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.memory_values.0.weight": "a.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_folder_in_index(folder: Path) -> None:
    index = {"weight_map": {"model.memory_values.0.weight": "../a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_table(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.memory_values.0.weight"))  # type: ignore[arg-type,return-value]


def integers_for_floats(folder: Path) -> None:
    name = "model.memory_values.0.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].int()}))


def codes_without_scales(folder: Path) -> None:
    name = "model.memory_values.0."
    rewrite(folder, lambda t: t.update({name + "codes": t.pop(name + "weight").to(torch.int8)}))


def fewer_rows(folder: Path) -> None:
    name = "model.memory_values.0.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lost_shard,
        other_folder_in_index,
        no_table,
        integers_for_floats,
        codes_without_scales,
        fewer_rows,
    ],
)
@pytest.mark.parametrize("values", ["mapped", "int8"])
def test_damaged_folders_are_one_line(
    saved: Folder, damage: Callable[[Path], None], values: str
) -> None:
    folder = saved()
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load(folder, values=values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_what_is_refused(saved: Folder, tiny_model: Path, tmp_path: Path) -> None:
    folder = saved(codes="int8")
    with pytest.raises(ConfigError, match="int8 already: quantize the float model to fp8"):
        load(folder, values="fp8")
    same = load(folder, values="int8")[0]
    assert all(isinstance(table, QuantizedTable) for table in value_tables(same).values())
    with pytest.raises(ConfigError, match=r"one token reads 8 rows of each, give 2\.4e-07"):
        load(folder, values="mapped", cache_gb=1e-8)
    with pytest.raises(ConfigError, match="give more than 0"):
        load(folder, values="mapped", cache_gb=0)
    with pytest.raises(ConfigError, match="no value storage 'int4': give one of int8, fp8, mapped"):
        load(folder, values="int4")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="has no memory layers"):
        load(tiny_model, values="mapped")
    mapped, _ = load(folder, values="mapped")
    with pytest.raises(ModelError, match="are mapped from"):
        mapped.save_pretrained(tmp_path / "again")
    with pytest.raises(ModelError, match="already"):
        quantize_values(mapped, "int8")
    with pytest.raises(ModelError, match="no value tables"):
        quantize_values(AutoModelForCausalLM.from_pretrained(tiny_model), "int8")
    with pytest.raises(ConfigError, match="no value storage 'int4'"):
        quantize_values(mapped, "int4")  # type: ignore[arg-type]


def test_codes_are_not_installed(build_tiny: Build) -> None:
    with pytest.raises(ConfigError, match=r"memory\.value_storage int8 belongs to a saved model"):
        build_tiny("llama", memory={"value_storage": "int8"})


def test_rows_that_are_no_numbers(saved: Folder) -> None:
    folder = saved()

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.memory_values.0.weight"][77, 5] = float("inf")

    rewrite(folder, poison)
    with pytest.raises(StrataError, match="row 77 of a value table holds NaN or infinity"):
        load(folder, values="int8")
    with pytest.raises(StrataError, match="row 77 of a value table holds NaN or infinity"):
        quantize_values(load(folder)[0], "int8")


def test_float_folders_are_as_before(saved: Folder) -> None:
    folder = saved()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "model.memory_values.0.weight" in file.keys()  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    del config["memory_layers"]["value_storage"]  # written before the field was known
    (folder / "config.json").write_text(json.dumps(config))
    opened, _ = load(folder)
    assert isinstance(next(iter(value_tables(opened).values())), strata.ValueTable)


MEMORY = """
import re, sys
import torch
from pathlib import Path
import strata
from strata.models import load

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
def read(folder):
    model, _ = load(folder, values="mapped", cache_gb=1 / 1024)
    with torch.no_grad():
        for start in range(0, 64, 16):
            model(input_ids=torch.arange(start, start + 16)[None])
    return model

read(sys.argv[2])  # imports, kernels and the allocator, once
before = anonymous_bytes()
model = read(sys.argv[1])
print(anonymous_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_mapped_table_takes_no_memory(
    saved: Folder, build_tiny: Build, tiny_model: Path, tmp_path: Path
) -> None:
    small = saved()
    model = build_tiny("llama", memory={"num_half_keys": 512, "value_dim": 64})
    large = tmp_path / "large"
    model.save_pretrained(large)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(large)
    (table,) = value_tables(model).values()
    table_bytes = table.num_rows * table.width * 4
    assert table_bytes == 64 * 2**20
    del model, table
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(large), str(small)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < table_bytes / 4

"""`strata quantize`, and `--values` of the commands that open a model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from strata.cli.main import main
from strata.layers import stored, value_tables
from strata.models import load, quantize_values

Refused = Callable[..., str]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["strata", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_the_folder_is_what_quantizing_in_memory_saves(
    codes: str,
    tiny_memory_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stored, "_BLOCK_BYTES", 5 * 32 * 4)  # many blocks
    out = tmp_path / "new" / "out"
    assert run(monkeypatch, "quantize", tiny_memory_model, "--out", out, "--values", codes) == 0
    assert "1 value tables" in capsys.readouterr().out
    truth = quantize_values(load(tiny_memory_model)[0], codes)  # type: ignore[arg-type]
    truth.save_pretrained(tmp_path / "truth")
    mine, theirs = (load_file(f / "model.safetensors") for f in (out, tmp_path / "truth"))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    opened, tokenizer = load(out)
    assert next(iter(value_tables(opened).values())).storage == codes
    ids = torch.tensor([tokenizer("The capital of")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, truth(ids).logits)
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


@pytest.mark.parametrize("values", ["int8", "fp8", "mapped"])
def test_generate_and_eval_take_values(
    values: str,
    tiny_memory_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--values", values, "--cache-gb", 1e-5)
    assert run(monkeypatch, "generate", tiny_memory_model, "The capital", *options) == 0
    said = capsys.readouterr().out
    model, tokenizer = load(tiny_memory_model, values=values)  # type: ignore[arg-type]
    ids = torch.tensor([tokenizer("The capital")["input_ids"]])
    mask = torch.ones_like(ids)
    count = 64 - ids.shape[1]
    written = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)  # type: ignore[operator]
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert said == text + "\n"

    loss = tmp_path / "text.txt"
    loss.write_text("The capital of France is Paris.\n" * 20)
    figures = []
    for more in (options, ()):
        assert run(monkeypatch, "eval", tiny_memory_model, "--loss", loss, "--json", *more) == 0
        tree = json.loads(capsys.readouterr().out)
        figures.append(json.dumps(tree))
    assert (figures[0] == figures[1]) == (values == "mapped")


class TestRefused:
    """One line, a non-zero exit, and nothing left behind."""

    @pytest.fixture
    def refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> Refused:
        def go(*arguments: object) -> str:
            capsys.readouterr()
            assert run(monkeypatch, *arguments) != 0
            lines = capsys.readouterr().err.strip().splitlines()
            assert lines[-1].startswith("strata: error: ") and "Traceback" not in "".join(lines)
            return lines[-1]

        return go

    def test_inputs(
        self, refused, tiny_model: Path, tiny_memory_model: Path, tmp_path: Path
    ) -> None:  # type: ignore[no-untyped-def]
        out = tmp_path / "out"
        assert "give one of int8, fp8" in refused(
            "quantize", tiny_memory_model, "--out", out, "--values", "int4"
        )
        assert "no model folder at" in refused("quantize", tmp_path / "none", "--out", out)
        assert "no memory layers" in refused("quantize", tiny_model, "--out", out)
        assert "not an empty folder" in refused(
            "quantize", tiny_memory_model, "--out", tiny_memory_model
        )
        assert "give one of int8, fp8, mapped" in refused(
            "generate", tiny_memory_model, "x", "--values", "float"
        )
        assert "more than 0" in refused(
            "generate", tiny_memory_model, "x", "--values", "mapped", "--cache-gb", 0
        )
        assert "is too small for 1 value tables" in refused(
            "generate", tiny_memory_model, "x", "--values", "mapped", "--cache-gb", 1e-9
        )
        assert not out.exists()

    def test_damaged(self, refused: Refused, tiny_memory_model: Path, tmp_path: Path) -> None:
        out, path = tmp_path / "out", tiny_memory_model / "model.safetensors"
        tensors = load_file(path)
        name = "model.memory_values.0.weight"
        tensors[name][9, 0] = float("nan")
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
        assert "row 9 of a value table holds NaN" in refused(
            "quantize", tiny_memory_model, "--out", out
        )
        assert not out.exists() and not list(tmp_path.glob(".out*"))
        data = path.read_bytes()
        path.write_bytes(data[:-50])
        assert "damaged" in refused("quantize", tiny_memory_model, "--out", out)
        path.unlink()
        assert "missing" in refused("quantize", tiny_memory_model, "--out", out)
        config = tiny_memory_model / "config.json"
        config.write_text(config.read_text()[:50])
        assert "is not JSON" in refused("quantize", tiny_memory_model, "--out", out)

    def test_twice(
        self,
        refused: Refused,
        tiny_memory_model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        out = tmp_path / "out"
        assert run(monkeypatch, "quantize", tiny_memory_model, "--out", out) == 0
        assert "are int8 already" in refused("quantize", out, "--out", tmp_path / "again")

    def test_no_room(
        self,
        refused: Refused,
        tiny_memory_model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        full = shutil._ntuple_diskusage(100, 100, 0)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        line = refused("quantize", tiny_memory_model, "--out", tmp_path / "out")
        assert "free some space" in line and not (tmp_path / "out").exists()

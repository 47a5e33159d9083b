"""Wrong rows and recipes of fine-tuning: one line that says where, and a non-zero exit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Refused = Callable[..., str]

ANSWER = {"role": "assistant", "content": "Accra"}
QUESTION = {"role": "user", "content": "Where?"}
SFT_ROW = {"prompt": "Where is Ada?", "completion": " Accra"}
DPO_ROW = {"prompt": "Where?", "chosen": " Accra", "rejected": " Fez"}


@pytest.fixture
def refused(run: Callable[..., tuple[int, str, str]]) -> Refused:
    """The one line that a command ends with."""

    def call(*arguments: object) -> str:
        code, _, err = run(*arguments)
        assert code in (1, 2)
        lines = [line for line in err.splitlines() if "strata: error:" in line]
        assert len(lines) == 1 and "Traceback" not in lines[0]
        return lines[0]

    return call


def write(tmp_path: Path, model: Path, content: str | list[Any], **changes: Any) -> Path:
    text = content if isinstance(content, str) else "".join(json.dumps(r) + "\n" for r in content)
    (tmp_path / "rows.jsonl").write_text(text)
    tree = {
        "name": "wrong",
        "model": {"path": str(model)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "sequence_tokens": 48},
        "reading": {"memory": {"reference_tokens": 32}},
        "run": {"dir": str(tmp_path / "run"), "steps": 1, "device": "cpu"},
        **changes,
    }
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no row: give rows with 'prompt' and 'completion', or 'messages'"),
        ("[1]\n", "line 1: holds list, not an object"),
        ("{\n", "line 1: not JSON"),
        ([{"text": "x"}], "line 1: no 'prompt'; a row needs 'prompt' and 'completion', or"),
        ([SFT_ROW, {**SFT_ROW, "completion": " "}], "line 2: 'completion' holds no text"),
        ([{**SFT_ROW, "prompt": 7}], "'prompt' must be text or a list of messages"),
        ([{**SFT_ROW, "prompt": [QUESTION]}], "must all be text, or all be messages"),
        ([{"prompt": [QUESTION], "completion": [QUESTION]}], "must be one message of the assist"),
        ([{"messages": [QUESTION]}], "the last of 'messages' must be the assistant's answer"),
        ([{"messages": [ANSWER]}], "stands first in 'messages', behind no prompt"),
        ([{"messages": [{"role": "tool", "content": "x"}, ANSWER]}], "no role 'tool'"),
        ([{"messages": [{"role": "user"}, ANSWER]}], "it needs 'role' and 'content'"),
        ([{"messages": ["hello"]}], "'messages' holds str, not a message"),
        ([SFT_ROW, {"messages": [QUESTION, ANSWER]}], "give one form throughout"),
        ([{**SFT_ROW, "references": [3]}], "'references' holds int"),
        ([{**SFT_ROW, "references": [""]}], "'references' holds no text"),
        ([{**SFT_ROW, "references": 3}], "'references' must be a list"),
        ([{**SFT_ROW, "references": [{"id": "a"}]}], "by id: give the bank, reading.bank=PATH"),
        ([{**SFT_ROW, "prompt": "Where? " * 50}], "none of 1 rows is left"),
        ([{**SFT_ROW, "prompt": "\ud800"}], "half a surrogate pair"),
    ],
)
def test_wrong_rows(
    tiny_model: Path, tmp_path: Path, refused: Refused, content: str | list[Any], message: str
) -> None:
    assert message in refused("sft", write(tmp_path, tiny_model, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([SFT_ROW], "no 'chosen'; a row needs 'prompt', 'chosen' and 'rejected'"),
        ([{**DPO_ROW, "rejected": " Accra"}], "'chosen' and 'rejected' are the same"),
        ([{**DPO_ROW, "chosen": [ANSWER]}], "must all be text, or all be messages"),
    ],
)
def test_wrong_preferences(
    tiny_model: Path, tmp_path: Path, refused: Refused, content: list[Any], message: str
) -> None:
    assert message in refused("dpo", write(tmp_path, tiny_model, content))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rl=1", "unknown key optim.rl; allowed here: lr"),
        ("beta=0.1", "unknown key beta"),
        ("model={host: {model_type: llama}}", "give model.path"),
        ("model.path=nowhere/at/all", "cannot open the model at nowhere/at/all"),
        ("data.train=nowhere.jsonl", "no source at nowhere.jsonl"),
        ("reading.bank=nowhere", "nowhere"),
        ("reading.memory.layers=[9]", "memory layer 9 does not exist"),
        ("reading.memory.reference_tokens=4000", "above the 64 positions"),
        ("data.validation_fraction=0.5", "leaves"),
        ("run.device=gpu", "run.device"),
        ("schedule.warmup_fraction=2", "schedule.warmup_fraction"),
    ],
)
def test_wrong_recipes(
    tiny_model: Path, tmp_path: Path, refused: Refused, override: str, message: str
) -> None:
    assert message in refused("sft", write(tmp_path, tiny_model, [SFT_ROW]), override)


def test_without_trl(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    path = write(tmp_path, tiny_model, [SFT_ROW])
    monkeypatch.setitem(sys.modules, "trl", None)
    line = refused("sft", path)
    assert 'strata sft needs trl, which is not installed: pip install "strata-lm[tune]"' in line


def test_read_only_tables(tiny_memory_model: Path, tmp_path: Path, refused: Refused) -> None:
    import strata
    from strata.models import load

    model, tokenizer = load(tiny_memory_model)
    strata.quantize_values(model, "int8")
    model.save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    assert "int8" in refused("sft", write(tmp_path, tmp_path / "int8", [SFT_ROW]))


def test_a_damaged_checkpoint_of_the_tables(
    tiny_memory_model: Path, tmp_path: Path, refused: Refused
) -> None:
    from strata.config import load_config
    from strata.train.tune import SFTRecipe, sft

    path = write(tmp_path, tiny_memory_model, [SFT_ROW])
    sft(load_config(SFTRecipe, path), progress=False)
    (tmp_path / "run" / "result.json").unlink()
    (damaged,) = (tmp_path / "run" / "checkpoints").glob("*/value_optimizer.safetensors")
    damaged.write_bytes(b"damaged")
    assert "cannot be used" in refused("sft", path)

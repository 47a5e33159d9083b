"""`strata generate` through the command line, in this process."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from strata.cli.main import main
from strata.models import load

PROMPT = "The capital of France is"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["strata", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def continuation(folder: Path, prompt: str, count: int) -> str:
    model, tokenizer = load(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_text_goes_to_stdout_and_speed_to_stderr(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tiny_model, PROMPT, "--max-new-tokens", 8) == 0
    captured = capsys.readouterr()
    assert captured.out == continuation(tiny_model, PROMPT, 8) + "\n"
    last_line = captured.err.strip().splitlines()[-1]
    assert last_line.startswith("8 tokens in ") and last_line.endswith(" tokens/s")


def test_model_with_memory(
    tiny_memory_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tiny_memory_model, PROMPT, "--max-new-tokens", 8) == 0
    assert capsys.readouterr().out == continuation(tiny_memory_model, PROMPT, 8) + "\n"


def test_standard_input_is_a_prompt(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode() + b"\n")))
    assert run(monkeypatch, tiny_model, "-", "--max-new-tokens", 5, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == PROMPT
    (sample,) = found["samples"]
    assert sample["text"] == continuation(tiny_model, PROMPT, 5)
    assert sample["num_tokens"] == 5 and not sample["ended"]


def test_samples_follow_from_the_seed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(seed: int) -> list[str]:
        options = ("--temperature", 2, "--top-p", 0.9, "--num-samples", 3, "--json")
        assert run(monkeypatch, tiny_model, PROMPT, "--seed", seed, *options) == 0
        return [sample["text"] for sample in json.loads(capsys.readouterr().out)["samples"]]

    first = draw(1)
    assert len(set(first)) == 3
    assert draw(1) == first
    assert draw(2) != first


def test_streamed_samples_are_told_apart_on_stderr(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--temperature", 1, "--num-samples", 2, "--max-new-tokens", 4)
    assert run(monkeypatch, tiny_model, PROMPT, *options) == 0
    error = capsys.readouterr().err
    assert "--- 1 of 2" in error and "--- 2 of 2" in error and "8 tokens in" in error


def test_default_length_ends_with_the_context(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = load(tiny_model)
    assert run(monkeypatch, tiny_model, PROMPT, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["max_new_tokens"] == 64 - len(tokenizer(PROMPT)["input_ids"])


def test_end_token_ends(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load(tiny_model)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    model.generation_config.eos_token_id = [written[2]]
    model.generation_config.save_pretrained(tiny_model)
    assert run(monkeypatch, tiny_model, PROMPT, "--max-new-tokens", 6, "--json") == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert sample["ended"] and sample["num_tokens"] == written.index(written[2]) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "the prompt is empty"),
        (("a", "--max-new-tokens", 0), "--max-new-tokens 0: give 1 or more"),
        (("a", "--temperature", -1), "--temperature -1.0"),
        (("a", "--temperature", "nan"), "--temperature nan"),
        (("a", "--temperature", "inf"), "--temperature inf"),
        (("a", "--top-p", 0), "--top-p 0.0"),
        (("a", "--top-p", 1.5), "--top-p 1.5"),
        (("a", "--seed", -1), "--seed -1"),
        (("a", "--seed", 2**64), "--seed"),
        (("a", "--num-samples", 0), "--num-samples 0"),
        (("a", "--num-samples", 2), "would all be the same: set --temperature"),
        (("a", "--device", "tpu9"), "no device 'tpu9' here"),
        (("a", "--device", "meta"), "no device 'meta' here"),
        (("a\udcff",), "the prompt is not UTF-8"),
        (("a", "--max-new-tokens", 64), "do not fit the model's context of 64"),
        (("a " * 90,), "fills the model's context of 64: shorten it"),
    ],
)
def test_wrong_input_is_one_line(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    assert run(monkeypatch, tiny_model, *arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("strata: error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in captured.err and not captured.out


def test_binary_standard_input_is_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert run(monkeypatch, tiny_model, "-") == 2
    assert "standard input is not UTF-8 (byte 1)" in capsys.readouterr().err

"""`strata bench memory`: every format answers as itself, on one clock."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from strata.bench.memory import FORMATS, SIZES, STAGES, Clock
from strata.bench.memory.answers import Answered, Bench, unending
from strata.bench.memory.made import make_decoder, make_tokenizer
from strata.cli import main as command_line

CPU = torch.device("cpu")
SMALL = SIZES["small"]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["strata", "bench", "memory", *arguments])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    return int(end.value.code or 0)


def test_json_has_every_format_at_every_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--size", "small", "--rounds", "2", "--embedder", "none"]
    assert run([*small, "--json"], monkeypatch) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(r["batch"], r["format"]) for r in results] == [
        (batch, name) for batch in SMALL.batches for name in FORMATS
    ]
    kib = {r["format"]: r["kib_per_reference"] for r in results}
    # 4 layers, 2 heads, 32 tokens, width 16, keys and values; fp32 in RAM, bf16 in the bank.
    assert kib["text_prefix_cached"] == 4 * 2 * 32 * 16 * 2 * 4 / 1024
    assert kib["text_prefix_cached"] / 2 < kib["dense"] < kib["text_prefix_cached"] / 2 * 1.1
    assert kib["none"] == 0 < kib["text"] < kib["explicit_vq"] < kib["explicit"] < kib["dense"]
    for result in results:
        stages, name = result["stages"], result["format"]
        wanted = set(STAGES) - {"embed"}
        if name == "none":
            wanted = {"prefill", "decode"}
        elif name.startswith("text"):
            wanted -= {"inject"} | ({"load"} if name == "text" else set())
        assert set(stages) == wanted, name
        assert all(0 < s["p50_ms"] <= s["p95_ms"] for s in stages.values())
        assert result["ttft_ms"] > stages["prefill"]["p50_ms"] * 0.5
        step_ms = 1e3 * result["batch"] / result["tokens_per_s"]
        assert stages["decode"]["p50_ms"] < 3 * step_ms


def test_the_tables_name_every_format(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    small = ["--size", "small", "--rounds", "1", "--embedder", "none"]
    assert run(small, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*FORMATS, *STAGES, "KiB/reference"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    tokenizer = make_tokenizer()
    model = make_decoder(SMALL, len(tokenizer)).eval()
    folder = tmp_path_factory.mktemp("banks")
    with torch.inference_mode():
        return Bench(SMALL, model, tokenizer, None, Clock(CPU), folder, lambda text: None)


@pytest.mark.parametrize("batch", [1, 2])
def test_formats_read_what_they_are_named_for(small: Bench, batch: int) -> None:
    answers: dict[str, Answered] = {}
    with torch.inference_mode(), unending(small.model):
        for name in FORMATS:
            into: list[Answered] = []
            small.contestant(name, batch, into)()
            (answers[name],) = into
    for answer in answers.values():
        assert [len(row) for row in answer.written] == [SMALL.new_tokens] * batch
        assert 0 < answer.ttft_ms < answer.total_ms
    text, cached = answers["text"], answers["text_prefix_cached"]
    # The cached prefix is the text: the same references and the same answer.
    assert cached.used == text.used and cached.written == text.written
    assert [len(row) for row in text.used] == [SMALL.top_k] * batch
    assert answers["none"].used == []
    assert text.written != answers["none"].written
    pieces = SMALL.prompt_tokens // SMALL.chunk_tokens
    for name in ("dense", "explicit", "explicit_vq"):
        assert len(answers[name].used) > pieces * batch
        assert [len(row) for row in answers[name].used[: pieces * batch]] == [5] * pieces * batch
        assert answers[name].written != answers["none"].written
        assert answers[name].used[: pieces * batch] == answers["explicit"].used[: pieces * batch]


def test_references_are_as_long_as_they_may_be(small: Bench) -> None:
    bank = small.banks["explicit"]
    assert len(bank) == SMALL.references
    texts = [b["text"].to_pylist() for b in bank._store.scan(["text"])]
    lengths = [len(small._tokens(text)) for part in texts for text in part]
    assert lengths == [SMALL.reference_tokens] * SMALL.references
    assert small.prompts(3, 0).shape == (3, SMALL.prompt_tokens)
    assert not torch.equal(small.prompts(3, 0), small.prompts(3, 1))


def test_a_stage_within_a_stage_counts_once() -> None:
    clock = Clock(CPU)
    with clock.timed("search"):
        time.sleep(0.02)
        with clock.timed("embed"):
            time.sleep(0.05)
    (search,), (embed,) = clock.times_ms["search"], clock.times_ms["embed"]
    assert embed >= 50 and 20 <= search < embed + 20
    assert clock.now_ms() >= embed + search


def test_answers_end_as_before(small: Bench) -> None:
    config = small.model.generation_config
    config.eos_token_id = 7
    with unending(small.model):
        assert config.eos_token_id is None
    assert config.eos_token_id == 7
    config.eos_token_id = None


def test_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=100,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    own = ["--size", "small", "--rounds", "1", "--embedder", "none", "--model", str(tmp_path)]
    assert run(own, monkeypatch) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "are 212 tokens and the model's context is 100" in said
    config.max_position_embeddings = 512
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert run([*own, "--json"], monkeypatch) == 0
    results = json.loads(capsys.readouterr().out)
    assert results[1]["kib_per_reference"] > 0 and len(results) == 12


@pytest.mark.parametrize("given", [["--size", "huge"], ["--rounds", "0"]])
def test_wrong_options_get_one_line(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(given, monkeypatch) != 0
    assert len(capsys.readouterr().err.strip().splitlines()) == 1

"""Loss on text and on prepared tokens against a reckoning window by window."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.data.prepare import PrepareConfig, prepare
from strata.errors import ConfigError, DataError, ModelError
from strata.evals.loss import folder_loss, is_token_folder, text_loss
from strata.models import load

Opened = tuple[PreTrainedModel, PreTrainedTokenizerBase]
TEXTS = [
    "The capital of France is Paris.",
    "It lies on the river, and the river runs to the sea. " * 9,
    "Rome «é» 漢",
]
PAIR = ("The capital of Chad is", " N'Djamena")


@pytest.fixture
def opened(tiny_model: Path) -> Opened:
    return load(tiny_model)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"text": text} for text in TEXTS]
    rows.append({"prompt": PAIR[0], "completion": PAIR[1]})
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stream(tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[list[bool]], int]:
    """Documents of the fixture as ids, which carry loss, and the bytes of those."""
    ids, scored = [], []
    for prompt, text in [
        *(("", text) for text in TEXTS[:3]),
        ("The capital of Chad is", " N'Djamena"),
    ]:
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        ids.append(before + after)
        scored.append([False] * len(before) + [True] * len(after))
    num_bytes = sum(len(text.encode()) for text in TEXTS) + len(PAIR[1])
    return ids, scored, num_bytes


def reckon(model: PreTrainedModel, ids: list[int], scored: list[bool], window: int) -> list[float]:
    """Nats of the scored tokens, one window at a time, in float64."""
    found = []
    for first in range(0, len(ids) - 1, window):
        inputs = torch.tensor([ids[first : first + window]])
        log_probs = model(inputs).logits[0].double().log_softmax(-1)
        for offset, target in enumerate(range(first + 1, min(first + window, len(ids) - 1) + 1)):
            if scored[target]:
                found.append(-log_probs[offset, ids[target]].item())
    return found


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("window", [1, 7, 64])
def test_text_loss_by_windows(opened: Opened, texts: Path, window: int, isolate: bool) -> None:
    model, tokenizer = opened
    ids, scored, num_bytes = stream(tokenizer)
    if not isolate:
        ids, scored = [list(chain(*ids))], [list(chain(*scored))]
    nats = [
        value
        for document, carries in zip(ids, scored, strict=True)
        for value in reckon(model, [0, *document], [False, *carries], window)
    ]
    result = text_loss(
        model, [texts], tokenizer=tokenizer, sequence_tokens=window, isolate=isolate, batch_size=3
    )
    assert result.num_tokens == len(nats) == sum(map(sum, scored))
    assert result.num_bytes == num_bytes
    assert result.nats == pytest.approx(math.fsum(nats), rel=1e-5)  # fp32 sums in another order
    assert result.perplexity == pytest.approx(math.exp(math.fsum(nats) / len(nats)), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(
        math.fsum(nats) / math.log(2) / num_bytes, rel=1e-5
    )


@pytest.fixture
def prepared(texts: Path, tiny_model: Path, tmp_path: Path) -> Path:
    config = PrepareConfig(shuffle=False, shard_tokens=40, memory_gb=1.0)
    prepare([texts], out=tmp_path / "tokens", tokenizer=tiny_model, config=config)
    return tmp_path / "tokens"


@pytest.mark.parametrize("isolate", [False, True])
def test_prepared_tokens_are_the_text(
    opened: Opened, texts: Path, prepared: Path, isolate: bool
) -> None:
    model, tokenizer = opened
    from_text = text_loss(model, [texts], tokenizer=tokenizer, sequence_tokens=16, isolate=isolate)
    from_tokens = folder_loss(
        model, prepared, split="train", tokenizer=tokenizer, sequence_tokens=16, isolate=isolate
    )
    assert is_token_folder(prepared) and not is_token_folder(texts)
    assert from_tokens.num_tokens == from_text.num_tokens
    assert from_tokens.num_bytes == from_text.num_bytes
    assert from_tokens.nats == pytest.approx(from_text.nats, rel=1e-6)
    assert from_tokens.nats_per_token_stderr == pytest.approx(from_text.nats_per_token_stderr or 0)


def test_batch_size_does_not_matter(opened: Opened, texts: Path) -> None:
    model, tokenizer = opened
    losses = [
        text_loss(model, [texts], tokenizer=tokenizer, sequence_tokens=9, batch_size=size).nats
        for size in (1, 4, 100)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_measures_and_progress(opened: Opened, texts: Path) -> None:
    model, tokenizer = opened
    seen: list[tuple[int, int]] = []
    result = text_loss(
        model, [texts], tokenizer=tokenizer, progress=lambda *both: seen.append(both)
    )
    assert seen[-1][0] == seen[-1][1] == texts.stat().st_size
    names = [measure.metric for measure in result.measures("t")]
    assert names == ["loss_nats_per_token", "perplexity", "bits_per_byte"]


def test_text_field(opened: Opened, tmp_path: Path) -> None:
    model, tokenizer = opened
    found = []
    for field in ("text", "body"):
        path = tmp_path / f"{field}.jsonl"
        path.write_text(json.dumps({field: TEXTS[0]}) + "\n")
        found.append(text_loss(model, [path], tokenizer=tokenizer, text_field=field))
    assert found[0] == found[1]


def test_wrong_input_is_refused(opened: Opened, texts: Path, prepared: Path) -> None:
    model, tokenizer = opened
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        folder_loss(model, prepared)
    with pytest.raises(ConfigError, match="sequence of 65 tokens"):
        folder_loss(model, prepared, split="train", sequence_tokens=65)
    with pytest.raises(ConfigError, match="batch size 0"):
        text_loss(model, [texts], tokenizer=tokenizer, batch_size=0)
    with pytest.raises(DataError, match="no source at"):
        text_loss(model, [texts / "x"], tokenizer=tokenizer)
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(DataError, match="another tokenizer"):
        folder_loss(model, prepared, split="train", tokenizer=tokenizer)
    model.config.vocab_size = 200
    with pytest.raises(DataError, match="prepared with 320 token ids, the model has 200"):
        folder_loss(model, prepared, split="train")


def test_text_without_tokens_is_refused(opened: Opened, tmp_path: Path) -> None:
    model, tokenizer = opened
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="nothing to measure"):
        text_loss(model, [tmp_path / "empty.txt"], tokenizer=tokenizer)


def test_token_outside_the_vocabulary_is_damage(opened: Opened, prepared: Path) -> None:
    model, _ = opened
    path = prepared / "train" / "00000.tokens.npy"
    content = bytearray(path.read_bytes())
    content[-2:] = (60_000).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="token 60000 is outside the vocabulary"):
        folder_loss(model, prepared, split="train")


def test_model_of_nan_is_named_damaged(opened: Opened, texts: Path) -> None:
    model, tokenizer = opened
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        text_loss(model, [texts], tokenizer=tokenizer)

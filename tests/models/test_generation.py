"""Generation with every cache that runs on a CPU, batching, beams and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 97
PROMPT_TOKENS, NEW_TOKENS = 9, 12
Build = Callable[..., PreTrainedModel]


def prompt(rows: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, PROMPT_TOKENS), generator=generator)


def greedy(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Greedy decoding of NEW_TOKENS, eos or not."""
    return model.generate(
        ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **options
    )


def greedy_without_cache(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The truth: each token from a whole forward pass."""
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].clone()
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.fixture(params=["llama", "mistral", "gemma2", "gemma3_text"])
def model(request: pytest.FixtureRequest, build_tiny: Build) -> PreTrainedModel:
    """Full attention, a sliding window of 6, and two hybrids of both."""
    return build_tiny(request.param).eval().requires_grad_(False)


# Offloaded caches copy between devices and need an accelerator.
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_caches(model: PreTrainedModel, cache: str | None) -> None:
    """More tokens than the window: the sliding layers forget, the logits must not notice."""
    options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True  # CPUs are not compiled for; says so
    found = greedy(model, prompt(), **options)
    truth = greedy_without_cache(model, prompt())
    assert torch.equal(found, truth)
    assert len(found[:, PROMPT_TOKENS:].unique()) > 2


def test_a_quantized_cache(build_tiny: Build) -> None:
    """Two to eight bits a number: other text than without, but text."""
    pytest.importorskip("optimum.quanto")
    model = build_tiny().eval()
    assert greedy(model, prompt(), cache_implementation="quantized").shape[1] > PROMPT_TOKENS


def test_steps_with_a_cache_give_the_logits_of_the_whole(model: PreTrainedModel) -> None:
    ids = torch.cat([prompt(), prompt(seed=1)], dim=1)
    whole = model(input_ids=ids).logits
    cache, steps = None, []
    for part in ids.split([5, 1, 1, 4, 7], dim=1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_left_padding_equals_single_rows(model: PreTrainedModel) -> None:
    lengths = (PROMPT_TOKENS, 4, 6)
    padded = prompt(len(lengths))
    mask = torch.ones_like(padded)
    for row, length in enumerate(lengths):
        padded[row, : PROMPT_TOKENS - length] = model.config.pad_token_id
        mask[row, : PROMPT_TOKENS - length] = 0
    together = greedy(model, padded, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = greedy(model, padded[row : row + 1, PROMPT_TOKENS - length :])
        assert torch.equal(together[row, PROMPT_TOKENS - length :], alone[0])


def test_beam_search(model: PreTrainedModel) -> None:
    """Beams reorder the cache. More of them find no worse a sequence than greedy decoding."""
    ids = prompt(1)
    out = model.generate(
        ids,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        num_beams=4,
        num_return_sequences=4,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert len({tuple(row) for row in out.sequences.tolist()}) == 4
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, PROMPT_TOKENS - 1 : -1]
        logits = logits.clone()
        new = sequence[PROMPT_TOKENS:]
        logprobs = logits.log_softmax(-1).gather(1, new[:, None]).sum()
        # `sequences_scores` is the mean over new tokens; the forbidden eos takes no score along.
        assert float(score) == pytest.approx(float(logprobs) / 5, abs=2e-3)


def test_sampling_repeats_with_the_seed(model: PreTrainedModel) -> None:
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(
            model.generate(
                prompt(), max_new_tokens=NEW_TOKENS, do_sample=True, top_k=20, top_p=0.95
            )
        )
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_assisted_generation(build_tiny: Build) -> None:
    """A draft model proposes, the memory model judges: the text is its own."""
    model = build_tiny().eval()
    draft = build_tiny(memory=None, num_hidden_layers=1).eval()
    found = model.generate(
        prompt(1), max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft
    )
    truth = model.generate(prompt(1), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(found, truth)


def test_peer_generates(build_tiny: Build) -> None:
    model = build_tiny(memory={"kind": "peer", "gate": "none"}).eval()
    assert torch.equal(greedy(model, prompt()), greedy_without_cache(model, prompt()))


def test_bf16_generates(build_tiny: Build) -> None:
    model = build_tiny(dtype="bfloat16").eval()
    out = greedy(model, prompt())
    assert out.shape == (2, PROMPT_TOKENS + NEW_TOKENS)


def test_nothing_is_queued_or_counted_while_generating(build_tiny: Build) -> None:
    from strata.layers import health, track_usage, value_tables

    model = build_tiny().eval()
    track_usage(model)
    for table in value_tables(model).values():
        table.queued = True
    greedy(model, prompt())
    assert health(model) == {}
    assert [len(table.queue) for table in value_tables(model).values()] == [0]

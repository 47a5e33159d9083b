"""Dense memory of everything is the same as the reference in the prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_memories import MARKER, Shelf, TinyHit, sharp, words, write
from transformers import PreTrainedModel, StaticCache

from strata.explicit.attach import attach
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig

MakeHost = Callable[..., PreTrainedModel]
SETTINGS = ExplicitMemoryConfig(layers=(0, 1, 2, 3), selector="all", reference_tokens=17)
RNG = torch.Generator().manual_seed(5)
REFERENCE = torch.randint(5, 96, (17,), generator=RNG).tolist()
ROWS = [torch.randint(5, 96, (n,), generator=RNG).tolist() for n in (23, 14)]


@pytest.fixture
def host_model(host_model: PreTrainedModel) -> PreTrainedModel:
    return sharp(host_model)


@pytest.fixture
def make_host(make_host: MakeHost) -> MakeHost:
    return lambda name, **changes: sharp(make_host(name, **changes))


@pytest.fixture(autouse=True)
def _no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding layers (512 tokens, more than any text) count as full, so all can hold memory."""
    monkeypatch.setattr(Host, "window", lambda self, layer: None)


def shelf(model: PreTrainedModel) -> Shelf:
    shape = Host(model).memory_shape(SETTINGS)
    memory = write(model, REFERENCE, shape)
    assert int(memory.kept_n) == 17
    return Shelf({"r": memory}, lambda query: [TinyHit("r", 1.0, "reference")])


def padded(rows: list[list[int]], before: list[int]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows)) + len(before)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, width - len(row) - len(before) :] = torch.tensor([*before, *row])
        mask[n, width - len(row) - len(before) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("chunk", [64, 8])
def test_logits_are_those_of_the_text_in_the_prompt(
    host_model: PreTrainedModel, chunk: int
) -> None:
    """In fp32 within 1e-5, with padding on the left, however many pieces read."""
    want = host_model(**padded(ROWS, [*MARKER, *REFERENCE])).logits
    plain = host_model(**padded(ROWS, [])).logits
    with attach(
        host_model, shelf(host_model), tokenizer=words(), config=SETTINGS, chunk_tokens=chunk
    ):
        got = host_model(**padded(ROWS, [])).logits
    for n, row in enumerate(ROWS):
        torch.testing.assert_close(got[n, -len(row) :], want[n, -len(row) :], atol=1e-5, rtol=1e-5)
        assert (plain[n, -len(row) :] - want[n, -len(row) :]).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_are_those_of_the_text_in_the_prompt(
    host_model: PreTrainedModel, implementation: str, cache: str
) -> None:
    if host_model.config.model_type == "gemma2" and implementation == "sdpa":
        pytest.skip("sdpa knows no softcap")
    host_model.set_attn_implementation(implementation)
    options = dict(
        max_new_tokens=24, do_sample=False, eos_token_id=None, output_logits=True,
        suppress_tokens=[0, 1, 2],  # a text of these alone finds nothing
        return_dict_in_generate=True, cache_implementation=None if cache == "dynamic" else cache,
    )  # fmt: skip
    before = padded(ROWS, [*MARKER, *REFERENCE])
    want = host_model.generate(**before, **options)
    with attach(
        host_model, shelf(host_model), tokenizer=words(), config=SETTINGS, chunk_tokens=8
    ) as memory:
        got = host_model.generate(**padded(ROWS, []), **options)
    assert torch.equal(got.sequences[:, -24:], want.sequences[:, -24:])
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5
    )
    assert isinstance(got.past_key_values, StaticCache) == (cache == "static")
    # three pieces of 23, two of 14, and two refreshes of each row after 8 and 16 tokens
    assert len(memory.used) == 3 + 2 + 4
    assert all(record.injected == 1 for record in memory.used)


def test_prompt_in_chunks_and_continued_cache(make_host: MakeHost) -> None:
    """A prompt that is prefilled in parts, and one whose beginning is in the cache already."""
    model = make_host("llama")
    ids = torch.tensor([ROWS[0]])
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, suppress_tokens=[0, 1, 2])
    with attach(model, shelf(model), tokenizer=words(), config=SETTINGS, chunk_tokens=8) as memory:
        want = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), want)
        first = model.generate(ids, return_dict_in_generate=True, **options)
        longer = torch.cat([first.sequences, ids[:, :6]], dim=1)
        again = model.generate(longer, past_key_values=first.past_key_values, **options)
        torch.testing.assert_close(again, model.generate(longer, **options))
        assert memory.stats.refreshes == 10

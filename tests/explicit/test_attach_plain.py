"""Where there is no memory, the decoder is itself, bit for bit; and afterwards always."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from tiny_memories import Shelf, TinyHit, make_shelf, sharp, words, write
from transformers import PreTrainedModel

from strata.explicit.attach import AttachError, attach
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig

MakeHost = Callable[..., PreTrainedModel]
SETTINGS = ExplicitMemoryConfig(tokens_per_head=3, reference_tokens=16)
IDS = torch.randint(5, 96, (2, 21), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
GENERATE = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)

pytestmark = pytest.mark.filterwarnings("ignore:no memory was injected")


@pytest.fixture
def host_model(host_model: PreTrainedModel) -> PreTrainedModel:
    return sharp(host_model)


@pytest.fixture
def make_host(make_host: MakeHost) -> MakeHost:
    return lambda name, **changes: sharp(make_host(name, **changes))


def everything(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits and tokens, with padding, with and without a cache."""
    with torch.no_grad():
        return [
            model(**INPUTS).logits,
            model(input_ids=IDS, use_cache=False).logits,
            model.generate(**INPUTS, **GENERATE),
            model.generate(**INPUTS, use_cache=False, **GENERATE),
            model.generate(**INPUTS, cache_implementation="static", **GENERATE),
            model.generate(**INPUTS, num_beams=3, **GENERATE),
        ]


def state(model: PreTrainedModel) -> list[object]:
    """What attach touches."""
    return [
        {name for module in model.modules() for name in vars(module)},
        dict(model.config.to_dict()),
        dict(model.generation_config.to_dict()),
        [a.config._attn_implementation for a in Host(model).attentions],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        model.generate.__func__,
        model.prepare_inputs_for_generation.__func__,
        [module.training for module in model.modules()],
    ]


def test_nothing_found_is_the_plain_model(host_model: PreTrainedModel) -> None:
    before, was = everything(host_model), state(host_model)
    nothing = make_shelf(host_model, Host(host_model).memory_shape(SETTINGS), lambda query: [])
    with attach(host_model, nothing, tokenizer=words(), config=SETTINGS, chunk_tokens=8) as memory:
        during = everything(host_model)
    assert memory.used and not any(record.injected for record in memory.used)
    assert nothing.asked
    after = everything(host_model)
    for a, b, c in zip(before, during, after, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert state(host_model) == was


def test_memory_leaves_nothing_behind(host_model: PreTrainedModel) -> None:
    """Also when the block, or a call in it, ends in an exception."""
    before, was = everything(host_model), state(host_model)
    shelf = make_shelf(host_model, Host(host_model).memory_shape(SETTINGS))
    with attach(host_model, shelf, tokenizer=words(), config=SETTINGS, chunk_tokens=8):
        during = everything(host_model)
    assert not any(torch.equal(a, b) for a, b in zip(before[:2], during[:2], strict=True))
    assert state(host_model) == was

    def stop(query: str) -> list[TinyHit]:
        raise KeyboardInterrupt

    shelf.choose = stop
    with (
        pytest.raises(KeyboardInterrupt),
        attach(host_model, shelf, tokenizer=words(), config=SETTINGS),
    ):
        host_model.generate(**INPUTS, **GENERATE)
    assert state(host_model) == was
    for a, b in zip(before, everything(host_model), strict=True):
        assert torch.equal(a, b)


def test_rows_and_pieces_without_memory_are_plain(host_model: PreTrainedModel) -> None:
    """A row of a batch, and the text before the first piece that has memory."""
    plain = host_model(**INPUTS).logits
    last = words().decode(IDS[0, -8:])
    shelf = make_shelf(host_model, Host(host_model).memory_shape(SETTINGS))
    shelf.choose = lambda query: [TinyHit("1", 1.0, "one")] if query == last else []
    with attach(host_model, shelf, tokenizer=words(), config=SETTINGS, chunk_tokens=8):
        got = host_model(**INPUTS).logits
    assert torch.equal(got[1], plain[1])
    assert torch.equal(got[0, :-8], plain[0, :-8])
    assert (got[0, -8:] - plain[0, -8:]).abs().amax(-1).min() > 1e-4


def test_stored_memories_are_never_written_to(host_model: PreTrainedModel) -> None:
    shelf = make_shelf(host_model, Host(host_model).memory_shape(SETTINGS))
    copies = {
        name: [x.clone() for x in vars(memory).values()] for name, memory in shelf.memories.items()
    }
    with attach(host_model, shelf, tokenizer=words(), config=SETTINGS, chunk_tokens=8):
        everything(host_model)
    for name, memory in shelf.memories.items():
        for now, then in zip(vars(memory).values(), copies[name], strict=True):
            assert torch.equal(now, then)


def test_attaching_twice_is_refused(make_host: MakeHost) -> None:
    model = make_host("llama")
    shelf = make_shelf(model, Host(model).memory_shape(SETTINGS))
    with attach(model, shelf, tokenizer=words(), config=SETTINGS):
        with (
            pytest.raises(AttachError, match="attached to this model already"),
            attach(model, shelf, tokenizer=words(), config=SETTINGS),
        ):
            pass
        assert "generate" in vars(model)
    assert "generate" not in vars(model)


def test_two_models_at_once(make_host: MakeHost) -> None:
    """Each reads its own memories, in turn and in two threads."""
    models = [make_host("llama"), make_host("qwen3")]
    shelves = [make_shelf(model, Host(model).memory_shape(SETTINGS)) for model in models]
    alone = []
    for model, shelf in zip(models, shelves, strict=True):
        with attach(model, shelf, tokenizer=words(), config=SETTINGS, chunk_tokens=8):
            alone.append(model.generate(**INPUTS, **GENERATE))
    together: dict[int, torch.Tensor] = {}

    def run(n: int) -> None:
        together[n] = models[n].generate(**INPUTS, **GENERATE)

    options = dict(tokenizer=words(), config=SETTINGS, chunk_tokens=8)
    with attach(models[0], shelves[0], **options), attach(models[1], shelves[1], **options):
        threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


def test_instance_methods_of_ones_own_come_back(make_host: MakeHost) -> None:
    model = make_host("llama")
    shelf = make_shelf(model, Host(model).memory_shape(SETTINGS))
    original = model.generate
    calls = []

    def mine(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)

    model.generate = mine
    with attach(model, shelf, tokenizer=words(), config=SETTINGS):
        model.generate(input_ids=IDS, **GENERATE)
    assert model.generate is mine
    assert calls == [1]


def test_training_mode_and_gradients(make_host: MakeHost) -> None:
    """A model in training mode stays in it, and gradients flow through memory rows."""
    model = make_host("llama", attention_dropout=0.0).train()
    shape = Host(model).memory_shape(SETTINGS)
    memory = write(model, [7, 8, 9, 10, 11], shape)
    memory.values_nstd.requires_grad_(True)
    shelf = Shelf({"a": memory}, lambda query: [TinyHit("a", 1.0, "a")])
    with attach(model, shelf, tokenizer=words(), config=SETTINGS):
        assert model.training
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert memory.values_nstd.grad is not None
    assert memory.values_nstd.grad[:, :, :3].abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())

"""Chunks of a training batch read memories: what attach computes, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from tiny_memories import Shelf, TinyHit, sharp, words
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import strata
from strata.explicit import reading as reading_module
from strata.explicit.attach import AttachError, attach
from strata.explicit.attach.pieces import Query
from strata.explicit.encode import Encoder
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.reading import Documents, Reading
from strata.explicit.settings import ExplicitMemoryConfig
from strata.ops.memory_attention import memory_attention

MakeHost = Callable[..., PreTrainedModel]
CHUNK, REACH = 8, 3
SETTINGS = ExplicitMemoryConfig(tokens_per_head=3, reference_tokens=16)
SEQUENTIAL = SETTINGS.model_copy(update={"positions": "sequential"})
FEW_HEADS = ExplicitMemoryConfig(
    layers=(0, 1, 3), heads={0: (1,), 1: (0, 1), 3: (0,)}, tokens_per_head=3, reference_tokens=16
)
IDS = torch.randint(5, 96, (2, 5 * CHUNK), generator=torch.Generator().manual_seed(1))
# Chunks with a reference of their own, the same one twice, and none within reach.
OWN = torch.tensor([[0, 2, -1, 1, 1], [-1, -1, 3, -1, -1]])

pytestmark = pytest.mark.filterwarnings("ignore:no memory was injected")  # attach says so


def texts() -> list[str]:
    """References of 5 to 14 words, one shorter than what a head may keep."""
    generator = torch.Generator().manual_seed(2)
    lengths = (2, 8, 14, 11)
    return [
        " ".join(f"w{n}" for n in torch.randint(5, 96, (length,), generator=generator))
        for length in lengths
    ]


@pytest.fixture
def host_model(host_model: PreTrainedModel) -> PreTrainedModel:
    return sharp(host_model)


@pytest.fixture
def make_host(make_host: MakeHost) -> MakeHost:
    return lambda name="llama", **changes: sharp(make_host(name, **changes))


def reader(
    model: PreTrainedModel, config: ExplicitMemoryConfig = SETTINGS, *, query: Query = "own"
) -> tuple[Encoder, Reading]:
    tokenizer = words()
    return Encoder(Host(model), tokenizer, config), Reading(
        model, tokenizer, config, chunk_tokens=CHUNK, reach=REACH, query=query
    )


def loss_of(
    model: PreTrainedModel,
    *,
    memories: Memories | None = None,
    rows: slice = slice(None),
    config: ExplicitMemoryConfig = SETTINGS,
) -> Tensor:
    """Summed cross-entropy of a batch that reads; its memories are encoded within."""
    encoder, reading = reader(model, config)
    if memories is None:
        memories = encoder.encode(texts(), with_grad=True)
    with reading(memories, OWN[rows]):
        return cross_entropy(model, IDS[rows])


def cross_entropy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {n: g.to_dense() if g.is_sparse else g for n, g in found.items()}


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == want.keys()
    for name, grad in want.items():
        scale = float(grad.abs().max()) + 1e-6
        torch.testing.assert_close(found[name], grad, atol=tolerance * scale, rtol=0, msg=name)


def attached(
    model: PreTrainedModel, row: int, config: ExplicitMemoryConfig, *, query: Query = "own"
) -> Tensor:
    """Logits of one row by attach, whose source finds what a chunk's text asks for."""
    memories = Encoder(Host(model), words(), config).encode(texts())
    tokenizer = words()
    found: dict[str, list[TinyHit]] = {}
    for chunk in range(OWN.shape[1]):
        ids = IDS[row, chunk * CHUNK : (chunk + 1) * CHUNK]
        own = [int(n) for n in OWN[row, max(0, chunk - REACH + 1) : chunk + 1] if n >= 0]
        if config.positions == "sequential":
            own.reverse()  # the chunk's own is the best hit
        # attach takes each memory once; a reference read twice stands there twice
        names = [f"{n}.{place}" for place, n in enumerate(own)]
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
        found[text] = [TinyHit(name, 1.0, name) for name in names]
    shelf = Shelf(
        {f"{n}.{place}": memories[[n]] for n in range(4) for place in range(REACH)},
        lambda query: found[query.strip()],
    )
    with (
        torch.no_grad(),
        attach(
            model,
            shelf,
            tokenizer=tokenizer,
            config=config,
            chunk_tokens=CHUNK,
            prompt_query=query,
        ),
    ):
        return model(input_ids=IDS[row : row + 1]).logits[0]


def test_places_that_nobody_reads_are_left_out(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_host()
    config = ExplicitMemoryConfig(selector="all", reference_tokens=16)
    encoder, reading = reader(model, config)
    memories = encoder.encode(texts()[:2])  # of 2 and 8 tokens
    assert memories.keys_nstd.shape[2] == 16
    places: list[int] = []

    def spy(*states: Tensor, **options: object) -> Tensor:
        places.append(states[3].shape[3])
        return memory_attention(*states, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(reading_module, "memory_attention", spy)
    own_bc, ids = torch.tensor([[1], [0]]), IDS[:, :CHUNK]
    with torch.no_grad(), reading(memories, own_bc):
        got = model(input_ids=ids).logits
    # The marker stands in every layer, memories in the first half of them.
    assert set(places) == {len(reading.marker_ids), len(reading.marker_ids) + 8}
    monkeypatch.setattr(reading_module, "filled", lambda *states: states)
    with torch.no_grad(), reading(memories, own_bc):
        torch.testing.assert_close(model(input_ids=ids).logits, got, atol=1e-5, rtol=1e-5)
    assert max(places) == len(reading.marker_ids) + REACH * 16


@pytest.mark.parametrize("config", [SETTINGS, FEW_HEADS], ids=["first half", "few heads"])
def test_logits_are_those_of_attach(
    host_model: PreTrainedModel, config: ExplicitMemoryConfig
) -> None:
    if config is FEW_HEADS and any(Host(host_model).is_sliding(n) for n in config.layers or ()):
        config = config.model_copy(update={"layers": (0, 2), "heads": {0: (1,), 2: (0,)}})
    encoder, reading = reader(host_model, config)
    plain = host_model(input_ids=IDS).logits
    with torch.no_grad(), reading(encoder.encode(texts()), OWN):
        got = host_model(input_ids=IDS).logits
    for row in range(2):
        want = attached(host_model, row, config)
        torch.testing.assert_close(got[row], want, atol=1e-5, rtol=1e-5)
        assert (plain[row] - want).abs().max() > 1e-2
    # of the second row the first two chunks have nothing to read
    first = got[1, : 2 * CHUNK], plain[1, : 2 * CHUNK]
    if host_model.config._attn_implementation == "sdpa":
        assert torch.equal(*first)
    else:
        torch.testing.assert_close(*first, atol=1e-5, rtol=1e-5)
    assert torch.equal(host_model(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("config", [SEQUENTIAL, FEW_HEADS], ids=["first half", "few heads"])
def test_sequential_positions_are_those_of_attach(
    host_model: PreTrainedModel, config: ExplicitMemoryConfig
) -> None:
    if config is FEW_HEADS:
        if any(Host(host_model).is_sliding(n) for n in config.layers or ()):
            config = config.model_copy(update={"layers": (0, 2), "heads": {0: (1,), 2: (0,)}})
        config = config.model_copy(update={"positions": "sequential"})
    encoder, reading = reader(host_model, config)
    with torch.no_grad(), reading(encoder.encode(texts()), OWN):
        got = host_model(input_ids=IDS).logits
    parallel = config.model_copy(update={"positions": "parallel"})
    for row in range(2):
        want = attached(host_model, row, config)
        torch.testing.assert_close(got[row], want, atol=1e-5, rtol=1e-5)
        # Of the second row no chunk reads two, and one interval is the same either way.
        apart = (attached(host_model, row, parallel) - want).abs().max()
        assert apart > 1e-2 if row == 0 else apart < 1e-5


def test_gradients_flow_through_sequential_positions(make_host: MakeHost) -> None:
    model = make_host().double()
    directional(model, lambda: loss_of(model, config=SEQUENTIAL), ["layers.0", "layers.1"])


def test_places_of_nothing_take_no_interval(make_host: MakeHost) -> None:
    model = make_host()
    encoder, reading = reader(model, SEQUENTIAL)
    memories = encoder.encode(texts())

    def logits(*read: int) -> Tensor:
        with torch.no_grad(), reading.of_chunks(memories, torch.tensor([[read], [read]])):
            return model(IDS).logits

    torch.testing.assert_close(logits(-1, 2, -1, 0), logits(2, 0), atol=1e-6, rtol=1e-6)
    assert float((logits(2, 0) - logits(0, 2)).abs().max()) > 1e-3


def test_what_the_chunk_before_asked_for_is_read(make_host: MakeHost) -> None:
    """As by attach, and so the first chunk reads nothing."""
    model = make_host()
    for config in (SETTINGS, SEQUENTIAL):
        encoder, reading = reader(model, config, query="previous")
        with torch.no_grad(), reading(encoder.encode(texts()), OWN):
            got = model(input_ids=IDS).logits
        for row in range(2):
            want = attached(model, row, config, query="previous")
            torch.testing.assert_close(got[row], want, atol=1e-5, rtol=1e-5)
        assert float((got[0] - attached(model, 0, config)).abs().max()) > 1e-2
        plain = model(input_ids=IDS).logits
        assert torch.equal(got[0, :CHUNK], plain[0, :CHUNK])
        assert torch.equal(got[1, : 3 * CHUNK], plain[1, : 3 * CHUNK])


@pytest.mark.parametrize("config", [SETTINGS, SEQUENTIAL], ids=["parallel", "sequential"])
def test_a_window_drops_the_marker_where_it_would_drop_text(
    make_host: MakeHost, config: ExplicitMemoryConfig
) -> None:
    model = make_host("gemma3_text", sliding_window=32)
    encoder, reading = reader(model, config)
    with torch.no_grad(), reading(encoder.encode(texts()), OWN):
        got = model(input_ids=IDS).logits
    for row in range(2):
        torch.testing.assert_close(got[row], attached(model, row, config), atol=1e-5, rtol=1e-5)


def test_a_short_last_chunk(make_host: MakeHost) -> None:
    model = make_host()
    encoder, reading = reader(model)
    with torch.no_grad():
        memories = encoder.encode(texts())
        with reading(memories, OWN):
            want = model(input_ids=IDS).logits
            got = model(input_ids=IDS[:, :-5]).logits
    torch.testing.assert_close(got, want[:, :-5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("query", ["own", "previous"])
def test_documents_of_a_row_read_their_own(make_host: MakeHost, query: Query) -> None:
    """The second document begins within the second chunk, whose reference is the first's."""
    model = make_host()
    encoder, reading = reader(model, query=query)
    border = CHUNK + 5
    of_tokens = (torch.arange(5 * CHUNK) >= border).long()[None]
    own, of_chunks = torch.tensor([[0, 2, 3, -1, 1]]), torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.cat([torch.arange(border), torch.arange(5 * CHUNK - border)])[None]
    inputs = dict(input_ids=IDS[:1], position_ids=positions, use_cache=False)
    with torch.no_grad():
        memories = encoder.encode(texts())
        with reading(memories, own, documents=Documents(of_tokens, of_chunks)):
            got = model(**inputs).logits
        with reading(memories, torch.tensor([[0, 2, -1, -1, -1]])):
            first = model(**inputs).logits
        with reading(memories, torch.tensor([[-1, -1, 3, -1, 1]])):
            second = model(**inputs).logits
        plain = model(**inputs).logits
    torch.testing.assert_close(got[:, :border], first[:, :border], atol=1e-5, rtol=1e-5)
    later = 3 if query == "previous" else 2
    rest = slice(later * CHUNK, None)
    torch.testing.assert_close(got[:, rest], second[:, rest], atol=1e-5, rtol=1e-5)
    # between the border and its first own reference a document reads nothing
    between = slice(border, later * CHUNK)
    assert torch.equal(got[:, between], plain[:, between])


def directional(model: PreTrainedModel, loss: Callable[[], Tensor], names: Sequence[str]) -> None:
    """The gradient along itself, beside a central difference."""
    loss().backward()
    grads = gradients(model)
    chosen = {
        n: p for n, p in model.named_parameters() if n in grads and any(part in n for part in names)
    }
    norm = torch.stack([grads[n].norm() for n in chosen]).norm()
    assert norm > 1e-3
    step = 1e-3
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, weight in chosen.items():
                weight.add_(grads[name] / norm, alpha=sign * step)
            sides.append(float(loss()))
            for name, weight in chosen.items():
                weight.sub_(grads[name] / norm, alpha=sign * step)
    difference = (sides[0] - sides[1]) / (2 * step)
    # fp32 loss of about 400 has steps of 3e-5; selection of tokens must not change within a step
    assert difference == pytest.approx(float(norm), rel=0.02, abs=0.05)


def test_gradients_flow_through_text_and_references(make_host: MakeHost) -> None:
    model = make_host().double()
    for names in (["layers.0"], ["layers.1.self_attn"], ["layers.3"], ["embed"]):
        directional(model, lambda: loss_of(model), names)


def test_gradients_reach_a_model_that_only_encodes(make_host: MakeHost) -> None:
    """Through memories alone: another copy of the model reads."""
    encodes, reads = make_host(), make_host().requires_grad_(False)
    encoder, _ = reader(encodes)

    def loss() -> Tensor:
        return loss_of(reads, memories=encoder.encode(texts(), with_grad=True))

    directional(encodes, loss, ["k_proj", "v_proj"])
    loss().backward()
    touched = {name.split(".")[2] for name in gradients(encodes) if "layers" in name}
    assert touched == {"0", "1"}  # the first half, and no query of its last layer
    assert not gradients(reads)


@pytest.mark.parametrize("where", ["inside", "after"])
def test_activation_checkpointing_changes_no_gradient(make_host: MakeHost, where: str) -> None:
    model = make_host().train()
    encoder, reading = reader(model)

    def step() -> dict[str, Tensor]:
        memories = encoder.encode(texts(), with_grad=True)
        with reading(memories, OWN):
            loss = cross_entropy(model, IDS)
            if where == "inside":
                loss.backward()
        if where == "after":
            loss.backward()
        return gradients(model)

    want = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    funcs = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert_same(step(), want, 1e-5)
    assert funcs == [layer._gradient_checkpointing_func for layer in model.model.layers]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(AttachError, match="use_reentrant=False"):
        step()


def test_accumulating_is_one_larger_batch(make_host: MakeHost) -> None:
    model = make_host()
    loss_of(model).backward()
    want = gradients(model)
    for row in range(2):
        loss_of(model, rows=slice(row, row + 1)).backward()
    assert_same(gradients(model), want, 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_beside_memory_layers(make_host: MakeHost, checkpointing: bool) -> None:
    """One table serves text and references; its uses are summed."""
    model = make_host()
    config = strata.MemoryLayerConfig(
        layers=(0, 2), num_heads=2, top_k=4, num_half_keys=8, key_dim=8
    )
    model = strata.install(model, config).train()
    for table in strata.layers.value_tables(model).values():
        nn.init.normal_(table.weight, std=0.3)
    if checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    encoder, _ = reader(model)
    with torch.no_grad():
        got = loss_of(model, memories=encoder.encode(texts()))
        wanted = torch.stack([attached(model.eval(), row, SETTINGS) for row in range(2)])
    model.train()
    want = F.cross_entropy(wanted[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)
    loss_of(model, memories=encoder.encode(texts())).backward()
    alone = gradients(model)
    loss_of(model).backward()
    both = gradients(model)
    name = next(n for n in both if "memory_values" in n)
    rows = both[name].abs().sum(1) > 0
    assert rows.sum() > (alone[name].abs().sum(1) > 0).sum() - 1
    assert (both[name] - alone[name]).abs().max() > 1e-4
    directional(model, lambda: loss_of(model), ["memory_values"])


def test_autocast_in_bf16(make_host: MakeHost) -> None:
    model = make_host("qwen3")  # whose key norm leaves fp32 keys beside bf16 values
    loss_of(model).backward()
    want = gradients(model)
    exact = float(loss_of(model).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    assert float(loss.detach()) == pytest.approx(exact, rel=0.02)
    loss.backward()
    found = gradients(model)
    assert found.keys() == want.keys()
    for name, grad in want.items():
        cosine = F.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0)
        assert cosine > 0.9, name


def test_compiled_it_is_the_same_and_compiles_once(make_host: MakeHost) -> None:
    model = make_host()
    encoder, reading = reader(model)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(len(inputs))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    losses = []
    for seed in range(3):
        ids = torch.randint(5, 96, IDS.shape, generator=torch.Generator().manual_seed(seed))
        for forward in (model, compiled):
            memories = encoder.encode(texts(), with_grad=True)
            with reading(memories, OWN):
                loss = cross_entropy(forward, ids)
            loss.backward()
            losses.append((float(loss.detach()), gradients(model)))
    for eager, ours in zip(losses[::2], losses[1::2], strict=True):
        assert ours[0] == pytest.approx(eager[0], rel=1e-6)
        assert_same(ours[1], eager[1], 1e-4)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_nothing_is_left_behind(make_host: MakeHost) -> None:
    model = make_host()
    encoder, reading = reader(model)
    memories = encoder.encode(texts())
    plain = model(input_ids=IDS).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    for block in (nullcontext(), pytest.raises(RuntimeError, match="inside")):
        with block, reading(memories, OWN):
            model(input_ids=IDS)
            if not isinstance(block, nullcontext):
                raise RuntimeError("inside")
        assert torch.equal(model(input_ids=IDS).logits, plain)
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_no_memories_at_all(make_host: MakeHost) -> None:
    model = make_host()
    encoder, reading = reader(model)
    plain = model(input_ids=IDS).logits
    nothing = torch.full_like(OWN, -1)
    for memories in (encoder.encode(texts()), encoder.encode(texts())[:0]):
        with reading(memories, nothing):
            assert torch.equal(model(input_ids=IDS).logits, plain)


def test_what_does_not_fit_is_refused(make_host: MakeHost) -> None:
    model = make_host()
    encoder, reading = reader(model)
    memories = encoder.encode(texts())
    with pytest.raises(AttachError, match="reach must be at least 1"):
        Reading(model, words(), SETTINGS, reach=0)
    with pytest.raises(AttachError, match="there are 4"), reading(memories, OWN + 1):
        pass
    fewer = SETTINGS.model_copy(update={"tokens_per_head": 2})
    other = Encoder(Host(model), words(), fewer).encode(texts())
    with pytest.raises(AttachError, match="same settings"), reading(other, OWN):
        pass
    whole = Documents(torch.zeros_like(IDS), torch.zeros_like(OWN))
    with (
        pytest.raises(AttachError, match="set positions to parallel"),
        reader(model, SEQUENTIAL)[1](memories, OWN, documents=whole),
    ):
        pass
    short = Documents(torch.zeros(2, 4 * CHUNK), torch.zeros_like(OWN))
    with pytest.raises(AttachError, match="do not fit"), reading(memories, OWN, documents=short):
        pass
    with reading(memories, OWN):
        with pytest.raises(AttachError, match="2 rows of 5 chunks"):
            model(input_ids=IDS[:1])
        with pytest.raises(AttachError, match="2 rows of 5 chunks"):
            model(input_ids=IDS[:, : 4 * CHUNK])
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    with reading(memories, OWN), pytest.raises(AttachError, match="use_cache=False"):
        model(input_ids=IDS, past_key_values=cache)
    dropping = make_host(attention_dropout=0.1).train()
    encoder, reading = reader(dropping)
    with (
        reading(encoder.encode(texts()), OWN),
        pytest.raises(AttachError, match="attention_dropout to 0"),
    ):
        dropping(input_ids=IDS)


def test_chunks_may_name_what_they_read(make_host: MakeHost) -> None:
    """One list for a whole row, one for each chunk, and tokens of a chunk that read a part."""
    model = make_host()
    encoder, reading = reader(model)
    memories = encoder.encode(texts())
    index = torch.tensor([[[0, 3]], [[2, -1]]])
    held = torch.zeros(2, 5, CHUNK, 2, dtype=torch.bool)
    held[:, :, :3] = True

    def logits(index_bcr: Tensor, held_bcnr: Tensor | None = None) -> Tensor:
        with torch.no_grad(), reading.of_chunks(memories, index_bcr, held_bcnr=held_bcnr):
            return model(IDS).logits

    whole, part = logits(index), logits(index, held)
    torch.testing.assert_close(logits(index.expand(-1, 5, -1)), whole)
    torch.testing.assert_close(part[:, :3], whole[:, :3])
    assert float((part - whole)[:, 3:].abs().max()) > 1e-2
    torch.testing.assert_close(logits(index.expand(-1, 5, -1), held), part)
    with pytest.raises(AttachError, match="2 rows of 4 chunks"):
        logits(index.expand(-1, 4, -1))
    with pytest.raises(AttachError, match="there are 4"):
        logits(index + 1)

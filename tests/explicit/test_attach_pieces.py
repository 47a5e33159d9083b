"""Which piece reads what, against attention written out in loops of float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_memories import Loops, by_sum, make_shelf, reads, sharp, words
from transformers import PreTrainedModel

from strata.explicit.attach import attach, presets, reader
from strata.explicit.attach.pieces import (
    Piece,
    generated_piece,
    prompt_pieces,
    stretches,
    with_first_generated,
)
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig

MakeHost = Callable[..., PreTrainedModel]
RNG = torch.Generator().manual_seed(8)
ROWS = [torch.randint(5, 96, (n,), generator=RNG).tolist() for n in (29, 22, 7)]

pytestmark = pytest.mark.filterwarnings("ignore:no memory was injected")


@pytest.fixture
def host_model(host_model: PreTrainedModel) -> PreTrainedModel:
    return sharp(host_model)


@pytest.fixture
def make_host(make_host: MakeHost) -> MakeHost:
    return lambda name, **changes: sharp(make_host(name, **changes))


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(3, 29, dtype=torch.long), torch.zeros(3, 29, dtype=torch.long)
    for n, row in enumerate(ROWS):
        where = slice(29 - len(row), None) if side == "left" else slice(0, len(row))
        ids[n, where], mask[n, where] = torch.tensor(row), 1
    return ids, mask


def check(
    model: PreTrainedModel,
    config: ExplicitMemoryConfig,
    preset: presets.Preset = presets.PAPER,
    side: str = "left",
) -> None:
    """Rows with different memories and counts, in pieces of 8, against the loops."""
    shape = Host(model).memory_shape(config)
    shelf = make_shelf(model, shape)
    ids, mask = batch(side)
    read = [reads(r, len(r), chunk=8, choose=by_sum, tokenizer=words()) for r in ROWS]
    counts = {len(names) for row in read for names in row}
    assert counts == {0, 1, 2, 3}
    with attach(
        model, shelf, tokenizer=words(), config=config, preset=preset, chunk_tokens=8
    ) as memory:
        # with gradients all in one softmax, without them two attentions merged
        got = model(input_ids=ids, attention_mask=mask).logits
        with torch.no_grad():
            merged = model(input_ids=ids, attention_mask=mask).logits
            unpadded = [model(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    loops = Loops(
        model, shape, shelf.memories, config.reference_tokens,
        preset.positions or config.positions, preset.temperature, preset.scale,
    )  # fmt: skip
    for n, row in enumerate(ROWS):
        mine = got[n][mask[n] == 1]
        want = loops.logits(row, read[n])
        for logits in (mine, merged[n][mask[n] == 1], unpadded[n]):
            torch.testing.assert_close(logits, want, atol=2e-5, rtol=2e-5)
        without = loops.logits(row, [[]] * len(row))
        assert (want - without).abs().max() > 1e-2
        for record in (r for r in memory.used if r.row == n and r.call < 2):
            assert [m.id for m in record.memories] == read[n][record.start]
            assert record.query == words().decode(row[record.start : record.stop])


SETTINGS = ExplicitMemoryConfig(tokens_per_head=4, reference_tokens=16)


def test_every_family(host_model: PreTrainedModel) -> None:
    check(host_model, SETTINGS)


def test_rows_padded_on_the_right(make_host: MakeHost) -> None:
    """Their pieces do not share borders, and none moves."""
    check(make_host("llama"), SETTINGS, side="right")
    check(make_host("gemma3_text"), SETTINGS, side="right")


@pytest.mark.parametrize("heads", [(1,), {0: (0,), 1: (0, 1), 3: (1,)}, {0: (), 2: (0,)}], ids=str)
def test_any_heads_hold_memory(make_host: MakeHost, heads: object) -> None:
    config = ExplicitMemoryConfig(
        layers=(0, 1, 2, 3), heads=heads, tokens_per_head=4, reference_tokens=16
    )
    check(make_host("llama"), config)


def test_large_memories_layer_by_layer(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several megabytes; small ones are put in place in all layers at once."""
    monkeypatch.setattr(reader, "_AT_ONCE_BYTES", 0)
    check(make_host("llama"), SETTINGS)
    check(make_host("gemma3_text"), SETTINGS)


def test_sequential_positions(host_model: PreTrainedModel) -> None:
    check(host_model, SETTINGS, presets.Preset(positions="sequential"))


def test_memories_stand_as_their_settings_say(make_host: MakeHost) -> None:
    """Unless the preset says otherwise."""
    apart = SETTINGS.model_copy(update={"positions": "sequential"})
    check(make_host("llama"), apart)
    check(make_host("llama"), apart, presets.Preset(positions="parallel"))


def test_pieces_of_a_prompt_may_ask_for_those_behind_them(make_host: MakeHost) -> None:
    model = make_host("llama")
    shelf = make_shelf(model, Host(model).memory_shape(SETTINGS))
    ids, mask = batch("right")
    with attach(
        model, shelf, tokenizer=words(), config=SETTINGS, chunk_tokens=8, prompt_query="previous"
    ):
        got = model(input_ids=ids, attention_mask=mask).logits
    loops = Loops(model, Host(model).memory_shape(SETTINGS), shelf.memories, 16)
    for n, row in enumerate(ROWS):
        read = reads(
            row, len(row), chunk=8, choose=by_sum, tokenizer=words(), query="previous"
        )  # fmt: skip
        assert not any(read[: len(row) % 8]) and (len(row) < 8 or any(read))
        torch.testing.assert_close(
            got[n][mask[n] == 1], loops.logits(row, read), atol=2e-5, rtol=2e-5
        )


def test_a_window_drops_the_marker(make_host: MakeHost) -> None:
    """A sliding layer sees the marker as it would see text at that place: for a while."""
    for name in ("gemma2", "gemma3_text"):
        check(make_host(name, sliding_window=24), SETTINGS)


def test_a_prompt_does_not_depend_on_its_batch(make_host: MakeHost) -> None:
    """Alone, padded left, padded right, and with position ids of the caller's own."""
    model = make_host("llama")
    shelf = make_shelf(model, Host(model).memory_shape(SETTINGS))
    with attach(model, shelf, tokenizer=words(), config=SETTINGS, chunk_tokens=8):
        alone = model(input_ids=torch.tensor([ROWS[1]])).logits[0]
        for side in ("left", "right"):
            ids, mask = batch(side)
            got = model(input_ids=ids, attention_mask=mask).logits[1][mask[1] == 1]
            torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)
        positions = (mask.cumsum(1) - 1).clamp(min=0) + 40
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[1]
        torch.testing.assert_close(got[mask[1] == 1], alone, atol=1e-5, rtol=1e-5)


def test_bf16_reads_in_bf16(make_host: MakeHost) -> None:
    """Within what rounding scores and weights to 8 bits costs."""
    model = make_host("llama").bfloat16()
    shelf = make_shelf(model, Host(model).memory_shape(SETTINGS))
    ids = torch.tensor([ROWS[0]])
    with attach(model, shelf, tokenizer=words(), config=SETTINGS, chunk_tokens=8):
        got = model(input_ids=ids).logits
    assert got.dtype == torch.bfloat16
    wide = model.float()
    with attach(wide, shelf, tokenizer=words(), config=SETTINGS, chunk_tokens=8):
        want = wide(input_ids=ids).logits
    assert (got - want).abs().max() < 0.02 * want.abs().max()


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 12))
def test_prompt_pieces_tile_the_prompt_from_its_end(first: int, length: int, chunk: int) -> None:
    end = first + length
    pieces = prompt_pieces(first, end, chunk)
    assert [n for p in pieces for n in range(p.start, p.stop)] == list(range(first, end))
    assert all(p.query == (p.start, p.stop) for p in pieces)
    assert all(p.stop - p.start == chunk for p in pieces[1:])
    assert (end - pieces[-1].stop) == 0 and pieces[0].start == first
    late = prompt_pieces(first, end, chunk, query="previous")
    assert [(p.start, p.stop) for p in late] == [(p.start, p.stop) for p in pieces]
    assert [p.query for p in late] == [(first, first), *(p.query for p in pieces[:-1])]


def test_the_first_generated_tokens_read_what_the_prompt_s_end_found() -> None:
    own, late = (prompt_pieces(3, 10, 4, query=query) for query in ("own", "previous"))
    assert with_first_generated(own, 4) == [Piece((3, 6), 3, 6), Piece((6, 10), 6, 14)]
    assert with_first_generated(late, 4, query="previous") == [
        Piece((3, 3), 3, 6), Piece((3, 6), 6, 10), Piece((6, 10), 10, 14),
    ]  # fmt: skip


def test_stretches_are_cut_at_every_row_s_borders() -> None:
    a = [Piece((0, 2), 0, 2), Piece((2, 6), 2, 6)]
    b = [Piece((1, 4), 1, 4)]
    assert stretches([a, b], 6) == [
        (0, 1, [a[0], None]),
        (1, 2, [a[0], b[0]]),
        (2, 4, [a[1], b[0]]),
        (4, 6, [a[1], None]),
    ]
    assert generated_piece(3, 10, 2, 4, 1) == Piece((13, 17), 18, 22)
    assert generated_piece(3, 10, 1, 64, 64) == Piece((3, 10), 74, 138)

"""`generate` while attached: every way to generate, refreshed every so many tokens."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_memories import Loops, Shelf, TinyHit, by_sum, make_shelf, reads, sharp, words
from transformers import PreTrainedModel, TextIteratorStreamer

from strata.explicit.attach import AttachError, RetrievalError, attach
from strata.explicit.attach.placing import Placer
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig

MakeHost = Callable[..., PreTrainedModel]
SETTINGS = ExplicitMemoryConfig(layers=(0, 2), tokens_per_head=4, reference_tokens=16)
RNG = torch.Generator().manual_seed(6)
ROWS = [torch.randint(5, 96, (n,), generator=RNG).tolist() for n in (13, 9)]
CHUNK = 4
GREEDY: dict[str, Any] = dict(do_sample=False, eos_token_id=None, max_new_tokens=14)

pytestmark = pytest.mark.filterwarnings("ignore:no memory was injected")


@pytest.fixture
def host_model(host_model: PreTrainedModel) -> PreTrainedModel:
    return sharp(host_model)


@pytest.fixture
def make_host(make_host: MakeHost) -> MakeHost:
    return lambda name, **changes: sharp(make_host(name, **changes))


def batch(rows: Sequence[Sequence[int]] = ROWS) -> dict[str, torch.Tensor]:
    ids, mask = torch.zeros(2, 13, dtype=torch.long), torch.zeros(2, 13, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, 13 - len(row) :], mask[n, 13 - len(row) :] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def shelf_of(model: PreTrainedModel) -> Shelf:
    return make_shelf(model, Host(model).memory_shape(SETTINGS))


def attached(model: PreTrainedModel, shelf: Shelf, **options: Any) -> Any:
    settings = dict(tokenizer=words(), config=SETTINGS, chunk_tokens=CHUNK)
    return attach(model, shelf, **{**settings, **options})


def truth(
    model: PreTrainedModel,
    shelf: Shelf,
    row: Sequence[int],
    prompt: int,
    ahead: int = 0,
    query: str = "own",
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Logits of a whole row by the loops, nothing cached."""
    loops = Loops(model, Host(model).memory_shape(SETTINGS), shelf.memories, 16)
    read = reads(
        row, prompt, chunk=chunk, choose=by_sum, tokenizer=words(), ahead=ahead, query=query
    )
    return loops.logits(row, read)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_greedy_is_that_of_the_loops(host_model: PreTrainedModel, ahead: int) -> None:
    """Every step's logits, in a padded batch, with a query at the border or before it."""
    shelf = shelf_of(host_model)
    with attached(host_model, shelf, prefetch_tokens=ahead) as memory:
        out = host_model.generate(
            **batch(), **GREEDY, output_logits=True, return_dict_in_generate=True
        )
    logits = torch.stack(out.logits, 1)
    for n, row in enumerate(ROWS):
        text = [*row, *out.sequences[n, 13:].tolist()]
        want = truth(host_model, shelf, text, len(row), ahead)[len(row) - 1 : -1]
        torch.testing.assert_close(logits[n], want, atol=5e-5, rtol=5e-5)
        read = reads(text, len(row), chunk=CHUNK, choose=by_sum, tokenizer=words(), ahead=ahead)
        for record in (r for r in memory.used if r.row == n):
            assert [m.id for m in record.memories] == read[record.start]
    # 4 and 3 pieces of the prompts (the last ones read by 4 tokens more), then 3 refreshes
    assert len(memory.used) == 4 + 3 + 2 * 3
    assert memory.stats.refreshes == 1 + 3
    assert memory.stats.injected == sum(r.injected for r in memory.used) > 0
    assert {r.start for r in memory.used if r.row == 1} == {0, 1, 5, 13, 17, 21}
    threads = {name.split("_")[0] for name in shelf.threads}
    assert threads == ({"MainThread"} if not ahead else {"MainThread", "strata-memory"})


def test_memories_of_a_short_prompt_are_put_in_place_once(
    host_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generated tokens read what its one piece does, where the room is what was found."""
    placed: list[int] = []
    place = Placer.place

    def counting(self: Placer, layers: Sequence[int], rows: Any) -> Any:
        placed.extend(layers)
        return place(self, layers, rows)

    monkeypatch.setattr(Placer, "place", counting)
    shelf, row = shelf_of(host_model), ROWS[1]
    found = len(by_sum(words().decode(row)))
    assert found
    for room, times in ((found, 1), (found + 1, 2)):
        placed.clear()
        with attached(host_model, shelf, chunk_tokens=16, top_k=room):
            out = host_model.generate(
                torch.tensor([row]), **GREEDY, output_logits=True, return_dict_in_generate=True
            )
        assert placed and all(placed.count(layer) == times for layer in placed)
        want = truth(host_model, shelf, out.sequences[0].tolist(), len(row), chunk=16)
        logits = torch.stack(out.logits, 1)[0]
        torch.testing.assert_close(logits, want[len(row) - 1 : -1], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_prompt_reads_what_its_pieces_before_found(
    make_host: MakeHost, ahead: int, options: dict[str, Any]
) -> None:
    """Its first piece reads nothing; what is generated reads as ever."""
    model = make_host("llama")
    shelf = shelf_of(model)
    with attached(model, shelf, prefetch_tokens=ahead, prompt_query="previous") as memory:
        out = model.generate(
            **batch(), **GREEDY, **options, output_logits=True, return_dict_in_generate=True
        )
    logits = torch.stack(out.logits, 1)
    for n, row in enumerate(ROWS):
        text = [*row, *out.sequences[n, 13:].tolist()]
        want = truth(model, shelf, text, len(row), ahead, "previous")[len(row) - 1 : -1]
        torch.testing.assert_close(logits[n], want, atol=5e-5, rtol=5e-5)
        own = truth(model, shelf, text, len(row), ahead)[len(row) - 1 : -1]
        assert (own - want).abs().max() > 1e-2
    # What the prompt's last piece found is read behind it, by tokens that are a piece of their own.
    found = {(r.row, r.start, r.stop): r.query for r in memory.used}
    assert found[0, 0, 1] == found[1, 0, 1] == ""
    assert found[0, 13, 17] == words().decode(ROWS[0][9:])
    assert found[1, 9, 13] == words().decode(ROWS[1][5:])
    assert len(memory.used) == 4 + 3 + 2 + 2 * 3


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"use_cache": False, "prefetch": 2},
    ],
    ids=str,
)
def test_caches_change_nothing(host_model: PreTrainedModel, options: dict[str, Any]) -> None:
    options = dict(options)
    ahead = options.pop("prefetch", 0)
    shelf = shelf_of(host_model)
    keep = dict(output_logits=True, return_dict_in_generate=True)
    with attached(host_model, shelf, prefetch_tokens=ahead) as memory:
        want = host_model.generate(**batch(), **GREEDY, **keep)
        first = list(memory.used)
        memory.used.clear()
        got = host_model.generate(**batch(), **GREEDY, **keep, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=2e-5, rtol=2e-5
    )
    assert [(r.row, r.start, r.memories) for r in memory.used] == [
        (r.row, r.start, r.memories) for r in first
    ]


def test_a_row_is_what_it_is_alone(host_model: PreTrainedModel) -> None:
    shelf = shelf_of(host_model)
    with attached(host_model, shelf):
        together = host_model.generate(**batch(), **GREEDY)[:, 13:]
        for n, row in enumerate(ROWS):
            alone = host_model.generate(torch.tensor([row]), **GREEDY)
            assert torch.equal(alone[0, len(row) :], together[n])
        # padding that generate has to see by itself
        unmasked = host_model.generate(batch()["input_ids"], **GREEDY)[:, 13:]
        assert torch.equal(unmasked, together)
    assert not torch.equal(host_model.generate(**batch(), **GREEDY)[:, 13:], together)


def test_sampling_repeats_with_a_seed(make_host: MakeHost) -> None:
    """And each returned sequence reads what its own text found."""
    model = make_host("llama")
    shelf = shelf_of(model)
    options: dict[str, Any] = dict(
        do_sample=True, num_return_sequences=3, max_new_tokens=11, eos_token_id=None,
        top_k=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    runs = []
    with attached(model, shelf) as memory:
        for _ in range(2):
            torch.manual_seed(9)
            runs.append(model.generate(**batch(), **options))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert len({tuple(row) for row in runs[0].sequences[:, 13:].tolist()}) == 6
    logits = torch.stack(runs[0].logits, 1)
    for n in range(6):
        row = ROWS[n // 3]
        text = [*row, *runs[0].sequences[n, 13:].tolist()]
        want = truth(model, shelf, text, len(row))[len(row) - 1 : -1]
        torch.testing.assert_close(logits[n], want, atol=5e-5, rtol=5e-5)
    assert {(r.row, r.beam) for r in memory.used if r.start >= 13} >= {(0, 0), (0, 1), (0, 2)}


@pytest.mark.parametrize(
    ("name", "ahead", "use_cache", "seed"),
    [("llama", 0, True, 38), ("gemma2", 2, True, 22), ("llama", 1, False, 38)],
)
def test_beam_search_is_that_of_the_loops(
    make_host: MakeHost, name: str, ahead: int, use_cache: bool, seed: int
) -> None:
    """Beams that trade places keep what their own text found: a search without cache agrees.

    The prompts are such that beams with different memories do trade places between refreshes.
    """
    model = make_host(name)
    shelf = shelf_of(model)
    beams, steps = 3, 8
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, 96, (n,), generator=rng).tolist() for n in (13, 9)]
    with attached(model, shelf, prefetch_tokens=ahead) as memory:
        out = model.generate(
            **batch(rows), num_beams=beams, num_return_sequences=beams, max_new_tokens=steps,
            eos_token_id=None, do_sample=False, use_cache=use_cache, length_penalty=0.0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    traded = 0
    for n, row in enumerate(rows):
        alive = [(0.0, list(row))]
        for step in range(steps):
            grown = []
            for score, text in alive:
                scores = truth(model, shelf, text, len(row), ahead)[-1].log_softmax(-1)
                top = scores.topk(beams)
                grown += [
                    (score + float(value), [*text, int(token)])
                    for value, token in zip(top.values, top.indices, strict=True)
                ]
            before, alive = alive, sorted(grown, key=lambda x: -x[0])[:beams]
            if step % CHUNK and step > CHUNK:  # between refreshes: what did each place read?
                read = [
                    [
                        reads(
                            t, len(row), chunk=CHUNK, choose=by_sum, tokenizer=words(), ahead=ahead
                        )[-1]
                        for _, t in texts
                    ]
                    for texts in (before, alive)
                ]
                traded += read[0] != read[1]
        for place, (score, text) in enumerate(alive):
            got = n * beams + place
            assert out.sequences[got, 13:].tolist() == text[len(row) :]
            torch.testing.assert_close(
                float(out.sequences_scores[got]), score, atol=2e-4, rtol=1e-4
            )
    assert traded > 0
    assert {r.beam for r in memory.used} == {0, 1, 2}


def test_streaming_from_another_thread(make_host: MakeHost) -> None:
    """As a server does it; leaving the block waits for the text to end."""
    model, tokenizer = make_host("llama"), words()
    shelf = shelf_of(model)
    with attached(model, shelf):
        want = model.generate(torch.tensor([ROWS[0]]), **GREEDY)[0, 13:]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    with attached(model, shelf):
        thread = threading.Thread(
            target=model.generate,
            kwargs={"inputs": torch.tensor([ROWS[0]]), "streamer": streamer, **GREEDY},
        )
        thread.start()
        first = next(iter(streamer))
    assert (first + "".join(streamer)).split() == tokenizer.decode(want).split()
    thread.join()
    assert "generate" not in vars(model)


def test_one_generate_at_a_time(make_host: MakeHost) -> None:
    model = make_host("llama")
    shelf = shelf_of(model)
    inside, go_on = threading.Event(), threading.Event()

    def slow(query: str) -> list[TinyHit]:
        inside.set()
        go_on.wait(60)
        return by_sum(query)

    shelf.choose = slow
    with attached(model, shelf):
        thread = threading.Thread(target=model.generate, args=(torch.tensor([ROWS[0]]),))
        thread.start()
        assert inside.wait(60)
        with pytest.raises(AttachError, match="generating in another thread"):
            model.generate(torch.tensor([ROWS[0]]))
        go_on.set()
        thread.join()


def test_finished_rows_ask_for_nothing(make_host: MakeHost) -> None:
    """The row that is over is not searched for, and the other goes on as alone."""
    model = make_host("llama")
    shelf = shelf_of(model)
    with attached(model, shelf) as memory:
        free = model.generate(**batch(), **GREEDY)[:, 13:]
        rows = free.tolist()
        stop = next(token for token in rows[0] if token not in rows[1])
        options = {**GREEDY, "eos_token_id": stop}
        memory.used.clear()
        out = model.generate(**batch(), **options)[:, 13:]
    assert torch.equal(out[1], free[1])
    asked = [n for n in (1, 2, 3) if rows[0].index(stop) >= n * CHUNK + 1]
    assert len(asked) < 3
    assert {r.start for r in memory.used if r.row == 0} == {
        0,
        1,
        5,
        9,
        *(13 + 4 * n for n in asked),
    }
    assert max(r.start for r in memory.used if r.row == 1) == 21


def test_thresholds_duplicates_and_counts(make_host: MakeHost) -> None:
    """What scores too low is left out; one text is injected once; never more than top_k."""
    model = make_host("llama")
    shelf = shelf_of(model)
    shelf.choose = lambda query: [
        TinyHit("0", 0.9, "a", "one.txt", 3, 12),
        TinyHit("1", 0.8, "a"),
        TinyHit("2", 0.7, "b"),
        TinyHit("3", 0.2, "c"),
    ]
    with attached(model, shelf, min_score=0.5) as memory:
        model.generate(torch.tensor([ROWS[0]]), max_new_tokens=2)
    assert [m.id for m in memory.used[0].memories] == ["0", "2"]
    first = memory.used[0].memories[0]
    assert (first.source, first.start, first.end, first.score) == ("one.txt", 3, 12, 0.9)
    assert first.text == "a"
    with attached(model, shelf, top_k=1) as memory:
        model.generate(torch.tensor([ROWS[0]]), max_new_tokens=2)
    assert [m.id for m in memory.used[0].memories] == ["0"]
    assert memory.stats.queries == 4 and memory.stats.searches == 1
    assert memory.stats.loaded == 1 and memory.stats.injected == 4
    assert memory.stats.search_ms > 0 and memory.stats.load_ms > 0 and memory.stats.inject_ms > 0


def test_finding_nothing_is_said_once(make_host: MakeHost) -> None:
    model = make_host("llama")
    shelf = shelf_of(model)
    shelf.choose = lambda query: []
    with warnings.catch_warnings(record=True) as said, attached(model, shelf) as memory:
        warnings.simplefilter("always")
        model.generate(**batch(), **GREEDY)
    mine = [str(w.message) for w in said if "no memory was injected" in str(w.message)]
    assert len(mine) == 1 and "\n" not in mine[0]
    assert [r.injected for r in memory.used] == [0] * 13


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("where", ["find", "load"])
def test_a_failing_source_is_one_line(make_host: MakeHost, ahead: int, where: str) -> None:
    """Also from the thread; and the next call works again."""
    model = make_host("llama")
    shelf = shelf_of(model)
    good = getattr(shelf, where)
    calls = []

    def fail(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk\ngone")
        return good(*args)

    setattr(shelf, where, fail)
    with attached(model, shelf, prefetch_tokens=ahead):
        with pytest.raises(RetrievalError) as error:
            model.generate(**batch(), **GREEDY)
        assert str(error.value).endswith("failed: OSError: disk gone")
        assert "\n" not in str(error.value)
        assert isinstance(error.value.__cause__, OSError)
        assert model.generate(**batch(), **GREEDY).shape == (2, 27)


def test_prefetching_overlaps_and_wastes_no_thread(make_host: MakeHost) -> None:
    """A search that takes long runs while tokens are generated; no thread outlives the block."""
    model = make_host("llama")
    shelf = shelf_of(model)

    def slow(query: str) -> list[TinyHit]:
        time.sleep(0.05)
        return by_sum(query)

    with attached(model, shelf) as memory:
        want = model.generate(torch.tensor([ROWS[0]]), **GREEDY)
    shelf.choose = slow
    with attached(model, shelf, prefetch_tokens=1) as memory:
        model.generate(torch.tensor([ROWS[0]]), **GREEDY)
        assert memory.stats.searches == 1 + 3
        assert memory.stats.wait_ms < 3 * 60
        again = [model.generate(torch.tensor([ROWS[0]]), **GREEDY) for _ in range(2)]
    assert torch.equal(again[0], again[1])
    assert want.shape == again[0].shape
    assert not [t for t in threading.enumerate() if t.name.startswith("strata-memory")]


def test_cold_memories_are_encoded_in_the_caller_s_thread(make_host: MakeHost) -> None:
    """Searching may run ahead; encoding never does."""
    model = make_host("llama")
    shelf = shelf_of(model)
    shelves = dict(shelf.memories)
    with attached(model, shelf, prefetch_tokens=2):
        want = model.generate(**batch(), **GREEDY)
    shelf.memories.clear()
    warmed: list[tuple[str, list[str]]] = []

    def warm(ids: Sequence[str]) -> None:
        warmed.append((threading.current_thread().name, list(ids)))
        shelf.memories.update({name: shelves[name] for name in ids})

    shelf.cold = lambda ids: [name for name in ids if name not in shelf.memories]  # type: ignore
    shelf.warm = warm  # type: ignore[attr-defined]
    with attached(model, shelf, prefetch_tokens=2):
        assert torch.equal(model.generate(**batch(), **GREEDY), want)
    assert warmed and {name for name, _ in warmed} == {"MainThread"}
    assert sorted(name for _, names in warmed for name in names) == sorted(shelf.memories)


def test_a_loop_of_one_s_own(make_host: MakeHost) -> None:
    """Forward calls without generate: the prompt's pieces, then what its end read."""
    model = make_host("llama")
    shelf = shelf_of(model)
    row = ROWS[0]
    with attached(model, shelf, chunk_tokens=8) as memory:
        want = model.generate(
            torch.tensor([row]), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        memory.used.clear()
        out = model(input_ids=torch.tensor([row]), use_cache=True)
        made = []
        for _ in range(6):
            made.append(int(out.logits[0, -1].argmax()))
            out = model(input_ids=torch.tensor([made[-1:]]), past_key_values=out.past_key_values)
        assert made == want[0, 13:].tolist()
        assert [(r.start, r.stop) for r in memory.used] == [(0, 5), (5, 13)]
        with pytest.raises(AttachError, match="this call has 2 rows, the prompt before it had 1"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=out.past_key_values)
        with pytest.warns(UserWarning, match="embeddings, which have no text"):
            plain = model(inputs_embeds=model.get_input_embeddings()(torch.tensor([row])))
    torch.testing.assert_close(plain.logits, model(input_ids=torch.tensor([row])).logits)

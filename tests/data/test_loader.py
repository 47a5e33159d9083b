"""Batches hold what they should, in an order that resumption and ranks do not change."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_documents import Prepare, make_texts, write_jsonl

from strata.data.dataset import TokenDataset
from strata.data.loader import IGNORE, Loader, LoaderConfig
from strata.errors import CheckpointError, DataError

EOS, PAD = 2, 0
ALL = list(itertools.product(["concat", "document"], [False, True]))


@pytest.fixture
def dataset(tmp_path: Path, prepare_to: Prepare) -> TokenDataset:
    """Sixty texts and sixty prompts with completions, in several shards."""
    texts = write_jsonl(tmp_path / "a.jsonl", make_texts(60, max_words=25))
    pairs = tmp_path / "b.jsonl"
    rows = [{"prompt": text, "completion": " the hill"} for text in make_texts(60, seed=1)]
    pairs.write_text("\n".join(json.dumps(row) for row in rows))
    prepare_to(tmp_path / "out", texts, pairs, shard_tokens=500)
    dataset = TokenDataset.open(tmp_path / "out", verify=True, vocab_size=320)
    assert len(dataset.manifest.splits["train"].shards) > 4
    return dataset


def loader(dataset: TokenDataset, **options: object) -> Loader:
    ranks = {name: options.pop(name) for name in ("rank", "world_size") if name in options}
    defaults: dict[str, object] = {"batch_size": 2, "sequence_tokens": 64, "seed": 5}
    return Loader(dataset, LoaderConfig.model_validate(defaults | options), **ranks)  # type: ignore[arg-type]


def rows_of(batches: Iterator[dict[str, torch.Tensor]], count: int) -> dict[str, torch.Tensor]:
    """The first `count` batches, one behind the other."""
    taken = list(itertools.islice(batches, count))
    return {name: torch.cat([batch[name] for batch in taken]) for name in taken[0]}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def stream_of(dataset: TokenDataset) -> np.ndarray:
    return np.concatenate([dataset.document(index) for index in range(dataset.num_documents)])


@pytest.mark.parametrize(("packing", "document_mask"), ALL)
def test_shapes_and_types(dataset: TokenDataset, packing: str, document_mask: bool) -> None:
    batch = next(loader(dataset, packing=packing, document_mask=document_mask))
    names = {"input_ids", "labels"} | ({"position_ids"} if document_mask else set())
    assert set(batch) == names
    for tensor in batch.values():
        assert tensor.shape == (2, 64) and tensor.dtype == torch.int64
    has_loss = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][has_loss], batch["input_ids"][has_loss])


def test_concat_windows_cover_the_stream_once_an_epoch(dataset: TokenDataset) -> None:
    stream = stream_of(dataset)
    ring = np.concatenate([stream, stream])
    windows = loader(dataset, batch_size=1)
    offsets = set()
    for _ in range(3):
        rows = rows_of(windows, windows.num_rows)["input_ids"].numpy()
        starts = [_find(ring, row) % len(stream) for row in rows]
        covered = np.concatenate([(start + np.arange(64)) % len(stream) for start in starts])
        assert len(set(covered.tolist())) == len(covered) == len(stream) // 64 * 64
        offsets.add(min(starts) % 64)
        assert starts != sorted(starts)
    assert len(offsets) > 1  # another cut in each epoch


def _find(stream: np.ndarray, row: np.ndarray) -> int:
    windows = np.lib.stride_tricks.sliding_window_view(stream, len(row))
    return int(np.flatnonzero((windows == row).all(axis=1))[0])


def test_document_rows_start_at_borders_and_hold_each_document_once(dataset: TokenDataset) -> None:
    rows = loader(dataset, packing="document", batch_size=1, sequence_tokens=256)
    wanted = sorted(tuple(dataset.document(i).tolist()) for i in range(dataset.num_documents))
    for _ in range(2):
        found = []
        batch = rows_of(rows, rows.num_rows)
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            text = ids[: len(ids) - ids[::-1].index(EOS)]
            assert set(ids[len(text) :]) <= {PAD} and set(labels[len(text) :]) <= {IGNORE}
            ends = [index + 1 for index, token in enumerate(text) if token == EOS]
            found += [tuple(text[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        assert sorted(found) == wanted


def test_long_documents_are_cut_with_one_warning(dataset: TokenDataset) -> None:
    with pytest.warns(UserWarning, match=r"longer than 16 tokens and are cut.*are not read"):
        rows = loader(dataset, packing="document", batch_size=1, sequence_tokens=16)
    heads = {tuple(dataset.document(index)[:16].tolist()) for index in range(dataset.num_documents)}
    full = [row for row in rows_of(rows, rows.num_rows)["input_ids"].tolist() if PAD not in row]
    assert any(tuple(row) in heads for row in full)


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_prompts_carry_no_loss(dataset: TokenDataset, packing: str) -> None:
    rows = loader(dataset, packing=packing, batch_size=1, sequence_tokens=512)
    with_loss = without = 0
    for _ in range(rows.num_rows):
        labels = next(rows)["labels"]
        with_loss += int((labels != IGNORE).sum())
        without += int((labels == IGNORE).sum())
    prompts = sum(
        int(np.load(path).sum())
        for path in sorted((dataset.folder / "train").glob("*.loss_from.npy"))
    )
    assert prompts > 1000
    if packing == "document":
        assert with_loss == dataset.num_tokens - prompts
    else:
        assert abs(without - prompts) <= 512


def test_positions_restart_with_each_document(dataset: TokenDataset) -> None:
    for packing in ("concat", "document"):
        batch = rows_of(loader(dataset, packing=packing, document_mask=True), 5)
        for ids, labels, positions in zip(*(batch[n].tolist() for n in batch), strict=True):
            expected = 0
            for index, position in enumerate(positions):
                at_border = index == 0 or ids[index - 1] == EOS
                expected = 0 if at_border else expected + 1
                if at_border:
                    assert labels[index] == IGNORE  # nothing in the document predicts it
                if not (ids[index] == PAD and position == 0):
                    assert position == expected
                else:
                    expected = 0  # the padding counts for itself


@pytest.mark.parametrize(("packing", "document_mask"), ALL)
def test_resumption_is_exact(dataset: TokenDataset, packing: str, document_mask: bool) -> None:
    options = {"packing": packing, "document_mask": document_mask, "batch_size": 7}
    whole = list(itertools.islice(loader(dataset, **options), 40))  # several epochs
    for stop in (0, 1, 5, 6, 33):
        first = loader(dataset, **options)
        rows_of(first, stop) if stop else None
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state)) < 300
        second = loader(dataset, **options)
        next(second)
        second.load_state_dict(state)
        for batch in whole[stop:]:
            assert_equal(next(second), batch)
    assert second.epoch > 2


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_ranks_share_the_order_of_one_process(dataset: TokenDataset, packing: str) -> None:
    options = {"packing": packing, "document_mask": True}
    alone = loader(dataset, batch_size=6, **options)
    ranks = [loader(dataset, batch_size=2, rank=rank, world_size=3, **options) for rank in range(3)]
    for _ in range(30):
        parts = [next(rank) for rank in ranks]
        together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert_equal(together, next(alone))
        assert all(rank.state_dict() == alone.state_dict() for rank in ranks)
    # Two ranks go on where three stopped.
    two = [loader(dataset, batch_size=3, rank=rank, world_size=2, **options) for rank in range(2)]
    for rank in two:
        rank.load_state_dict(alone.state_dict())
    assert_equal(rows_of(iter([next(rank) for rank in two]), 2), next(alone))


def test_seeds_and_epochs_differ(dataset: TokenDataset) -> None:
    one, two = loader(dataset, seed=1), loader(dataset, seed=2)
    assert not torch.equal(next(one)["input_ids"], next(two)["input_ids"])
    epoch = loader(dataset, packing="document", batch_size=1)
    first = rows_of(epoch, epoch.num_rows)["input_ids"]
    second = rows_of(epoch, epoch.num_rows)["input_ids"]
    assert not torch.equal(first[:5], second[:5])


def test_a_dataset_of_exactly_one_window(tmp_path: Path, prepare_to: Prepare) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["river"])
    num_tokens = prepare_to(tmp_path / "out", source).num_tokens
    dataset = TokenDataset.open(tmp_path / "out")
    one = loader(dataset, batch_size=3, sequence_tokens=num_tokens)
    assert next(one)["input_ids"].shape == (3, num_tokens) and one.epoch == 3
    with pytest.raises(DataError, match="less than one sequence of"):
        loader(dataset, sequence_tokens=num_tokens + 1)


def test_states_of_other_loaders_are_refused(dataset: TokenDataset) -> None:
    state = loader(dataset).state_dict()
    for change in ({"seed": 6}, {"sequence_tokens": 32}, {"packing": "document"}):
        with pytest.raises(CheckpointError, match=f"the loader's {next(iter(change))} was"):
            loader(dataset, **change).load_state_dict(state)
    for damage in ({"epoch": -1}, {"row": "1"}, {"row": 10**6}):
        with pytest.raises(CheckpointError):
            loader(dataset).load_state_dict(state | damage)


def test_ranks_out_of_range_are_refused(dataset: TokenDataset) -> None:
    with pytest.raises(DataError, match="rank 2 of 2"):
        loader(dataset, rank=2, world_size=2)


def test_many_shards_stay_within_the_open_files(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows_of(loader(dataset), 10)
    monkeypatch.setattr("strata.data.dataset._OPEN_SHARDS", 1)
    again = TokenDataset.open(dataset.folder)
    assert_equal(rows_of(loader(again), 10), whole)
    assert len(again._open) == 1


@pytest.mark.parametrize(("packing", "document_mask"), ALL)
def test_tokens_say_which_chunk_they_belong_to(
    dataset: TokenDataset, packing: str, document_mask: bool
) -> None:
    """Numbers lead back to the very tokens of the document, in every epoch."""
    step = 10
    lengths = dataset.document_lengths()
    first = np.cumsum(-(-lengths // step)) - -(-lengths // step)
    options = dict(packing=packing, document_mask=document_mask, batch_size=3)
    batches = loader(dataset, chunk_tokens=step, **options)
    plain = loader(dataset, **options)
    for _ in range(2 * batches.num_rows // 3):
        batch, other = next(batches), next(plain)
        chunks, documents = batch.pop("chunks"), batch.pop("documents")
        assert_equal(batch, other)
        for ids, in_chunk, in_document in zip(batch["input_ids"], chunks, documents, strict=True):
            for document in set(in_document.tolist()) - {-1}:
                here = in_document == document
                tokens = dataset.document(document)
                at = np.flatnonzero(here.numpy())
                number = in_chunk[here].numpy() - first[document]
                mine = ids[here].numpy()
                if len(at) == at[-1] - at[0] + 1:  # a window may hold both ends of one document
                    begin = _find(tokens, mine)
                    fits = [
                        start
                        for start in range(begin, len(tokens) - len(mine) + 1)
                        if np.array_equal(tokens[start : start + len(mine)], mine)
                        and np.array_equal((start + np.arange(len(mine))) // step, number)
                    ]
                    assert fits
            assert bool(((in_chunk < 0) == (in_document < 0)).all())
            assert bool((ids[in_chunk < 0] == PAD).all())

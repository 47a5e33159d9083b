"""Processes that encode give what this one gives, in order, and end when it does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tiny_documents import Prepare, folder_bytes, make_texts, write_jsonl

from strata.data import workers as workers_file
from strata.data.batches import Position, TextBatch
from strata.data.encode import EncodedBatch, TextEncoder
from strata.data.memory import plan_memory
from strata.data.open_tokenizer import load_encoder
from strata.data.readers import Document
from strata.data.workers import Here, Workers, encode_batches, open_encoding
from strata.errors import ConfigError, WorkerError


@pytest.fixture
def encoder(tokenizer: Path) -> TextEncoder:
    return load_encoder(
        tokenizer,
        append_eos=True,
        prepend_bos=None,
        parse_special_tokens=True,
        val_fraction=0.2,
        seed=0,
    )


def make_batches(count: int) -> list[TextBatch]:
    """Batches of very different sizes."""
    return [
        TextBatch(
            [
                Document(text, "", record, 0)
                for record, text in enumerate(make_texts(1 + 60 * (number % 7 == 0), seed=number))
            ],
            Position(0, number),
            0,
            0,
            size_bytes=100,
        )
        for number in range(count)
    ]


def test_workers_do_not_change_the_bytes(tmp_path: Path, prepare_to: Prepare) -> None:
    rows = [*make_texts(400), "one<eos>two", "", "日本語 text"]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    options: dict[str, object] = {
        "val_fraction": 0.2,
        "shard_tokens": 1500,
        "filters": {"min_chars": 12, "max_tokens": 50},
    }
    for parse_special_tokens in (False, True):
        folders = {}
        for workers in (0, 3):
            out = tmp_path / f"{parse_special_tokens}{workers}"
            with pytest.MonkeyPatch.context() as patch:
                if workers:  # so many batches that the processes overtake one another
                    plan = plan_memory(8.0)
                    small = type(plan)(**{**vars(plan), "batch_bytes": 500, "run_bytes": 4000})
                    patch.setattr("strata.data.prepare.plan_memory", lambda *_, s=small, **__: s)
                prepare_to(
                    out,
                    source,
                    workers=workers,
                    parse_special_tokens=parse_special_tokens,
                    **options,
                )
            folders[workers] = folder_bytes(out)
        assert folders[0] == folders[3]


def test_batches_come_in_order_and_not_too_many_at_once(encoder: TextEncoder) -> None:
    read = 0

    def reading() -> Iterator[TextBatch]:
        nonlocal read
        for batch in make_batches(30):
            read += 1
            yield batch

    with open_encoding(encoder, 2) as encoding:
        assert isinstance(encoding, Workers)
        assert 2 * 30e6 < encoding.held_bytes < 2 * 300e6  # nothing of torch in there
        given = []
        for batch in encode_batches(encoding, reading(), most_bytes=10**6):
            given.append(batch)
            assert read - len(given) < 4
        read_before, read = read, 0
        alone = [b for b in encode_batches(encoding, reading(), most_bytes=150)]
    here = [Here(encoder).encode(batch) for batch in make_batches(30)]
    for one, other, third in zip(given, here, alone, strict=True):
        assert one.end == other.end == third.end
        assert one.documents.tokens.tolist() == other.documents.tokens.tolist()
        assert one.documents.is_val.tolist() == other.documents.is_val.tolist()
        assert third.documents.tokens.tolist() == other.documents.tokens.tolist()
    assert read_before == 30


def test_a_batch_that_is_too_large_goes_alone() -> None:
    inside: list[int] = []

    class Counting:
        at_once, ahead, held_bytes = 4, 2, 0
        running = 0

        def encode(self, batch: TextBatch) -> EncodedBatch:
            self.running += batch.size_bytes
            inside.append(self.running)
            time.sleep(0.002)
            self.running -= batch.size_bytes
            return batch  # type: ignore[return-value]

    sizes = [10, 10, 95, 10, 10, 300, 10, 40, 40, 40]
    batches = [TextBatch([], Position(0, n), 0, 0, size) for n, size in enumerate(sizes)]
    given = list(encode_batches(Counting(), iter(batches), most_bytes=100))
    assert [batch.end.record for batch in given] == list(range(10))
    assert max(inside) == 300 and sorted(inside)[-2] <= 100


def test_a_killed_worker_gives_one_line(encoder: TextEncoder) -> None:
    with open_encoding(encoder, 2) as encoding:
        children = psutil.Process().children()
        os.kill(children[-1].pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"ended \(SIGKILL\); .* the same command goes on"):
            list(encode_batches(encoding, make_batches(20), most_bytes=10**6))
    assert not any(child.is_running() for child in children)


def test_workers_end_with_the_block_whatever_happens(encoder: TextEncoder) -> None:
    with pytest.raises(KeyboardInterrupt), open_encoding(encoder, 1) as encoding:
        (child,) = psutil.Process().children()
        encoded = encode_batches(encoding, make_batches(20), most_bytes=10**6)
        next(encoded)
        os.kill(child.pid, signal.SIGINT)  # Ctrl-C reaches the whole group: they do not mind
        next(encoded)
        raise KeyboardInterrupt
    assert not child.is_running()


def test_a_process_that_cannot_start(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_file.sys, "executable", "/nowhere/python")
    with pytest.raises(WorkerError, match="a process cannot be started"), open_encoding(encoder, 1):
        pass


def test_memory_is_shared_out_with_the_workers() -> None:
    alone, four = plan_memory(8.0), plan_memory(8.0, workers=4, workers_bytes=400_000_000)
    assert four.batch_bytes * (4 + 2) <= 2 * alone.batch_bytes * 3
    assert four.range_bytes < alone.range_bytes
    assert alone.batch_bytes == 2**21
    with pytest.raises(ConfigError, match=r"memory_gb is 0.5: 8 workers need \d\.\d \(each holds"):
        plan_memory(0.5, workers=8, workers_bytes=800_000_000)
    assert plan_memory(0.001).batch_bytes == 500_000  # what is used beside the libraries at least

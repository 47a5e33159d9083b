"""Documents into a bank by several workers of Ray: they write files, this process commits them.

Ray Data runs a partition again when its worker is lost, perhaps after the files of the first time
were written. So workers never commit: this process does, each partition once and in order, by what
came back. Files that nobody came back with belong to no version, and a compaction deletes them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from strata.errors import BankError, StrataError, WorkerError
from strata.explicit.bank import records, seals
from strata.explicit.bank.given import DocumentLike
from strata.explicit.bank.intake import AddReport, Change, Intake
from strata.explicit.bank.partition import (
    PARTITIONS,
    OpenMeans,
    PartitionWriter,
    Written,
    packed,
    unpacked,
)
from strata.explicit.bank.store import Store
from strata.explicit.extras import require

PARTITION_CHARACTERS = 4 * 2**20  # some 8,000 references of 128 tokens, a few hundred MB of memory
_FIRST_CHARACTERS = 16 * 2**10
_PARTITION_DOCUMENTS = 4096
_GONE_DOCUMENTS = 4096  # their sources stand in one expression
# Of each worker, held by this process and by Ray at once; a worker opens its model once a wave.
_WAVE_CHARACTERS = 2**27


class RayAdder:
    """One run of an `add` with workers; the writer's lock is held, Ray is running.

    Args:
        store: at its newest version.
        open_means: what each worker cuts, encodes and embeds with; called there.
        num_workers: processes.
        gpus_per_worker: of Ray's.
        batch_references: a commit is made at the first partition's end after as many.
        batch_size: references embedded and encoded at a time.
        partition_characters: text of a partition, but for its last document.
    """

    def __init__(
        self,
        store: Store,
        open_means: OpenMeans,
        *,
        num_workers: int,
        gpus_per_worker: float,
        batch_references: int,
        batch_size: int,
        partition_characters: int,
        on_progress: Callable[[AddReport], None] | None,
    ) -> None:
        self._store, self._open_means = store, open_means
        self._num_workers, self._gpus_per_worker = num_workers, gpus_per_worker
        self._batch_references, self._batch_size = batch_references, batch_size
        self._partition_characters = partition_characters
        self._on_progress = on_progress
        self._intake = Intake(store)
        self._emptied: set[str] = set()  # source ids whose last document had no reference
        self._start_batch()

    def run(self, documents: Iterable[DocumentLike]) -> AddReport:
        """Add all documents."""
        for wave in self._waves(documents):
            for partition, written in self._written(wave):
                if not self._sources.isdisjoint(change.source_id for change in partition):
                    self._commit()  # a source twice: two commits, the later one stays
                self._collect(partition, written)
                if (
                    self._batch.references >= self._batch_references
                    or len(self._gone) >= _GONE_DOCUMENTS
                ):
                    self._commit()
        self._commit()
        return self._intake.report

    def _start_batch(self) -> None:
        self._batch = AddReport()
        self._sources: set[str] = set()
        self._gone: list[str] = []
        self._fragments: list[Any] = []
        self._sealed: dict[str, seals.SealedFile] = {}

    def _waves(self, documents: Iterable[DocumentLike]) -> Iterator[list[list[Change]]]:
        """Partitions, as many as Ray is to hold at once; a partition has a source once."""
        wave: list[list[Change]] = []
        partition: list[Change] = []
        sources: set[str] = set()
        characters = in_wave = 0
        most = min(_FIRST_CHARACTERS, self._partition_characters)
        for document in documents:
            change = self._intake.look(document)
            if change is None:
                continue
            full = characters >= most or len(sources) >= _PARTITION_DOCUMENTS
            if partition and (full or change.source_id in sources):
                wave.append(partition)
                partition, characters = [], 0
                sources.clear()
                if len(wave) % self._num_workers == 0:  # small at first: work for all of them
                    most = min(2 * most, self._partition_characters)
                if in_wave >= self._num_workers * _WAVE_CHARACTERS:
                    yield wave
                    wave, in_wave = [], 0
            if change.is_stored:
                self._intake.keep(change)
                characters += len(document.text)
                in_wave += len(document.text)
            else:
                self._intake.drop(change)
            partition.append(change)
            sources.add(change.source_id)
        if partition:
            yield [*wave, partition]

    def _written(self, wave: Sequence[Sequence[Change]]) -> Iterator[tuple[Sequence[Change], Any]]:
        """Each partition once, in order, with what became of its stored documents."""
        tables, expected = [], set()
        for number, partition in enumerate(wave):
            if stored := [change for change in partition if change.is_stored]:
                row = {"number": number, "documents": packed(stored)}
                tables.append(pa.Table.from_pylist([row], PARTITIONS))
                expected.add(number)
        answers = self._encode(tables) if tables else iter(())
        early: dict[int, Written] = {}
        for number, partition in enumerate(wave):
            while number in expected and number not in early:
                answered = next(answers, None)
                if answered is None:
                    raise WorkerError(f"Ray lost partition {number:,} of {len(wave):,}: run again")
                if answered[0] >= number:
                    early.setdefault(*answered)
            yield partition, early.pop(number, Written((), (), {}))

    def _encode(self, tables: list[pa.Table]) -> Iterator[tuple[int, Written]]:
        """Partitions by their numbers, as they become ready."""
        ray = require("ray", extra="ray", purpose="the engine ray")
        require("ray.data", extra="ray", purpose="the engine ray")
        num_workers = min(self._num_workers, len(tables))
        given = ray.data.from_arrow(tables)
        tables.clear()  # Ray has them
        made = given.map_batches(
            PartitionWriter,
            fn_constructor_args=(self._store.files.place, self._open_means, self._batch_size),
            batch_size=1,  # a row is a partition
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_cpus=1,
            num_gpus=self._gpus_per_worker,
        )
        try:
            for row in made.iter_rows():
                if row["error"]:
                    raise BankError(row["content"])
                yield row["number"], unpacked(row["content"])
        except StrataError:
            raise
        except Exception as error:  # Ray wraps whatever a worker raised in classes of its own
            text = " ".join(str(error).split())
            raise WorkerError(f"a worker of Ray failed: ...{text[-300:]}") from None

    def _collect(self, partition: Sequence[Change], written: Written) -> None:
        """Make a partition part of the next commit."""
        batch = self._batch
        counts = iter(written.references)
        for change in partition:
            count = next(counts) if change.is_stored else 0
            source_id = change.source_id
            is_replaced = change.is_known and source_id not in self._emptied
            if change.is_known:
                self._gone.append(source_id)
            if count or change.is_known:
                self._sources.add(source_id)
            if count:
                self._emptied.discard(source_id)
            elif change.is_stored:
                self._emptied.add(source_id)
                if self._intake.holds(change):
                    self._intake.drop(change)
            batch = replace(
                batch,
                documents=batch.documents + bool(count),
                references=batch.references + count,
                replaced=batch.replaced + (is_replaced and bool(count)),
                empty=batch.empty + (change.is_stored and not count),
            )
        self._batch = batch
        self._fragments += written.fragments
        self._sealed |= written.sealed

    def _commit(self) -> None:
        removed = 0
        if self._fragments or self._gone:
            gone = records.one_of("source_id", self._gone) if self._gone else None
            what = f"add {self._batch.documents} documents"
            removed = self._store.commit(self._fragments, gone, what, sealed=self._sealed)
        commits = int(bool(self._fragments or self._gone))
        self._intake.committed(replace(self._batch, references_removed=removed, commits=commits))
        self._start_batch()
        if self._on_progress is not None:
            self._on_progress(self._intake.report)


@contextmanager
def running(num_workers: int) -> Iterator[Any]:
    """Ray: the one that this process is connected to, or that RAY_ADDRESS names, or one's own.

    Raises:
        MissingPackageError: Ray is not installed.
        WorkerError: it cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", extra="ray", purpose="the engine ray")
    data = require("ray.data", extra="ray", purpose="the engine ray")
    if ray.is_initialized():
        yield ray
        return
    given: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        # Ray Data's actors can be restarted from what this process holds; Ray says so as an error.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        cores = max(num_workers, os.cpu_count() or 1)
        given |= {"address": "local", "num_cpus": cores, "include_dashboard": False}
    try:
        with warnings.catch_warnings():
            # Ray forks to start programs of its own, which never come near a dataset.
            warnings.filterwarnings("ignore", message="lance is not fork-safe")
            ray.init(**given)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkerError(f"Ray cannot be reached: {' '.join(str(error).split())[:200]}") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data.DataContext.get_current().enable_progress_bars = False
    data.DataContext.get_current().print_on_execution_start = False
    try:
        yield ray
    finally:
        ray.shutdown()


def gpus_per_worker(ray: Any, device: str, num_workers: int) -> float:
    """GPUs of each worker: one where it is to compute on GPUs.

    Args:
        device: cpu, cuda, or auto: cuda where the cluster has one for each worker.
    """
    if device == "auto":
        return float(ray.cluster_resources().get("GPU", 0) >= num_workers)
    return float(device.startswith("cuda"))

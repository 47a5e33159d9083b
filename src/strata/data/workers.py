"""Encoding batches side by side, in order: on the tokenizer's own threads, or in processes.

The tokenizers library spreads a batch over threads, but filters, hashes and the copying of ids are
Python, which one process runs on one core. Processes do all of it: each has a tokenizer with one
thread, and gets whole batches. Which process encodes what changes nothing in the result.

A process is a fresh interpreter that imports this room alone, a third of a second and 80 MB (all of
strata would be 500); no fork, because the tokenizer and arrow have threads. It ends when its pipe
does, so none outlives a killed `prepare`.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from strata.data.batches import TextBatch
from strata.data.encode import EncodedBatch, TextEncoder
from strata.errors import WorkerError

# What a process runs. Importing strata would import torch, which encoding has no use for.
_LAUNCH = """
import json, sys, types
sys.path[:], package_path, descriptor = json.loads(sys.argv[1])
package = types.ModuleType("strata")
package.__path__ = package_path
sys.modules["strata"] = package
from strata.data.worker import serve
serve(descriptor)
"""
_PACKAGE = Path(__file__).resolve().parents[1]
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Encoding(Protocol):
    """Something that encodes batches.

    Attributes:
        at_once: how many batches it works on side by side.
        ahead: how many more may wait, read or encoded.
        held_bytes: memory of its processes besides this one.
    """

    at_once: int
    ahead: int
    held_bytes: int

    def encode(self, batch: TextBatch) -> EncodedBatch:
        """Encode a batch; called by `at_once` threads."""
        ...


class Here:
    """Encodes in this process, on the tokenizer's own threads."""

    at_once, ahead, held_bytes = 1, 1, 0

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def encode(self, batch: TextBatch) -> EncodedBatch:
        return self._encoder.encode(batch)


class Workers:
    """Processes that encode, started by `open_encoding`."""

    def __init__(self, processes: list[_Process]) -> None:
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in processes:
            self._idle.put(process)
        self.at_once = len(processes)
        self.ahead = 2
        self.held_bytes = sum(process.held_bytes for process in processes)

    def encode(self, batch: TextBatch) -> EncodedBatch:
        """Let an idle process encode a batch.

        Raises:
            WorkerError: the process ended.
        """
        process = self._idle.get()
        try:
            return process.encode(batch)
        finally:
            self._idle.put(process)


class _Process:
    """One process and the pipe to it."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self.held_bytes = 0
        try:
            ours, theirs = socket.socketpair()
            arguments = [sys.path, [str(_PACKAGE)], theirs.fileno()]
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _LAUNCH, json.dumps(arguments)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env={**os.environ, **_ONE_THREAD},
                )
        except OSError as error:
            raise WorkerError(
                f"a process cannot be started: {error}: give fewer --workers"
            ) from None
        self._pipe = Connection(ours.detach())

    def give_encoder(self) -> None:
        """Send it the tokenizer, once it has started."""
        # The tokenizer does not carry this setting over.
        self._say((self._encoder, self._encoder.tokenizer.encode_special_tokens))

    def wait_until_ready(self) -> None:
        """Wait until it has the tokenizer, and note how much memory it holds."""
        self.held_bytes = self._hear()

    def encode(self, batch: TextBatch) -> EncodedBatch:
        self._say(batch)
        return self._hear()

    def close(self) -> None:
        self._pipe.close()
        self._process.wait()

    def _say(self, what: object) -> None:
        try:
            self._pipe.send(what)
        except OSError:
            raise self._ended() from None

    def _hear(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self) -> WorkerError:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return WorkerError(
            f"a process that encodes ended ({how}); if memory ran out give fewer --workers; the "
            "same command goes on, what was done so far is kept"
        )


@contextmanager
def open_encoding(encoder: TextEncoder, num_workers: int) -> Iterator[Encoding]:
    """What encodes batches, while the block lasts.

    Args:
        encoder: how.
        num_workers: processes; 0 encodes in this one.

    Raises:
        WorkerError: a process cannot be started.
    """
    if num_workers == 0:
        yield Here(encoder)
        return
    with ExitStack() as stack:
        processes = []
        for _ in range(num_workers):
            processes.append(_Process(encoder))
            stack.callback(processes[-1].close)
        for process in processes:  # all of them, so that they start side by side
            process.give_encoder()
        for process in processes:
            process.wait_until_ready()
        yield Workers(processes)


def encode_batches(
    encoding: Encoding, batches: Iterable[TextBatch], *, most_bytes: int
) -> Generator[EncodedBatch, None, None]:
    """Encode batches, several at once, and give them in order.

    Args:
        encoding: what encodes them.
        batches: read one by one, as there is room.
        most_bytes: of text on its way; a batch that is larger goes alone.
    """
    waiting: deque[tuple[Future[EncodedBatch], int]] = deque()
    with ThreadPoolExecutor(max_workers=encoding.at_once, thread_name_prefix="encode") as pool:
        try:
            for batch in batches:
                while waiting and sum(size for _, size in waiting) + batch.size_bytes > most_bytes:
                    yield waiting.popleft()[0].result()
                waiting.append((pool.submit(encoding.encode, batch), batch.size_bytes))
                del batch  # or one more is held while the next is read
                if len(waiting) >= encoding.at_once + encoding.ahead:
                    yield waiting.popleft()[0].result()
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()

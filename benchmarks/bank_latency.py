"""How long a bank takes to find five memories, to read them and to decode them.

    python benchmarks/bank_latency.py --records 1000 10000 100000 1000000

The codes are random bytes of the size that `--code-bytes` says and the vectors are random, around
1,000 centres: nothing here says anything about what is found, only about how long it takes.
"vector" is what a bank does by default, compared in RAM or through its index; "exact" compares with
every row, and of the hits of the exact search the default one finds the share "agree". Five
memories of the paper's model (22 layers, 8 heads, 8 tokens, width 80) are decoded from random codes
of `Residual2x14,PQ8x10` with a rotation, by our loops and by FAISS in turns. Files are in the page
cache. 1e6 records of 2.5 kB take some 5 GB of disk.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strata.explicit.bank import Bank, records
from strata.explicit.bank.search import keep_indexed
from strata.explicit.bank.settings import EmbedderSettings
from strata.explicit.memories import Reference
from strata.explicit.settings import ExplicitMemoryConfig
from strata.ops.codec import ResidualBooks, decode_residual

BLOCK = 50_000  # rows of a commit, which is a file
WIDTH = 384
WORDS = np.array([f"word{number}" for number in range(5000)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--code-bytes", type=int, default=2500)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--exact-queries", type=int, default=20, help="of the queries")
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    parser.add_argument("--keep", type=Path, help="make banks here, go on with what is there")
    parser.add_argument("--threads", type=int, default=1, help="of torch and FAISS, not of Lance")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads; ms, p50 / p95 of {options.queries}; synthetic codes")
    columns = "records | vector | exact | agree | words | load these 5 | load any 5 | made in s"
    print(f"| {columns} |\n|{'---|' * 8}", flush=True)
    for count in options.records:
        with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
            parent = options.keep or Path(temporary)
            need = count * (options.code_bytes + 4 * WIDTH + 500) * 2
            if shutil.disk_usage(parent).free < need + 2**30:
                sys.exit(f"{count:,} records need {need / 2**30:.0f} GiB of disk: give fewer")
            row = measure(parent / f"bank{count}", count, options)
            print(f"| {count:,} | {' | '.join(row)} |", flush=True)
    decode()


def measure(path: Path, count: int, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, WIDTH), dtype=np.float32)

    def near(how_many: int) -> np.ndarray:
        noise = rng.standard_normal((how_many, WIDTH), dtype=np.float32)
        return centres[rng.integers(0, 1000, how_many)] + 0.5 * noise

    started_s = time.perf_counter()
    bank = fill(path, count, options.code_bytes, near, rng)
    made_s = time.perf_counter() - started_s
    queries, agree = near(options.queries), 0

    def timed(act: Callable[[], Any], times: list[float]) -> Any:
        begin = time.perf_counter()
        result = act()
        times.append(1e3 * (time.perf_counter() - begin))
        return result

    exact: list[float] = []
    found: list[float] = []
    words: list[float] = []
    load: list[float] = []
    load_any: list[float] = []
    batches = bank._store.scan(["id"], rows_at_once=8192)
    everybody = np.array([name for batch in batches for name in batch["id"].to_pylist()])
    bank.search(queries[0], 5)  # reads vectors, or index
    for number, query in enumerate(queries):
        fast = timed(lambda query=query: bank.search(query, 5), found)
        timed(lambda hits=fast: bank.blobs([hit.id for hit in hits]), load)
        if number < options.exact_queries:
            hits = timed(lambda query=query: bank.search(query, 5, exact=True), exact)
            agree += len({hit.id for hit in fast} & {hit.id for hit in hits})
        text = " ".join(WORDS[rng.integers(0, len(WORDS), 20)])
        timed(lambda text=text: bank.search(text, 5), words)
        ids = rng.choice(everybody, 5).tolist()  # not what was just read
        blobs = timed(lambda ids=ids: bank.blobs(ids), load_any)
        assert len(blobs) == len(set(ids))
    share = f"{agree / (5 * len(exact)):.3f}"
    how = "index" if bank.stats().vector_index else "RAM"
    times = [show(words), show(load), show(load_any)]
    return [f"{show(found)} ({how})", show(exact), share, *times, f"{made_s:.0f}"]


def fill(
    path: Path, count: int, code_bytes: int, near: Callable[[int], np.ndarray], rng: Any
) -> Any:
    """A bank of made-up rows, written as `add` writes them."""
    config = ExplicitMemoryConfig()
    if (path / "bank.json").exists():
        bank: Any = Bank.open(path)
    else:
        bank = Bank.create(path, config=config, embedder=EmbedderSettings(name="none", width=WIDTH))
    store = bank._store
    for first in range(len(bank), count, BLOCK):
        size = min(BLOCK, count - first)
        texts = [" ".join(WORDS[rng.integers(0, len(WORDS), 60)]) for _ in range(size)]
        references = [
            Reference(text, f"made/{first + n}", 0, len(text), {"shard": n % 10})
            for n, text in enumerate(texts)
        ]
        documents = [records.text_digest(text) for text in texts]
        blobs = [rng.bytes(code_bytes) for _ in range(size)]
        table = records.to_table(references, documents, near(size), blobs, store.columns)
        store.commit(store.write(table), None, "made up")
    keep_indexed(store, index_rows=bank.index_rows, all_rows=True)
    return bank


def decode() -> None:
    """Our decoder beside FAISS', in turns."""
    import faiss

    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(80, 80))[0].contiguous()
    books = ResidualBooks(torch.randn(2, 2**14, 40), torch.randn(8, 1024, 10), rotation)
    index = faiss.index_factory(80, "OPQ20_80,Residual2x14,PQ8x10")
    turn = faiss.downcast_VectorTransform(index.chain.at(0))
    inner = faiss.downcast_index(index.index)
    coarse = faiss.downcast_index(inner.q1.quantizer)
    faiss.copy_array_to_vector(rotation.numpy().ravel(), turn.A)
    faiss.copy_array_to_vector(books.coarse_mkd.numpy().ravel(), coarse.pq.centroids)
    faiss.copy_array_to_vector(books.fine_mkd.numpy().ravel(), inner.pq.centroids)
    coarse.ntotal = inner.q1.nlist = 2**28
    turn.is_trained = turn.is_orthonormal = coarse.is_trained = True
    inner.is_trained = index.is_trained = True
    codes = torch.randint(0, 256, (5 * 22 * 8 * 8 * 2, 14), dtype=torch.uint8)
    codes[:, 3] &= 15  # FAISS ends the process where these four bits are set
    faiss.omp_set_num_threads(torch.get_num_threads())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(60):
        for act, into in (
            (lambda: decode_residual(codes, books), times[0]),
            (lambda: index.sa_decode(codes.numpy()), times[1]),
        ):
            begin = time.perf_counter()
            result = act()
            into.append(1e3 * (time.perf_counter() - begin))
    difference = np.abs(np.asarray(result) - decode_residual(codes, books).numpy()).max()
    print(
        f"decode 5 memories: ours {show(times[0])}, FAISS {show(times[1])}, differ {difference:.1e}"
    )


def show(times: list[float]) -> str:
    """p50 / p95."""
    return f"{np.percentile(times, 50):.2f} / {np.percentile(times, 95):.2f}"


if __name__ == "__main__":
    main()

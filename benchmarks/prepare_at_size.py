"""`strata data prepare` on a corpus of a given size: throughput, memory, and kills.

    python benchmarks/prepare_at_size.py CORPUS... --gb 10 --tokenizer DIR --workers 0 2 --kills 10

A corpus of N GB of text is made in parquet files: documents of the CORPORA in order, again with
their number in front where these are smaller. In each round the tokenizer's own `encode_batch` runs
over a sample, right before and right after `prepare` runs over all of it, on the same cores, so
that the ratio of the two holds on a busy machine. `prepare` is timed in a fresh process from the
call on, imports excluded, with everything it does: reading, filters, shuffle, writing, hashes.
Memory is the sum over its processes: resident (RSS, which counts pages that two share twice) ten
times a second, and proportional (PSS) every two seconds, where the system tells. Then one more
folder is made by processes that are killed at random times, and its bytes are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from strata.data.manifest import sha256_of
from strata.data.prepare import PrepareConfig
from strata.data.readers import ReadOptions, read_documents
from strata.data.sources import find_sources
from strata.data.tokenizer import train_tokenizer

FILE_BYTES = 256 * 10**6
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "gopher": {"filters": {"rules": "gopher"}},
    "dedup": {"near_duplicates": 0.8},
}
CHILD = """
import json, sys, time
from pathlib import Path
from strata.data.filters import parse_rules
from strata.data.prepare import PrepareConfig, prepare
corpus, out, tokenizer = map(Path, sys.argv[1:4])
settings = json.loads(sys.argv[4])
if "filters" in settings:
    settings["filters"]["rules"] = parse_rules([settings["filters"]["rules"]])
config = PrepareConfig.model_validate(settings)
print("ready", flush=True)
sys.stdin.readline()
started_s = time.perf_counter()
manifest = prepare([corpus], out=out, tokenizer=tokenizer, config=config)
seconds = time.perf_counter() - started_s
print(json.dumps([seconds, manifest.num_tokens, sum(manifest.num_dropped.values())]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpora", type=Path, nargs="+", help="files or folders, as for prepare")
    parser.add_argument("--gb", type=float, required=True, help="text to make, in 1e9 bytes")
    parser.add_argument("--tokenizer", type=Path, help="default: one of 32,768 tokens is trained")
    parser.add_argument("--memory-gb", type=float, default=1.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--variants", nargs="+", default=["plain"], choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample-mb", type=float, default=64, help="of the bare tokenizer")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, nargs="+", help="default: all that there are")
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, set(options.cores))
    needed = options.gb * 1e9 * (0.6 + 4 * 2 / 4)  # parquet; spill and shards of two folders
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        if shutil.disk_usage(temporary).free < needed:
            sys.exit(f"{options.gb:g} GB of text need {needed / 1e9:.0f} GB of disk: give fewer")
        measure(Path(temporary), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Make the corpus, run everything and print the tables."""
    corpus = folder / "corpus"
    size, sample = make_corpus(options.corpora, corpus, options)
    tokenizer = options.tokenizer
    if tokenizer is None:
        tokenizer = folder / "tokenizer"
        share = min(1.0, 2e7 / size)
        train_tokenizer([corpus], out=tokenizer, vocab_size=32_768, sample_fraction=share)
    cores = len(os.sched_getaffinity(0))
    print(f"{size / 1e9:.3g} GB of text, memory_gb {options.memory_gb:g}, {cores} cores")
    bare = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    bare.encode_special_tokens = True
    runs = [(name, workers) for name in options.variants for workers in options.workers]
    rates: dict[Any, list[float]] = {run: [] for run in runs}
    ratios: dict[Any, list[float]] = {run: [] for run in runs}
    peaks: dict[Any, list[tuple[int, int]]] = {run: [] for run in runs}
    digests: dict[str, str] = {}
    dropped: dict[str, int] = {}
    before = encode(bare, sample)
    for number in range(options.rounds):
        for name, workers in runs:
            out = folder / "out"
            seconds, num_tokens, dropped[name], peak = run_once(
                corpus, out, tokenizer, settings_of(name, workers, options)
            )
            after = encode(bare, sample)
            rates[name, workers].append(size / seconds)
            ratios[name, workers].append(size / seconds / ((before + after) / 2))
            peaks[name, workers].append(peak)
            before = after
            digest = digest_of(out)
            if digests.setdefault(name, digest) != digest:
                sys.exit(f"{name}: {workers} workers made other bytes than the run before")
            shutil.rmtree(out)
            print(f"round {number + 1}: {name}, {workers} workers: {seconds:.1f} s", flush=True)
    print("\n| documents | workers | MB/s | of encode_batch | RSS GB | PSS GB | dropped |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, workers in runs:
        rss, pss = (max(peak[kind] for peak in peaks[name, workers]) for kind in (0, 1))
        run = (name, workers)
        print(
            f"| {name} | {workers} | {statistics.median(rates[run]) / 1e6:.2f} | "
            f"{statistics.median(ratios[run]):.2f} | {rss / 1e9:.2f} | {pss / 1e9:.2f} | "
            f"{dropped[name]:,} |"
        )
    print(f"\nthe last {num_tokens:,} tokens; equal bytes with all numbers of workers", flush=True)
    if options.kills:
        killed(folder, corpus, tokenizer, digests, options)


def make_corpus(
    corpora: list[Path], folder: Path, options: argparse.Namespace
) -> tuple[int, list[str]]:
    """Write the parquet files; give the bytes of their text and the sample."""
    folder.mkdir()
    wanted, size, in_file, sample_bytes = int(options.gb * 1e9), 0, 0, 0
    rows: list[str] = []
    sample: list[str] = []
    writer, number = None, 0
    schema = pa.schema([("text", pa.string())])
    for text in texts(corpora):
        num_bytes = len(text.encode())
        rows.append(text)
        size, in_file = size + num_bytes, in_file + num_bytes
        if sample_bytes < options.sample_mb * 1e6:
            sample.append(text)
            sample_bytes += num_bytes
        is_done = size >= wanted
        if writer is None:
            writer = pq.ParquetWriter(folder / f"{number:05d}.parquet", schema, compression="zstd")
        if len(rows) >= 1000 or is_done:
            writer.write_table(pa.table({"text": rows}, schema=schema))
            rows = []
        if in_file >= FILE_BYTES or is_done:
            writer.close()
            writer, number, in_file = None, number + 1, 0
        if is_done:
            return size, sample
    raise AssertionError("the corpora never end")


def texts(corpora: list[Path]) -> Iterator[str]:
    """The documents of the corpora, again and again; from the second time on they are others."""
    files = find_sources(corpora)
    for turn in count():
        found = False
        for file in files:
            for document in read_documents(file, options=ReadOptions()):
                if document.text:
                    found = True
                    yield f"{turn}: {document.text}" if turn else document.text
        if not found:
            sys.exit(f"no text in {files[0].path}")


def encode(bare: Tokenizer, sample: list[str]) -> float:
    """Bytes a second of the tokenizer alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    size = sum(len(text.encode()) for text in sample)
    started_s = time.perf_counter()
    for begin in range(0, len(sample), 512):
        bare.encode_batch(sample[begin : begin + 512], add_special_tokens=False)
    return size / (time.perf_counter() - started_s)


def settings_of(name: str, workers: int, options: argparse.Namespace) -> dict[str, object]:
    settings = {"memory_gb": options.memory_gb, "workers": workers, **VARIANTS[name]}
    plain = {key: value for key, value in settings.items() if key != "filters"}
    PrepareConfig.model_validate(plain)  # a mistake is said before hours are spent
    return settings


def start(corpus: Path, out: Path, tokenizer: Path, settings: dict[str, object]) -> Any:
    """A process that has imported everything and waits for a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(corpus), str(out), str(tokenizer), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def run_once(
    corpus: Path, out: Path, tokenizer: Path, settings: dict[str, object]
) -> tuple[float, int, int, tuple[int, int]]:
    """Seconds, tokens, dropped documents, and the most RSS and PSS of the processes together."""
    process = start(corpus, out, tokenizer, settings)
    print("go", file=process.stdin, flush=True)
    most_rss = most_pss = 0
    for look in count():
        if process.poll() is not None:
            break
        # PSS makes the system walk over all pages: seldom, or it would slow down what is timed.
        rss, pss = memory_of(process.pid, with_pss=look % 20 == 5)
        most_rss, most_pss = max(most_rss, rss), max(most_pss, pss)
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"prepare ended with {process.returncode}")
    seconds, num_tokens, num_dropped = json.loads(process.stdout.read())
    return seconds, num_tokens, num_dropped, (most_rss, most_pss)


def memory_of(pid: int, *, with_pss: bool) -> tuple[int, int]:
    """RSS and PSS of a process and its children, in bytes; PSS is 0 where it is not looked at."""
    rss = pss = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            rss += process.memory_info().rss
            rollup = Path(f"/proc/{process.pid}/smaps_rollup")
            if with_pss and rollup.exists():
                lines = rollup.read_text().splitlines()
                pss += 1024 * next(int(line.split()[1]) for line in lines if line[:4] == "Pss:")
    except (psutil.Error, OSError, StopIteration):
        return rss, pss  # one ended meanwhile
    return rss, pss


def killed(
    folder: Path,
    corpus: Path,
    tokenizer: Path,
    digests: dict[str, str],
    options: argparse.Namespace,
) -> None:
    """Prepare once more for each variant, killed now and then, and compare the bytes."""
    rng = random.Random(options.seed)
    for name in options.variants:
        settings = settings_of(name, options.workers[-1], options)
        out, timed = folder / "killed", folder / "timed"
        seconds = run_once(corpus, timed, tokenizer, settings)[0]
        shutil.rmtree(timed)
        kills = 0
        for _ in range(options.kills):
            process = start(corpus, out, tokenizer, settings)
            print("go", file=process.stdin, flush=True)
            try:
                process.wait(timeout=rng.uniform(0, 2 * seconds / (options.kills + 1)))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        run_once(corpus, out, tokenizer, settings)
        same = digest_of(out) == digests[name]
        shutil.rmtree(out)
        print(f"{name}: killed {kills} times, {'equal' if same else 'OTHER'} bytes", flush=True)
        if not same:
            sys.exit(1)


def digest_of(folder: Path) -> str:
    """A hash over the names and bytes of all files."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            whole.update(path.relative_to(folder).as_posix().encode())
            whole.update(sha256_of(path).encode())
    return whole.hexdigest()


if __name__ == "__main__":
    main()

"""Answers a prompt from a value table that is larger than the memory it is given.

    python benchmarks/mapped_table.py --gib 16 --cache-gb 1

Writes a random decoder with a bf16 table of that size into a temporary folder, runs `strata
generate --values mapped` on it in a process of its own, and prints its tokens/s and the peak of its
anonymous memory (the mapped file's pages, which the system may drop at any time, are not part of
that). Needs as much disk, and Linux; nothing of the table's size is ever held in memory.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from strata.layers import MemoryLayerConfig
from strata.models import ModelConfig, build
from strata.models.tensor_file import SINGLE, TensorWriter

WIDTH = 1024
HOST = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "vocab_size": 256,
}
TABLE = "model.memory_values.0.weight"
BLOCK_ROWS = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=16, help="of the table")
    parser.add_argument("--cache-gb", type=float, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    half_keys = math.isqrt(int(options.gib * 2**30) // (2 * WIDTH))
    table_bytes = half_keys**2 * WIDTH * 2
    with tempfile.TemporaryDirectory(dir=options.dir) as parent:
        free = shutil.disk_usage(parent).free
        if free < table_bytes + 2 * 2**30:
            sys.exit(f"{free / 2**30:.1f} GiB are free on the disk: give a smaller --gib")
        folder = Path(parent) / "model"
        started_s = time.perf_counter()
        write_model(folder, half_keys)
        seconds = time.perf_counter() - started_s
        size = f"{half_keys**2:,} x {WIDTH} bf16 rows, {table_bytes / 2**30:.1f} GiB"
        print(f"{size}, written in {seconds:.0f} s", flush=True)
        drop_pages(folder / SINGLE)
        for name in ("nothing of the file in memory", "once more, its pages may be there"):
            speed, peak_bytes = answer(folder, options.cache_gb, options.tokens)
            print(f"{name}: {speed}, at most {peak_bytes / 2**30:.2f} GiB anonymous", flush=True)


def write_model(folder: Path, half_keys: int) -> None:
    """A decoder of random weights with a byte-level tokenizer; the table goes by in blocks."""
    memory = MemoryLayerConfig(layers=(1, 3, 5), num_half_keys=half_keys)
    model = build(ModelConfig(host=HOST), memory, device="meta")
    model.config.save_pretrained(folder)
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    shapes[TABLE] = (torch.bfloat16, (half_keys**2, WIDTH))
    torch.manual_seed(0)
    with TensorWriter(folder / SINGLE, shapes) as writer:
        for name, (dtype, shape) in shapes.items():
            if name != TABLE:
                scales = len(shape) < 2
                writer.append(name, torch.ones(shape) if scales else torch.randn(shape) * 0.05)
                assert dtype == torch.float32
        # Equal blocks in another order of columns: random numbers for all would take minutes.
        block = (torch.randn(BLOCK_ROWS, WIDTH) * WIDTH**-0.5).bfloat16()
        for first in range(0, half_keys**2, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, half_keys**2 - first)
            writer.append(TABLE, block.roll(first // BLOCK_ROWS, dims=1)[:rows])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)


def drop_pages(path: Path) -> None:
    """Have the system forget a file that is on the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def answer(folder: Path, cache_gb: float, num_tokens: int) -> tuple[str, int]:
    """Run `strata generate`; what it says of its speed, and its peak of anonymous memory."""
    command = [sys.executable, "-c", "from strata.cli.main import main; main()", "generate"]
    command += [str(folder), "The capital of Peru is", "--max-new-tokens", str(num_tokens)]
    command += ["--values", "mapped", "--cache-gb", str(cache_gb)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, anonymous_bytes(process.pid))
        time.sleep(0.02)
    assert process.stderr is not None
    said = process.stderr.read().decode().strip().splitlines()
    if process.returncode:
        sys.exit("\n".join(said))
    return said[-1], peak_bytes


def anonymous_bytes(process_id: int) -> int:
    """A process's anonymous memory now; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()

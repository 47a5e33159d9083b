"""The peak memory of training grows with the table and its row state, and with nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

ONE_STEP = """
import resource, sys
from pathlib import Path
import torch
from strata.layers import MemoryLayerConfig, value_tables
from strata.models import ModelConfig, build
from strata.train.optim import RowOptimizer, parameter_groups

torch.set_num_threads(1)
torch.manual_seed(0)
host = dict(
    model_type="llama", hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=64, vocab_size=64, max_position_embeddings=64,
)
memory = MemoryLayerConfig(
    layers=(1, 2), num_half_keys=int(sys.argv[1]), num_heads=2, top_k=8, key_dim=16
)
model = build(ModelConfig(host=host), memory)
groups = parameter_groups(model)
optimizers = [
    torch.optim.AdamW(groups.decay + groups.no_decay, lr=1e-3),
    RowOptimizer(groups.tables, lr=1e-3, algorithm=sys.argv[2], max_norm=1.0),
]
ids = torch.randint(0, 64, (2, 32))
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
status = Path("/proc/self/status")
if status.exists():  # on Linux ru_maxrss starts from what the parent process had
    (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    print(int(line.split()[1]) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS
"""
STATE_NUMBERS_A_ROW = {"adagrad": 1, "adam": 2 * 64 + 1}


def growth(half_keys: tuple[int, int], algorithm: str) -> tuple[int, int]:
    """By how many bytes the peak grows from the small to the large table, and by how many the
    table and its state do. Both processes run at once, for imports take seconds.
    """
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_STEP, str(m), algorithm], stdout=subprocess.PIPE, text=True
        )
        for m in half_keys
    ]
    peaks = []
    for process in running:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        peaks.append(int(output))
    more_rows = half_keys[1] ** 2 - half_keys[0] ** 2
    return peaks[1] - peaks[0], more_rows * (64 + STATE_NUMBERS_A_ROW[algorithm]) * 4


def check(half_keys: tuple[int, int], algorithm: str) -> None:
    peak, owed = growth(half_keys, algorithm)
    # A dense gradient would make it 2.0, dense Adam state 4.0.
    assert 0.9 * owed < peak < 1.1 * owed


def test_from_64k_to_1m_rows() -> None:
    check((2**8, 2**10), "adagrad")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["adagrad", "adam"])
def test_from_256k_to_4m_rows(algorithm: str) -> None:
    check((2**9, 2**11), algorithm)

"""One token at a time through the KV cache, with the value table stored in every way there is.

All contestants are the same decoder and see the same tokens; only the table its memory layers read
is exchanged. Every step's tokens are others, so that a table in memory is read from memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from strata.bench.timing import race, wait_for
from strata.layers import (
    MappedTable,
    MemoryLayerConfig,
    ProductKeyMemory,
    QuantizedTable,
    RowTable,
    ValueTable,
    memory_layers,
    value_tables,
)
from strata.models import ModelConfig, build
from strata.models.storage import table_places
from strata.models.tensor_file import SINGLE, TensorWriter

_PROMPT_TOKENS = 32
IN_MEMORY = ("float32", "bfloat16", "int8", "fp8")
WARM, COLD = "mapped, warm", "mapped, cold"


@dataclass(frozen=True)
class DecodeSize:
    """A decoder with three memory layers that share one table.

    Attributes:
        half_keys: m; the table has m * m rows.
        width: of the decoder and of the rows.
        num_layers: of the decoder.
        vocab_size: of the decoder.
        batches: sequences decoded at once.
        cache_gb: for hot rows of the mapped table, GiB; holds all rows that are timed.
    """

    half_keys: int
    width: int
    num_layers: int
    vocab_size: int
    batches: tuple[int, ...]
    cache_gb: float

    def steps(self, batch: int) -> int:
        """Different steps before tokens repeat: fewer of many tokens."""
        return max(4, 64 // batch)


SIZES = {
    "small": DecodeSize(32, 64, 4, 256, (1, 8), 0.01),
    "full": DecodeSize(1024, 1024, 6, 32_000, (1, 8, 64), 1.5),
}


@dataclass(frozen=True)
class DecodeResult:
    """Decoding with one way of storing the table.

    Attributes:
        storage: how the table is held.
        batch: sequences decoded at once.
        step_ms: median time of one forward pass of one token a sequence.
        memory_ms: median time of its three memory layers together.
        memory_over_float32: memory_ms over that of the float32 table in memory.
    """

    storage: str
    batch: int
    step_ms: float
    memory_ms: float
    memory_over_float32: float

    @property
    def memory_share(self) -> float:
        """The memory layers' share of the step."""
        return self.memory_ms / self.step_ms

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {**asdict(self), "memory_share": self.memory_share}


def bench_decode(
    size: DecodeSize,
    *,
    device: torch.device,
    rounds: int = 15,
    on_progress: Callable[[str], None] | None = None,
) -> list[DecodeResult]:
    """Time decoding steps with every storage of the value table, in turns.

    Args:
        size: the decoder.
        device: where it runs; a mapped table is read on the CPU.
        rounds: steps of each contestant that count.
        on_progress: told what is done.
    """
    say = on_progress or (lambda text: None)
    say("making the decoder and its table")
    torch.manual_seed(0)
    model = _decoder(size).to(device).eval()  # type: ignore[arg-type]
    results = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        tables = _tables(model, Path(folder), size, say)
        for batch in size.batches:
            say(f"timing, {batch} tokens a step")
            results += _race(model, tables, size, batch, device=device, rounds=rounds)
    return results


def _decoder(size: DecodeSize) -> PreTrainedModel:
    host = {
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": 2816 * size.width // 1024,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": max(1, size.width // 64),
        "vocab_size": size.vocab_size,
    }
    last = size.num_layers - 1
    layers = (1, last // 2 + 1, last)
    memory = MemoryLayerConfig(layers=layers, num_half_keys=size.half_keys)
    return build(ModelConfig(host=host), memory)


def _tables(
    model: PreTrainedModel, folder: Path, size: DecodeSize, say: Callable[[str], None]
) -> dict[str, RowTable]:
    """The same rows in every storage."""
    (table,) = value_tables(model).values()
    assert isinstance(table, ValueTable)
    tables: dict[str, RowTable] = {"float32": table}
    say("storing the table in other ways")
    device = table.weight.device
    low = ValueTable(0, table.width, device=device, dtype=torch.bfloat16)
    low.weight = nn.Parameter(table.weight.bfloat16(), requires_grad=False)
    tables["bfloat16"] = low
    tables["int8"] = QuantizedTable.of(table, "int8")
    tables["fp8"] = QuantizedTable.of(table, "fp8")
    name, shape = "model.memory_values.0.weight", tuple(table.weight.shape)
    with TensorWriter(folder / SINGLE, {name: (torch.float32, shape)}) as writer:
        for block_bv in table.blocks(4096):
            writer.append(name, block_bv.cpu())
    ((rows, _),) = table_places(folder).values()
    for contestant in (WARM, COLD):
        tables[contestant] = MappedTable(rows, None, cache_bytes=int(size.cache_gb * 2**30))
    return {name: table.eval() for name, table in tables.items()}


def _race(
    model: PreTrainedModel,
    tables: dict[str, RowTable],
    size: DecodeSize,
    batch: int,
    *,
    device: torch.device,
    rounds: int,
) -> list[DecodeResult]:
    layers = [layer for _, layer in memory_layers(model)]
    steps = size.steps(batch)
    generator = torch.Generator().manual_seed(batch)
    shape = (steps, batch, 1)
    tokens_sbt = torch.randint(0, size.vocab_size, shape, generator=generator).to(device)
    prompt_bt = torch.randint(0, size.vocab_size, (batch, _PROMPT_TOKENS), generator=generator)
    cache = DynamicCache(config=model.config)
    model(prompt_bt.to(device), past_key_values=cache, use_cache=True)
    taken = dict.fromkeys(tables, 0)
    memory_ms: dict[str, list[float]] = {name: [] for name in tables}

    def contestant(name: str) -> Callable[[], None]:
        def step() -> None:
            for layer in layers:
                layer.use_tables([tables[name]])
            tokens_bt = tokens_sbt[taken[name] % steps]
            with _clock(layers, device) as spent_ms:
                model(tokens_bt, past_key_values=cache, use_cache=True)
            cache.crop(-1)
            taken[name] += 1
            memory_ms[name].append(sum(spent_ms))

        return step

    contestants = {name: contestant(name) for name in tables}
    for _ in range(steps):
        contestants[WARM]()
    cold = tables[COLD]
    assert isinstance(cold, MappedTable)
    step_ms = race(contestants, rounds=rounds, device=device, prepare={COLD: cold.forget})
    medians = {name: statistics.median(times[-rounds:]) for name, times in memory_ms.items()}
    return [
        DecodeResult(name, batch, step_ms[name], medians[name], medians[name] / medians["float32"])
        for name in tables
    ]


@contextmanager
def _clock(layers: list[Any], device: torch.device) -> Iterator[list[float]]:
    """Milliseconds of each memory layer's forward pass."""
    spent_ms: list[float] = []
    started_s = [0.0]

    def before(_module: nn.Module, _arguments: tuple[Tensor, ...]) -> None:
        wait_for(device)
        started_s[0] = time.perf_counter()

    def after(_module: nn.Module, _arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        wait_for(device)
        spent_ms.append((time.perf_counter() - started_s[0]) * 1e3)

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    assert all(isinstance(layer, ProductKeyMemory) for layer in layers)
    try:
        yield spent_ms
    finally:
        for hook in hooks:
            hook.remove()

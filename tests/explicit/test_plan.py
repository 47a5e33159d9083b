"""What is counted before a bank is made, and the page that shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import tiny_bank
from strata.explicit.bank import records, search
from strata.explicit.codec import make_codec
from strata.explicit.plan import BankPlan, encode_flops, plan_bank, searched_rows
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.sizes import host_of

PAGE = (Path(__file__).parents[2] / "docs" / "large-banks.md").read_text()
COUNT = 10**8


def decoder() -> LlamaConfig:
    """The page's."""
    code = re.search(r"decoder = LlamaConfig\((.*?)\n\)", PAGE, re.DOTALL)
    assert code is not None
    pairs = re.findall(r"(\w+)=(\d+)", code[1])
    return LlamaConfig(**{name: int(number) for name, number in pairs})


def planned(**changes: Any) -> BankPlan:
    codec = changes.pop("codec", "int4")
    given = {"num_references": COUNT, "flops_per_s": 4e14, **changes}
    return plan_bank(decoder(), ExplicitMemoryConfig(codec=codec), **given)


def rows_of(header: str) -> list[list[str]]:
    """Cells of the table that begins so."""
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_pages_storage() -> None:
    rows = rows_of("| codec | bytes a memory")
    assert len(rows) == 4
    for codec, memory, total in rows:
        plan = planned(codec=codec)
        assert memory == f"{plan.memory_bytes:,}" and total == f"{plan.disk_bytes / 1e12:.2f}"
        shape = host_of(decoder()).memory_shape(ExplicitMemoryConfig())
        assert plan.memory_bytes == make_codec(codec, shape).bytes_per_memory


def test_the_pages_reads() -> None:
    rows = rows_of("| memories in the cache")
    assert len(rows) == 3
    for share, reads, codes in rows:
        plan = planned(cache_hits=int(share.rstrip("%")) / 100)
        assert reads == f"{plan.reads_per_token:.2f}"
        assert codes == f"{plan.bytes_per_token:,.0f}"
    assert len(records.HIT_COLUMNS) == 8


def test_the_pages_other_numbers() -> None:
    plan, text = planned(), " ".join(PAGE.split())
    for said in (
        f"{plan.encode_flops / 1e9:.1f} GFLOP here",
        f"encode all in {plan.build_hours:.1f} hours",
        f"compares {searched_rows(COUNT):,} codes of the index",
        f"takes {plan.index_bytes / 1e9:.1f} GB ({search.vector_code_bytes(384)} bytes of code",
        f"{search.PROBES} of its {search.num_lists(COUNT):,} lists",
        f"whole vectors of the best {7 * search.REFINE}",
    ):
        assert said in text, said


def test_flops_are_those_of_the_layers_that_run() -> None:
    """Against torch's own count of one pass that ends where the encoder's does."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, attn_implementation="eager",
    )  # fmt: skip
    settings = ExplicitMemoryConfig(layers=(0, 1, 2), reference_tokens=64, tokens_per_head=4)
    model = AutoModelForCausalLM.from_config(config).model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 64, dtype=torch.long))
    counts = counter.get_flop_counts()
    last = sum(counts["LlamaModel.layers.2"].values())
    full = sum(sum(counts[f"LlamaModel.layers.{layer}"].values()) for layer in range(3))
    attended = 2 * 64 * 64 * 32  # one product, whole: eager attention counts what is masked
    # The last layer's output projection, feed-forward and values' product do not run.
    rest = last - (2 * 64 * 32 * (32 + 2 * 16)) - attended
    assert encode_flops(config, settings) == full - rest - 5 * attended // 2


def test_rows_weigh_what_is_planned(tmp_path: Path) -> None:
    """Text and columns of a real bank stay below what a row is planned with."""
    bank = tiny_bank.create(tmp_path / "bank")
    tiny_bank.add(bank, tiny_bank.documents(400), batch_references=2000)
    stats = bank.stats()
    data = sum(f.stat().st_size for f in (bank.path / "references.lance/data").iterdir())
    counted = stats.references * ((stats.memory_bytes or 0) + 4 * TINY_WIDTH)
    assert counted < data < counted + 1024 * stats.references


TINY_WIDTH = tiny_bank.TinyEmbedder.width


@pytest.mark.parametrize(("rows", "lists"), [(1, 1), (50_000, 112), (10**8, 5000)])
def test_lists_of_an_index(rows: int, lists: int) -> None:
    assert search.num_lists(rows) == lists

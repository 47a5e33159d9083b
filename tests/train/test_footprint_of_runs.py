"""The arithmetic of what processes hold and send; tests/distributed compares it with processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from strata.errors import ConfigError
from strata.models import build
from strata.train import Recipe
from strata.train.activations import activations
from strata.train.footprint import Footprint, Held, footprint
from strata.train.labels import head_reads_only
from strata.train.sharding import split_dim
from strata.train.shares import shares_of
from strata.train.traffic import Exchange, exchanges

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("operation", "rings", "gloo"),
    [
        ("all_gather", 750, 750),
        ("reduce_scatter", 750, 1500),
        ("all_reduce", 1500, 1500),
        ("all_to_all", 750, 750),
    ],
)
def test_what_an_exchange_sends(operation: str, rings: int, gloo: int) -> None:
    exchange = Exchange("any", operation, 1000, 4)  # type: ignore[arg-type]
    assert exchange.sent_bytes("rings") == rings
    assert exchange.sent_bytes("gloo") == gloo


def found(recipe: Recipe, *, processes: int, memory_group: int | None = None) -> Footprint:
    shares = shares_of(recipe, processes=processes, memory_group=memory_group)
    return footprint(build(recipe.model, recipe.memory, device="meta"), recipe, shares)


def test_one_process_sends_nothing(tiny_recipe: MakeRecipe) -> None:
    one = found(tiny_recipe(), processes=1)
    assert one.sent == {"rings": {}, "gloo": {}}
    held = {part.kind: part.num_bytes for part in one.held}
    assert held["value tables"] == 256 * 32 * 4
    assert held["row optimizer state"] == 256 * 4
    assert "picks of the memory group" not in held and "replica rows" not in held


def test_groups(tiny_recipe: MakeRecipe) -> None:
    """A table is split over its group, and repeated outside of it."""
    recipe = tiny_recipe("data.batch_size=16")
    for group in (1, 2, 4, 8, 16):
        of = found(recipe, processes=16, memory_group=group)
        held = {part.kind: part.num_bytes for part in of.held}
        assert held["value tables"] == 256 * 32 * 4 // group
        assert ("picks" in of.sent["rings"]) == (group > 1)
        assert ("replica rows" in of.sent["rings"]) == (group < 16)
    assert shares_of(recipe, processes=16).memory_group == 8
    assert found(recipe, processes=16).shares.replicas == 2


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"processes": 3}, "data.batch_size 4 cannot be split over 3 processes"),
        ([], {"processes": 4, "memory_group": 3}, "memory_group 3 does not divide 4"),
        (["memory.value_dim=30"], {"processes": 4}, "4 processes cannot share rows of 30"),
    ],
)
def test_refuses(
    tiny_recipe: MakeRecipe, overrides: list[str], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        found(tiny_recipe(*overrides), **options)


def test_the_most_at_once() -> None:
    held = [Held("a", 100, "always"), Held("b", 7, "passes"), Held("c", 5, "passes")]
    assert Footprint(None, [*held, Held("d", 11, "rows")], {}).peak_bytes == 112  # type: ignore[arg-type]
    assert Footprint(None, [*held, Held("d", 13, "rows")], {}).peak_bytes == 113  # type: ignore[arg-type]


def test_split_dim() -> None:
    assert split_dim((320, 32), 8) == 0
    assert split_dim((4, 2, 1024, 256), 8) == 2  # half-keys: not by heads
    assert split_dim((1, 32), 8) == 1
    assert split_dim((321, 33), 8) == 0  # filled up


def test_half_keys_are_not_filled_up(tiny_recipe: MakeRecipe) -> None:
    """Split by their 2 heads, 8 processes would gather 4 times their bytes."""
    recipe = tiny_recipe("data.batch_size=8")
    model = build(recipe.model, recipe.memory, device="meta")
    shares = shares_of(recipe, processes=8)
    assert all(shares.padded_bytes(p) == p.numel() * 4 for p in model.parameters())


def test_even_picks_read_no_more_rows_than_there_are(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("data.batch_size=4096")
    model = build(recipe.model, recipe.memory, device="meta")
    few = shares_of(tiny_recipe("data.batch_size=2", "data.sequence_tokens=2"), processes=2)
    table = model.get_decoder().memory_values[0]
    own, every = few.distinct_rows(model, table)
    assert own == every == round(256 * (1 - (255 / 256) ** 64))  # 2 processes, 2 tokens, 2 x 8
    assert shares_of(recipe, processes=2).distinct_rows(model, table) == (256, 256)


def test_replicas_that_read_most_rows_add_up_all(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("data.batch_size=16")
    model = build(recipe.model, recipe.memory, device="meta")
    for read, operations in ((32, {"all_gather"}), (33, {"all_gather", "all_reduce"})):
        shares = shares_of(recipe, processes=16, memory_group=1, rows_read=(read, 256))
        calls = [call for call in exchanges(model, shares) if call.kind == "replica rows"]
        assert {call.operation for call in calls} == operations  # how many is gathered anyhow
        whole = {32: 16 * (8 + 32 * (4 + 4 * 32)), 33: 16 * 8 + 256 * (4 + 4 * 32)}[read]
        assert sum(call.whole_bytes for call in calls) == whole


def test_health_counts_rarely(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("run.health_every=10")
    model = build(recipe.model, recipe.memory, device="meta")
    calls = exchanges(model, shares_of(recipe, processes=2))
    of_health = [call for call in calls if call.kind == "health"]
    assert [call.whole_bytes * call.per_step for call in of_health] == [256 * 4 / 10] * 2


def saved_bytes(recipe: Recipe, *, sequences: int) -> int:
    """What a real forward pass saves, storages once, weights left out."""
    model = build(recipe.model, recipe.memory).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids_bt = torch.randint(300, (sequences, recipe.data.sequence_tokens))
    ids_n = ids_bt.flatten()
    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.run.precision == "bf16"),
        head_reads_only(model, torch.arange(len(ids_n))),
    ):
        logits_nv = model(input_ids=ids_bt, use_cache=False).logits
        F.cross_entropy(logits_nv.float(), ids_n, reduction="sum")
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run.precision=bf16"],
        ["memory=null"],
        ["memory.kind=peer", "memory.gate=none"],
        ["memory.shuffle_rows=true", "memory.placement=beside", "memory.scalar_gate=sigmoid"],
        ["model.experts={num_experts: 4}", "memory=null"],
    ],
    ids=str,
)
def test_activations_are_what_a_pass_saves(tiny_recipe: MakeRecipe, overrides: list[str]) -> None:
    recipe = tiny_recipe(*overrides)
    waiting = activations(recipe, sequences=3)
    real = saved_bytes(recipe, sequences=3)
    assert waiting.saved_bytes + waiting.copied_bytes == pytest.approx(real, rel=0.01)


def test_autocast_copies_every_matrix(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("run.precision=bf16", "memory=null")
    model = build(recipe.model, None, device="meta")
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    copied = activations(recipe, sequences=1).copied_bytes
    assert copied == pytest.approx(2 * matrices, rel=0.05)


def test_checkpointing_keeps_inputs_and_one_layer(tiny_recipe: MakeRecipe) -> None:
    many = "model.host.num_hidden_layers=12"
    whole = activations(tiny_recipe(many), sequences=2)
    less = activations(tiny_recipe(many, "model.gradient_checkpointing=true"), sequences=2)
    assert less.saved_bytes < whole.saved_bytes / 3
    assert less.saved_bytes > 2 * 32 * 32 * 4 * 12  # a sequence's inputs of all layers

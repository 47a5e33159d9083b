"""RowOptimizer: what it updates, clips, saves and resumes; the sparse way beside it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from strata.layers import MemoryLayerConfig, ProductKeyMemory, ValueTable
from strata.ops import weighted_bag
from strata.train.optim import RowOptimizer, parameter_groups

ALGORITHMS = ("adagrad", "adam", "sgd")
R, V = 19, 6

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def make_table(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> ValueTable:
    torch.manual_seed(seed)
    return ValueTable(R, V, dtype=dtype)


def read(table: ValueTable, seed: int, *, n: int = 5, p: int = 3) -> Tensor:
    """A loss that reads some rows of the table."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, table.num_rows, (n, p), generator=generator)
    weights = torch.rand(n, p, generator=generator)
    target = torch.randn(n, table.width, generator=generator)
    bag = weighted_bag(table.weight, rows, weights, queue=table.active_queue)
    return (bag - target).square().sum()


def train(table: ValueTable, optimizer: torch.optim.Optimizer, seeds: Iterator[int]) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        read(table, seed).backward()
        optimizer.step()


def flatten(state: dict[str, object]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors and the numbers of an optimizer's state."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}

    def walk(name: str, node: object) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(f"{name}/{key}", child)
        elif isinstance(node, list | tuple):
            for index, child in enumerate(node):
                walk(f"{name}/{index}", child)
        elif isinstance(node, Tensor):
            tensors[name] = node
        else:
            assert node is None or isinstance(node, int | float | str), (name, node)
            numbers[name] = node  # type: ignore[assignment]

    walk("", state)
    return tensors, numbers


class TestStep:
    @each_algorithm
    def test_the_gradient_stays_none_and_the_queue_is_emptied(self, algorithm: str) -> None:
        table = make_table()
        optimizer = RowOptimizer([table], lr=0.1, algorithm=algorithm)
        before = table.weight.detach().clone()
        read(table, 1).backward()
        assert table.weight.grad is None and len(table.queue) == 1
        optimizer.step()
        assert table.weight.grad is None and len(table.queue) == 0
        changed = (table.weight.detach() != before).any(dim=1)
        assert 0 < int(changed.sum()) == optimizer.rows_updated < R
        after = table.weight.detach().clone()
        optimizer.step()  # nothing was read: nothing moves
        assert torch.equal(table.weight, after)
        assert optimizer.rows_updated == 0 and optimizer.grad_norm == 0.0

    @each_algorithm
    def test_the_loss_falls(self, algorithm: str) -> None:
        table = make_table()
        optimizer = RowOptimizer([table], lr=0.02, algorithm=algorithm)
        first = read(table, 1).item()
        train(table, optimizer, iter([1] * 30))
        assert read(table, 1).item() < 0.7 * first

    def test_micro_batches_add_up_to_one_batch(self) -> None:
        """Two backward passes and one step equal the step of the summed loss."""
        apart, together = make_table(), make_table()
        for table, losses in ((apart, ((1,), (2,))), (together, ((1, 2),))):
            optimizer = RowOptimizer([table], lr=0.1)
            for seeds in losses:
                (sum(read(table, seed, n=4 + seed) for seed in seeds) / 2).backward()  # type: ignore[union-attr]
            optimizer.step()
        torch.testing.assert_close(apart.weight, together.weight, atol=1e-6, rtol=1e-6)

    def test_closure(self) -> None:
        table = make_table()
        optimizer = RowOptimizer([table], lr=0.1)

        def closure() -> float:
            optimizer.zero_grad()
            loss = read(table, 1)
            loss.backward()
            return float(loss)

        before = table.weight.detach().clone()
        assert optimizer.step(closure) == pytest.approx(closure(), rel=1.0)
        assert not torch.equal(table.weight, before)

    def test_zero_grad_forgets_a_skipped_step(self) -> None:
        table = make_table()
        optimizer = RowOptimizer([table], lr=0.1)
        before = table.weight.detach().clone()
        read(table, 1).backward()
        optimizer.zero_grad()
        optimizer.step()
        assert torch.equal(table.weight, before)

    def test_every_backward_pass_queues_until_zero_grad(self) -> None:
        """`torch.autograd.grad(loss, inputs)` too: an operator is not told what is asked for."""
        table = make_table()
        optimizer = RowOptimizer([table], lr=0.1)
        weights = torch.rand(2, 3, requires_grad=True)
        rows = torch.randint(0, R, (2, 3))
        out = weighted_bag(table.weight, rows, weights, queue=table.active_queue)
        torch.autograd.grad(out.sum(), weights)
        assert len(table.queue) == 1
        before = table.weight.detach().clone()
        optimizer.zero_grad()
        optimizer.step()
        assert torch.equal(table.weight, before)

    def test_no_tables(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            RowOptimizer([], lr=0.1)

    def test_release_gives_the_table_back(self) -> None:
        table = make_table()
        RowOptimizer([table], lr=0.1).release()
        read(table, 1).backward()
        assert table.weight.grad is not None and table.weight.grad.is_sparse
        assert len(table.queue) == 0


class TestClipping:
    @pytest.mark.parametrize("max_norm", [0.5, 1e9])
    def test_over_all_tables_together(self, max_norm: float) -> None:
        tables = [make_table(seed=seed) for seed in (0, 1)]
        plain = [copy.deepcopy(table.weight.detach()).requires_grad_() for table in tables]
        optimizer = RowOptimizer(tables, lr=0.1, algorithm="sgd", max_norm=max_norm)
        for seed, (table, parameter) in enumerate(zip(tables, plain, strict=True)):
            read(table, seed).backward()
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randint(0, R, (5, 3), generator=generator)
            weights = torch.rand(5, 3, generator=generator)
            target = torch.randn(5, V, generator=generator)
            bag = torch.einsum("np,npv->nv", weights, parameter[rows])
            (bag - target).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(plain, max_norm)
        torch.optim.SGD(plain, lr=0.1).step()
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(float(norm), rel=1e-5)
        for table, parameter in zip(tables, plain, strict=True):
            # torch divides by norm + 1e-6
            torch.testing.assert_close(table.weight, parameter, atol=1e-5, rtol=1e-5)


class TestState:
    @each_dtype
    @each_algorithm
    def test_bit_exact_continuation_through_safetensors(
        self, algorithm: str, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        """300 steps first: a count of steps in bf16 would stop at 256."""
        whole = make_table(dtype)
        options = {"lr": 0.01, "algorithm": algorithm, "rounding": "stochastic", "seed": 5}
        optimizer = RowOptimizer([whole], **options)  # type: ignore[arg-type]
        steps = 300 if algorithm == "adam" else 5
        train(whole, optimizer, iter(range(steps)))

        state = optimizer.state_dict()
        tensors, _ = flatten(state)
        save_file(tensors, tmp_path / "state.safetensors")
        loaded = load_file(tmp_path / "state.safetensors")
        resumed = make_table(dtype, seed=9)
        resumed.weight.data.copy_(whole.weight.data)
        fresh = RowOptimizer([resumed], **options | {"lr": 0.5})  # type: ignore[arg-type]
        for name in tensors:
            _, key, index, entry = name.split("/")
            assert key == "state"
            state["state"][int(index)][entry] = loaded[name]
        fresh.load_state_dict(state)
        assert fresh.param_groups[0]["lr"] == 0.01
        for entry, tensor in fresh.state[resumed.weight].items():
            assert tensor.dtype == optimizer.state[whole.weight][entry].dtype
            assert torch.equal(tensor, optimizer.state[whole.weight][entry])

        train(whole, optimizer, iter(range(1000, 1005)))
        train(resumed, fresh, iter(range(1000, 1005)))
        assert torch.equal(whole.weight, resumed.weight)

    def test_loading_does_not_tie_two_optimizers(self) -> None:
        first, second = make_table(), make_table()
        mine = RowOptimizer([first], lr=0.1)
        train(first, mine, iter([1, 2]))
        other = RowOptimizer([second], lr=0.1)
        other.load_state_dict(mine.state_dict())
        before = {k: t.clone() for k, t in mine.state[first.weight].items()}
        train(second, other, iter([3]))
        for name, tensor in mine.state[first.weight].items():
            assert torch.equal(tensor, before[name])

    def test_state_is_one_number_a_row_for_adagrad(self) -> None:
        table = make_table()
        optimizer = RowOptimizer([table], lr=0.1)
        assert {k: tuple(t.shape) for k, t in optimizer.state[table.weight].items()} == {
            "square_sum": (R,)
        }

    def test_a_state_that_does_not_fit_is_refused(self) -> None:
        state = RowOptimizer([make_table()], lr=0.1).state_dict()
        two = RowOptimizer([make_table(), make_table()], lr=0.1)
        large = RowOptimizer([ValueTable(R + 1, V)], lr=0.1)
        adam = RowOptimizer([make_table()], lr=0.1, algorithm="adam")
        for optimizer in (two, large, adam):
            before = copy.deepcopy(flatten(optimizer.state_dict()))
            with pytest.raises(ValueError, match="another table or algorithm") as caught:
                optimizer.load_state_dict(state)
            assert "\n" not in str(caught.value)
            assert str(flatten(optimizer.state_dict())) == str(before)


def test_a_torch_scheduler_drives_it() -> None:
    table, truth = make_table(), make_table()
    optimizer = RowOptimizer([table], lr=0.1, algorithm="sgd")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        train(table, optimizer, iter([step]))
        train(truth, RowOptimizer([truth], lr=0.1 / (1 + step), algorithm="sgd"), iter([step]))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / (1 + step))
        schedule.step()
    torch.testing.assert_close(table.weight, truth.weight)


class TestWithoutRowOptimizer:
    def test_the_sparse_gradient_equals_the_queued_one(self) -> None:
        sparse, queued = make_table(), make_table()
        optimizer = RowOptimizer([queued], lr=1.0, algorithm="sgd")
        train(queued, optimizer, iter([1]))
        plain = torch.optim.SGD([sparse.weight], lr=1.0)
        train(sparse, plain, iter([1]))
        assert sparse.weight.grad is not None and sparse.weight.grad.is_sparse
        torch.testing.assert_close(sparse.weight, queued.weight, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("kind", ["SparseAdam", "SGD", "Adagrad"])
    def test_torchs_sparse_optimizers_train_it(self, kind: str) -> None:
        table = make_table()
        optimizer = getattr(torch.optim, kind)([table.weight], lr=0.02)
        first = read(table, 1).item()
        train(table, optimizer, iter([1] * 20))
        assert read(table, 1).item() < 0.8 * first

    def test_sparse_adam_equals_lazy_adam_in_the_first_step(self) -> None:
        """Later steps differ: torch counts steps for the whole table, lazy Adam for each row."""
        sparse, queued = make_table(), make_table()
        options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-10}
        train(sparse, torch.optim.SparseAdam([sparse.weight], **options), iter([1]))
        train(queued, RowOptimizer([queued], algorithm="adam", **options), iter([1]))
        torch.testing.assert_close(sparse.weight, queued.weight, atol=1e-5, rtol=1e-5)

    def test_adamw_says_that_it_cannot(self) -> None:
        table = make_table()
        optimizer = torch.optim.AdamW([table.weight])
        read(table, 1).backward()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()


class TestCopies:
    def test_a_copied_table_has_a_queue_of_its_own_and_no_optimizer_yet(self) -> None:
        table = make_table()
        optimizer = RowOptimizer([table], lr=0.1)
        twin = copy.deepcopy(table)
        assert twin.queue is not table.queue and twin.queue.number != table.queue.number
        assert not twin.queued  # nobody would empty its queue
        read(twin, 1).backward()
        assert twin.weight.grad is not None and len(table.queue) == 0
        before = table.weight.detach().clone()
        optimizer.step()
        assert torch.equal(table.weight, before)

    def test_training_a_copy_leaves_the_original(self) -> None:
        table = make_table()
        train(table, RowOptimizer([table], lr=0.1), iter([1]))
        before = table.weight.detach().clone()
        twin = copy.deepcopy(table)
        train(twin, RowOptimizer([twin], lr=0.1), iter([2]))
        assert torch.equal(table.weight, before)
        assert not torch.equal(twin.weight, before)

    def test_a_dropped_optimizer_leaves_no_growing_queue(self) -> None:
        """While it exists its tables queue; afterwards their gradient is sparse again."""
        table = make_table()
        optimizer = RowOptimizer([table], lr=0.1)
        train(table, optimizer, iter([1]))
        del optimizer
        gc.collect()
        read(table, 2).backward()
        assert len(table.queue) == 0
        assert table.weight.grad is not None and table.weight.grad.is_sparse

    def test_a_second_optimizer_takes_over(self) -> None:
        table = make_table()
        first = RowOptimizer([table], lr=0.1)
        second = RowOptimizer([table], lr=0.1)
        del first
        gc.collect()
        before = table.weight.detach().clone()
        train(table, second, iter([1]))
        assert not torch.equal(table.weight, before)


class Decoder(nn.Module):
    """Two memory layers on one table, an embedding tied to the output, a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        config = MemoryLayerConfig(
            layers=(0, 1), num_half_keys=4, top_k=2, num_heads=1, query_bias=True
        )
        self.embed = nn.Embedding(11, 8)
        self.table = ValueTable(16, 8)
        self.blocks = nn.ModuleList(
            ProductKeyMemory(8, config, self.table, own_values=False) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight


class TestParameterGroups:
    def test_each_trainable_parameter_once(self) -> None:
        model = Decoder()
        groups = parameter_groups(model)
        sorted_ids = sorted(id(p) for p in groups.decay + groups.no_decay)
        wanted = sorted(id(p) for p in model.parameters() if p is not model.table.weight)
        assert sorted_ids == wanted
        assert groups.tables == [model.table]
        assert all(p.ndim >= 2 for p in groups.decay)
        assert model.norm.weight in set(groups.no_decay)
        assert model.head.bias in set(groups.no_decay)

    def test_frozen_ones_are_left_out(self) -> None:
        model = Decoder().requires_grad_(False)
        assert parameter_groups(model).tables == []
        model.table.weight.requires_grad_(True)
        groups = parameter_groups(model)
        assert groups.decay == groups.no_decay == [] and groups.tables == [model.table]

"""Training whole models: retrofit, freezing, copies, checkpointing, precision, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import strata
from strata.errors import ModelError
from strata.layers import MemoryLayerConfig, health, track_usage, value_tables
from strata.models import ModelConfig, build
from strata.ops import reduce_uses
from strata.train.optim import RowOptimizer, parameter_groups

VOCAB = 97
Build = Callable[..., PreTrainedModel]


def batch(seed: int = 0, *, rows: int = 3, tokens: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


class Trainer:
    """AdamW and, for the tables, a RowOptimizer."""

    def __init__(self, model: PreTrainedModel, *, lr: float = 3e-3, value_lr: float = 1e-2) -> None:
        groups = parameter_groups(model)
        self.model = model.train()
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups.decay or groups.no_decay:
            self.optimizers.append(torch.optim.AdamW(groups.decay + groups.no_decay, lr=lr))
        if groups.tables:
            self.optimizers.append(RowOptimizer(groups.tables, lr=value_lr))

    def step(self, inputs: dict[str, Tensor]) -> float:
        loss = self.model(**inputs).loss
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All gradients of one step, tables' as dense tensors; every use must be queued once."""
    for table in value_tables(model).values():
        table.queued = True
    model.zero_grad()
    model(**inputs).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, table in value_tables(model).items():
        gradients[f"{name} uses"] = torch.tensor(len(table.queue))
        reduced = reduce_uses(table.queue.take())
        dense = torch.zeros(table.weight.shape, dtype=reduced.grad_uv.dtype)
        dense[reduced.rows_u] = reduced.grad_uv
        gradients[name] = dense
    return gradients


class TestRetrofit:
    """Memory beside the FFNs of a model that is trained already."""

    @pytest.fixture
    def trained(self, build_tiny: Build) -> PreTrainedModel:
        model = build_tiny(memory=None)
        trainer = Trainer(model)
        for _ in range(5):
            trainer.step(batch())
        return model.eval()

    def options(self, **more: Any) -> MemoryLayerConfig:
        base: dict[str, Any] = {
            "layers": (1, 2),
            "placement": "beside",
            "num_heads": 2,
            "top_k": 4,
            "num_half_keys": 16,
        }
        return MemoryLayerConfig(**(base | more))

    def test_a_zero_scale_changes_no_bit_at_step_0(self, trained: PreTrainedModel) -> None:
        inputs = batch(1)
        before = trained(**inputs).logits
        strata.install(trained, self.options(scalar_gate="zero"))
        assert torch.equal(trained(**inputs).logits, before)

    def test_it_learns_from_there(self, trained: PreTrainedModel) -> None:
        """The scale has a gradient at zero, and opens the way for the rest."""
        strata.install(trained, self.options(scalar_gate="zero", freeze_base=True))
        trainer = Trainer(trained, lr=3e-2)
        losses = [trainer.step(batch(1)) for _ in range(20)]
        assert losses[-1] < losses[0] - 0.1

    def test_a_sigmoid_gate_starts_nearly_shut(self, trained: PreTrainedModel) -> None:
        inputs = batch(1)
        before = trained(**inputs).loss.item()
        open_model = copy.deepcopy(trained)
        strata.install(trained, self.options(scalar_gate="sigmoid"))
        strata.install(open_model, self.options(scalar_gate="none"))
        shut = abs(trained(**inputs).loss.item() - before)
        wide = abs(open_model(**inputs).loss.item() - before)
        assert 0 < shut < 0.2 * wide  # sigmoid(-4) is 0.018

    @pytest.mark.parametrize("scalar_gate", ["zero", "sigmoid"])
    def test_a_frozen_base_keeps_every_bit(
        self, trained: PreTrainedModel, scalar_gate: str
    ) -> None:
        base = weights_of(trained)
        strata.install(trained, self.options(scalar_gate=scalar_gate, freeze_base=True))
        memory = weights_of(trained)
        trainer = Trainer(trained)
        for seed in range(4):
            trainer.step(batch(seed))
        after = weights_of(trained)
        for name, tensor in base.items():
            inside = name.replace(".mlp.", ".mlp.mlp.")
            kept = after.get(name, after.get(inside))
            assert kept is not None and torch.equal(kept, tensor), name
        moved = [n for n in after if ".memory." in n or "memory_values" in n]
        assert moved and all(not torch.equal(after[n], memory[n]) for n in moved)

    def test_only_the_table_is_trained(self, build_tiny: Build) -> None:
        """Sparse memory finetuning: everything is frozen but the values."""
        model = build_tiny()
        model.requires_grad_(False)
        for table in value_tables(model).values():
            table.weight.requires_grad_(True)
        before = weights_of(model)
        trainer = Trainer(model)
        losses = [trainer.step(batch()) for _ in range(10)]
        assert losses[-1] < losses[0]
        changed = {n for n, t in weights_of(model).items() if not torch.equal(t, before[n])}
        assert changed == {"model.memory_values.0.weight"}


class TestSeveralModels:
    def test_two_models_never_share_a_table(self, build_tiny: Build) -> None:
        first, second = build_tiny(), build_tiny()
        mine = {id(t) for t in value_tables(first).values()}
        assert mine.isdisjoint(id(t) for t in value_tables(second).values())
        before = weights_of(second)
        Trainer(first).step(batch())
        assert all(torch.equal(t, before[n]) for n, t in weights_of(second).items())

    def test_both_train_side_by_side(self, build_tiny: Build) -> None:
        """Interleaved, each goes the way it goes alone."""
        alone = build_tiny()
        twins = [copy.deepcopy(alone) for _ in range(2)]
        expected = [Trainer(alone).step(batch(s)) for s in range(1)]
        trainers = [Trainer(twin) for twin in twins]
        losses = [[trainer.step(batch(s)) for trainer in trainers] for s in range(1)]
        assert losses == [[loss, loss] for loss in expected]
        reference = weights_of(alone)
        for twin in twins:
            assert all(torch.equal(t, reference[n]) for n, t in weights_of(twin).items())

    @pytest.mark.parametrize("memory", [{}, {"kind": "peer", "gate": "none"}], ids=str)
    def test_deepcopy_is_independent(self, build_tiny: Build, memory: dict[str, Any]) -> None:
        model = build_tiny(memory=memory)
        trainer = Trainer(model)
        trainer.step(batch())
        twin = copy.deepcopy(model)
        before = weights_of(model)
        assert all(torch.equal(t, before[n]) for n, t in weights_of(twin).items())
        for one, other in zip(
            value_tables(model).values(), value_tables(twin).values(), strict=True
        ):
            assert one is not other and one.queue is not other.queue
        twin_trainer = Trainer(twin)
        twin_trainer.step(batch(1))
        assert all(torch.equal(t, before[n]) for n, t in weights_of(model).items())
        changed = weights_of(twin)
        trainer.step(batch(2))
        assert all(torch.equal(t, changed[n]) for n, t in weights_of(twin).items())
        assert not torch.equal(
            weights_of(model)["model.memory_values.0.weight"],
            before["model.memory_values.0.weight"],
        )

    def test_a_pickled_model_is_a_copy(self, build_tiny: Build) -> None:
        """As it is sent to another process; saving is `save_pretrained`'s business."""
        model = build_tiny()
        twin = pickle.loads(pickle.dumps(model))
        (mine,), (its,) = (list(value_tables(m).values()) for m in (model, twin))
        assert its.queue.number != mine.queue.number and not its.queued
        assert torch.equal(twin(**batch()).logits, model(**batch()).logits)

    def test_layers_of_a_copy_read_the_copys_table(self, build_tiny: Build) -> None:
        twin = copy.deepcopy(build_tiny())
        table = next(iter(value_tables(twin).values()))
        with torch.no_grad():
            before = twin(**batch()).logits
            table.weight.mul_(2.0)
            assert not torch.equal(twin(**batch()).logits, before)


class TestGradientCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("memory", [{}, {"kind": "peer", "gate": "none"}], ids=str)
    def test_same_gradients_each_use_once(
        self, build_tiny: Build, use_reentrant: bool, memory: dict[str, Any]
    ) -> None:
        model = build_tiny(memory=memory).train()
        plain = gradients_of(model, batch())
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        track_usage(model)
        saved = gradients_of(model, batch())
        assert plain.keys() == saved.keys()
        for name, gradient in plain.items():
            # The same operations in the same order.
            torch.testing.assert_close(saved[name], gradient, atol=1e-7, rtol=1e-6, msg=name)
        assert all(int(g) == 2 for n, g in saved.items() if n.endswith(" uses"))
        assert {h.picks for h in health(model).values()} == {3 * 12 * 8}

    def test_the_recipes_switch(self, tiny_model_config: Callable[..., ModelConfig]) -> None:
        config = tiny_model_config().model_copy(update={"gradient_checkpointing": True})
        memory = MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4)
        model = build(config, memory).train()
        assert model.is_gradient_checkpointing
        trainer = Trainer(model)
        losses = [trainer.step(batch()) for _ in range(5)]
        assert losses[-1] < losses[0]


class TestPrecision:
    def test_a_bf16_model_trains(self, build_tiny: Build) -> None:
        model = build_tiny(dtype="bfloat16")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        trainer = Trainer(model)
        losses = [trainer.step(batch()) for _ in range(15)]
        assert losses[-1] < 0.9 * losses[0]
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_bf16_autocast_trains(self, build_tiny: Build) -> None:
        model = build_tiny()
        trainer = Trainer(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [trainer.step(batch()) for _ in range(15)]
        assert losses[-1] < 0.9 * losses[0]
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_autocast_gives_nearly_the_gradients_of_fp32(self, build_tiny: Build) -> None:
        model = build_tiny(initializer_range=0.02).train()
        exact = gradients_of(model, batch())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = gradients_of(model, batch())
        name = "model.memory_values.0"
        error = (exact[name] - rough[name]).norm() / exact[name].norm()
        assert float(error) < 0.2  # bf16 activations pick some other rows near ties


def test_padding_is_not_read_for_other_rows(build_tiny: Build) -> None:
    """A row of a batch gets the logits it gets alone: memory mixes no tokens."""
    model = build_tiny().eval()
    inputs = batch()
    together = model(input_ids=inputs["input_ids"]).logits
    for row in range(3):
        alone = model(input_ids=inputs["input_ids"][row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_causality(build_tiny: Build) -> None:
    model = build_tiny().eval()
    ids = batch()["input_ids"]
    changed = ids.clone()
    changed[:, 7:] = 5
    first, second = (model(input_ids=x).logits[:, :7] for x in (ids, changed))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


def test_training_repeats_bit_for_bit(build_tiny: Build) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build_tiny(dtype="bfloat16")  # stochastic rounding included
        trainer = Trainer(model)
        for seed in range(3):
            trainer.step(batch(seed))
        runs.append(weights_of(model))
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_tied_embeddings_train(build_tiny: Build) -> None:
    model = build_tiny(tie_word_embeddings=True)
    groups = parameter_groups(model)
    ids = [id(p) for p in groups.decay + groups.no_decay]
    assert len(set(ids)) == len(ids)
    trainer = Trainer(model)
    losses = [trainer.step(batch()) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight


class TestCompiled:
    """`torch.compile` of the whole model; "aot_eager" is all of it but code generation."""

    def test_forward(self, build_tiny: Build) -> None:
        model = build_tiny().eval()
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            found = compiled(input_ids=batch()["input_ids"]).logits
            truth = model(input_ids=batch()["input_ids"]).logits
        torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("memory", [{}, {"kind": "peer", "gate": "none"}], ids=str)
    def test_a_training_step(self, build_tiny: Build, memory: dict[str, Any]) -> None:
        self.check_training(build_tiny(memory=memory), "aot_eager_decomp_partition")

    def test_only_the_table_is_trained(self, build_tiny: Build) -> None:
        """Layers whose routers are frozen owe their table gradients all the same."""
        model = build_tiny()
        model.requires_grad_(False)
        for table in value_tables(model).values():
            table.weight.requires_grad_(True)
        self.check_training(model, "aot_eager_decomp_partition")

    @pytest.mark.slow
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_inductor(self, build_tiny: Build, checkpointing: bool) -> None:
        model = build_tiny()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.compiler.config.patch(force_disable_caches=True):
            self.check_training(model, "inductor")

    def check_training(self, model: PreTrainedModel, backend: str) -> None:
        """Three steps, compiled once, and eager: the same losses, tables queued in both."""
        eager = Trainer(copy.deepcopy(model))
        trainer = Trainer(model)
        torch.compiler.reset()
        compiled = torch.compile(model, backend=backend)
        for seed in range(3):
            expected_loss = eager.model(**batch(seed)).loss
            with torch._dynamo.config.patch(error_on_recompile=seed > 0):
                loss = compiled(**batch(seed)).loss
            torch.testing.assert_close(loss, expected_loss, atol=2e-4, rtol=2e-4)
            loss.backward()
            expected_loss.backward()
            for one, other in zip(
                value_tables(model).values(), value_tables(eager.model).values(), strict=True
            ):
                assert len(one.queue) == len(other.queue) == 2
                mine, truth = (reduce_uses(table.queue.uses) for table in (one, other))
                assert torch.equal(mine.rows_u, truth.rows_u)
                torch.testing.assert_close(mine.grad_uv, truth.grad_uv, atol=1e-4, rtol=1e-3)
            for optimizer in eager.optimizers + trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def test_queues_are_told_apart_by_compiled_copies(self, build_tiny: Build) -> None:
        model = build_tiny(num_hidden_layers=2, memory={"layers": (1,)})
        twin = copy.deepcopy(model)
        trainers = [Trainer(model), Trainer(twin)]
        torch.compiler.reset()
        for one in (model, twin, model):
            torch.compile(one, backend="aot_eager")(**batch()).loss.backward()
        lengths = [
            [len(table.queue) for table in value_tables(trainer.model).values()]
            for trainer in trainers
        ]
        assert lengths == [[2], [1]]


def test_installing_twice_is_refused_and_harmless(build_tiny: Build) -> None:
    model = build_tiny().eval()
    before = model(**batch()).logits
    with pytest.raises(ModelError, match="already"):
        strata.install(model, MemoryLayerConfig(layers=(0,), num_half_keys=8, top_k=4))
    assert torch.equal(model(**batch()).logits, before)
    assert model.config.memory_layers["layers"] == [1, 2]

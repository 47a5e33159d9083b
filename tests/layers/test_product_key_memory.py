"""The memory layer, and PEER, against a dense float64 formula written from the papers alone.

Shapes: n tokens, d decoder width, h heads, m half-keys, e width of a half-key, r rows, v width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strata.layers import PEER, MemoryLayerConfig, ProductKeyMemory, ValueTable
from strata.ops import reduce_uses

N, D = 7, 10
BASE: dict[str, Any] = {
    "layers": (0,),
    "num_heads": 3,
    "top_k": 4,
    "num_half_keys": 5,
    "key_dim": 6,
    "value_dim": None,
}
# Each option once away from its default, and the paper's layers without and with Memory+.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_heads": 1, "top_k": 1},
    {"num_half_keys": 9, "top_k": 9},
    {"num_half_keys": 1, "top_k": 1},
    {"key_dim": 2, "query_norm": "none", "key_norm": "none"},  # normalised, a lone number is +-1
    {"key_dim": None},
    {"value_dim": 7},
    {"value_dim": 13, "gate": "none"},
    {"value_dim": 13, "gate": "none", "key_dim": None},
    {"query_norm": "none"},
    {"query_norm": "layer"},
    {"key_norm": "none"},
    {"key_norm": "layer"},
    {"query_norm": "none", "key_norm": "none"},
    {"gate": "none"},
    {"scalar_gate": "sigmoid"},
    {"scalar_gate": "zero"},
    {"scalar_gate": "sigmoid", "gate": "none", "placement": "beside"},
    {"query_bias": True},
    {"shuffle_rows": True, "seed": 3},
    {"num_half_keys": 6, "shuffle_rows": True, "query_bias": True, "scalar_gate": "zero"},
]
PEER_OPTIONS = [o | {"gate": "none"} for o in OPTIONS if not {"value_dim", "gate"} & set(o)]


def config_of(options: dict[str, Any], **more: Any) -> MemoryLayerConfig:
    return MemoryLayerConfig(**(BASE | options | more))


def make_layer(config: MemoryLayerConfig, dtype: torch.dtype) -> ProductKeyMemory | PEER:
    """A layer with its own tables, moved off its initial values so that no gate is shut."""
    layer: ProductKeyMemory | PEER
    if config.kind == "peer":
        down, up = (ValueTable(config.num_rows, D, dtype=dtype) for _ in range(2))
        layer = PEER(D, config, down, up, dtype=dtype)
    else:
        table = ValueTable(config.num_rows, config.value_dim or D, dtype=dtype)
        layer = ProductKeyMemory(D, config, table, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def norm(half: Tensor, kind: str, weights: dict[str, Tensor], prefix: str) -> Tensor:
    if kind == "none":
        return half
    if kind == "rms":
        root = (half.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return half / root * weights[f"{prefix}.weight"]
    centred = half - half.mean(-1, keepdim=True)
    root = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / root * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]


def dense_picks(
    weights: dict[str, Tensor], hidden_nd: Tensor, config: MemoryLayerConfig
) -> tuple[Tensor, Tensor]:
    """Rows (n, h, k) before any shuffle and their softmax weights, from all m * m scores."""
    query_nd = hidden_nd @ weights["keys.query.weight"].T
    if config.query_bias:
        query_nd = query_nd + weights["keys.query.bias"]
    keys_hsme = weights["keys.half_keys"]
    query_nhse = query_nd.view(len(hidden_nd), config.num_heads, 2, keys_hsme.shape[-1])
    query_nhse = norm(query_nhse, config.query_norm, weights, "keys.query_norm")
    keys_hsme = norm(keys_hsme, config.key_norm, weights, "keys.key_norm")
    half_nhsm = torch.einsum("nhse,hsme->nhsm", query_nhse, keys_hsme)
    scores_nhr = (half_nhsm[:, :, 0, :, None] + half_nhsm[:, :, 1, None, :]).flatten(2)
    best = scores_nhr.topk(config.top_k)
    return best.indices, best.values.softmax(-1)


def dense_layer(
    weights: dict[str, Tensor],
    hidden_nd: Tensor,
    config: MemoryLayerConfig,
    *,
    row_order: tuple[int, int] | None,
    picks_from_nd: Tensor | None = None,
    value_mask: Tensor | None = None,
) -> Tensor:
    """The whole layer; the bag is a product with the full table."""
    rows_nhk, weights_nhk = dense_picks(
        weights, hidden_nd if picks_from_nd is None else picks_from_nd, config
    )
    if row_order is not None:
        permutation_r = (torch.arange(config.num_rows) * row_order[0] + row_order[1]).remainder(
            config.num_rows
        )
        rows_nhk = permutation_r[rows_nhk]
    n = len(hidden_nd)
    if config.kind == "peer":
        units_nr = F.gelu(hidden_nd @ weights["down.weight"].T)
        weights_nhk = weights_nhk * units_nr.gather(1, rows_nhk.view(n, -1)).view_as(weights_nhk)
    assigned_nr = torch.zeros(n, config.num_rows, dtype=hidden_nd.dtype)
    assigned_nr = assigned_nr.scatter_add(1, rows_nhk.view(n, -1), weights_nhk.view(n, -1))
    out = assigned_nr @ weights["up.weight" if config.kind == "peer" else "values.weight"]
    if value_mask is not None:
        out = out * value_mask
    if config.gate == "silu":
        gate = hidden_nd @ weights["value_gate.weight"].T
        out = out * gate * gate.sigmoid()
    if "value_proj.weight" in weights:
        out = out @ weights["value_proj.weight"].T
    if config.scalar_gate == "sigmoid":
        logit = hidden_nd @ weights["scalar_gate.gate.weight"].T + weights["scalar_gate.gate.bias"]
        out = out * logit.sigmoid()
    if config.scalar_gate == "zero":
        out = out * weights["scalar_gate.scale"]
    return out


def as_float64(layer: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().double().requires_grad_() for k, p in layer.named_parameters()}


def found_gradient(layer: ProductKeyMemory | PEER, name: str) -> Tensor:
    """The gradient of a parameter, also of a table that queued it."""
    parameter = layer.get_parameter(name)
    module = layer.get_submodule(name.rpartition(".")[0])
    if isinstance(module, ValueTable) and module.queued:
        assert parameter.grad is None
        dense = torch.zeros(parameter.shape, dtype=torch.float64)
        gradients = reduce_uses(module.queue.take())
        dense[gradients.rows_u] = gradients.grad_uv.double()
        return dense
    if parameter.grad is None:
        return torch.zeros(parameter.shape, dtype=torch.float64)
    return parameter.grad.to_dense().double()


def check_layer(
    config: MemoryLayerConfig, dtype: torch.dtype, tolerance: float, *, queued: bool = False
) -> None:
    layer = make_layer(config, dtype)
    for table in layer.modules():
        if isinstance(table, ValueTable):
            table.queued = queued
    weights64 = as_float64(layer)
    assert ("value_proj.weight" in weights64) == (
        config.kind == "product_key"
        and (config.gate == "silu" or config.value_dim not in (None, D))
    )
    hidden = torch.randn(1, N, D, dtype=dtype, requires_grad=True)
    hidden64 = hidden.detach().double().view(N, D).requires_grad_()

    out = layer(hidden)
    truth = dense_layer(weights64, hidden64, config, row_order=layer.keys.row_order)
    assert out.shape == (1, N, D) and out.dtype == dtype
    cotangent = torch.randn(N, D, dtype=torch.float64)
    out.backward(cotangent.to(dtype).view_as(out))
    truth.backward(cotangent)

    assert hidden.grad is not None and hidden64.grad is not None
    pairs = {"out": (out[0], truth), "hidden": (hidden.grad[0], hidden64.grad)}
    for name, parameter in weights64.items():
        wanted = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        pairs[name] = (found_gradient(layer, name), wanted)
    for name, (mine, wanted) in pairs.items():
        scale = max(1.0, float(wanted.detach().abs().amax()))
        error = float((mine.double() - wanted).detach().abs().amax())
        assert error <= tolerance * scale, f"{name}: off by {error} of {scale}"


# fp64: rounding only. fp32: a chain of some ten sums of some ten terms.
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 5e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_layer(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    check_layer(config_of(options), dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("options", PEER_OPTIONS, ids=str)
def test_peer(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    check_layer(config_of(options, kind="peer"), dtype, tolerance)


@pytest.mark.parametrize("kind", ["product_key", "peer"])
def test_queued_gradients(kind: str) -> None:
    config = config_of({"gate": "none", "kind": kind})
    check_layer(config, torch.float64, 1e-10, queued=True)


@pytest.mark.parametrize("options", [{"gate": "silu"}, {"kind": "peer", "gate": "none"}], ids=str)
def test_dropout_in_training_only(options: dict[str, Any]) -> None:
    """Input dropout reaches the picks alone, value dropout the bag; both scale what is left."""
    config = config_of(options, input_dropout=0.3, value_dropout=0.5)
    layer = make_layer(config, torch.float64)
    weights64 = as_float64(layer)
    hidden = torch.randn(N, D, dtype=torch.float64)
    order = layer.keys.row_order

    torch.manual_seed(11)
    out = layer.train()(hidden)
    torch.manual_seed(11)  # the layer draws the input's mask first, then the bag's
    dropped = F.dropout(hidden, 0.3)
    mask = F.dropout(torch.ones(N, D, dtype=torch.float64), 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    truth = dense_layer(
        weights64, hidden, config, row_order=order, picks_from_nd=dropped, value_mask=mask
    )
    torch.testing.assert_close(out, truth, atol=1e-10, rtol=1e-10)

    out = layer.eval()(hidden)
    truth = dense_layer(weights64, hidden, config, row_order=order)
    torch.testing.assert_close(out, truth, atol=1e-10, rtol=1e-10)


class TestShuffledRows:
    @pytest.mark.parametrize("num_half_keys", [1, 2, 6, 7, 32])
    def test_it_is_a_bijection(self, num_half_keys: int) -> None:
        for seed in range(20):
            config = config_of(
                {"num_half_keys": num_half_keys, "top_k": 1, "shuffle_rows": True, "seed": seed}
            )
            order = make_layer(config, torch.float32).keys.row_order
            assert order is not None
            rows = (torch.arange(config.num_rows) * order[0] + order[1]) % config.num_rows
            assert torch.equal(rows.sort().values, torch.arange(config.num_rows))

    def test_it_depends_on_the_seed_alone(self) -> None:
        orders = []
        for seed in (0, 0, 1):
            torch.randn(3)  # the global generator has no part in it
            config = config_of({"num_half_keys": 30, "shuffle_rows": True, "seed": seed})
            orders.append(make_layer(config, torch.float32).keys.row_order)
        assert orders[0] == orders[1] != orders[2]

    def test_the_largest_table_does_not_overflow(self) -> None:
        """2**26 rows: factor * row is below 2**52. The order is drawn on the meta device too."""
        config = config_of({"num_half_keys": 8192, "top_k": 1, "shuffle_rows": True})
        with torch.device("meta"):
            table = ValueTable(config.num_rows, D)
            order = ProductKeyMemory(D, config, table).keys.row_order
        assert order is not None
        assert (order[0] * (config.num_rows - 1) + order[1]) < 2**63


class TestPrecision:
    def test_low_precision_layer_sums_in_fp32(self) -> None:
        """A bf16 layer's bag is exact to bf16's last bit, given its picks."""
        config = config_of({"gate": "none", "num_half_keys": 16, "top_k": 16, "num_heads": 4})
        layer = make_layer(config, torch.bfloat16)
        assert isinstance(layer, ProductKeyMemory)
        hidden = torch.randn(N, D, dtype=torch.bfloat16)
        rows_np, weights_np = layer.keys(hidden)
        assert weights_np.dtype == torch.float32
        gathered = layer.table.weight.detach().double()[rows_np]
        truth = torch.einsum("np,npv->nv", weights_np.detach().double(), gathered)
        out = layer(hidden)
        assert out.dtype == torch.bfloat16
        # One rounding to bf16, half of 2**-7 relative, after an fp32 sum.
        torch.testing.assert_close(out.double(), truth, rtol=2**-8, atol=1e-6)

    @pytest.mark.parametrize("kind", ["product_key", "peer"])
    def test_autocast_keeps_weights_and_queue_in_fp32(self, kind: str) -> None:
        config = config_of({"kind": kind, "gate": "none" if kind == "peer" else "silu"})
        layer = make_layer(config, torch.float32)
        tables = [m for m in layer.modules() if isinstance(m, ValueTable)]
        for table in tables:
            table.queued = True
        hidden = torch.randn(N, D, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, weights_np = layer.keys(hidden)
            out = layer(hidden)
        assert weights_np.dtype == torch.float32
        sums = weights_np.view(N, config.num_heads, -1).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert out.dtype == torch.float32
        out.sum().backward()
        for table in tables:
            (use,) = table.queue.take()
            assert use.weights_np.dtype == use.grad_out_nv.dtype == torch.float32
        for name, parameter in layer.named_parameters():
            if not name.startswith(("values", "down", "up")):
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_initial_scores_have_unit_deviation() -> None:
    """A softmax over the picks must start neither one-hot nor flat."""
    for query_norm, key_norm in (("rms", "rms"), ("layer", "layer")):
        config = MemoryLayerConfig(
            layers=(0,),
            num_half_keys=64,
            top_k=8,
            key_dim=128,
            query_norm=query_norm,
            key_norm=key_norm,
        )
        layer = ProductKeyMemory(256, config, ValueTable(config.num_rows, 256))
        query = layer.keys.query_norm(
            layer.keys.query(torch.randn(500, 256)).unflatten(-1, (4, 2, 64))
        )
        half = torch.einsum("nhsd,hsmd->nhsm", query, layer.keys.key_norm(layer.keys.half_keys))
        assert half.std().item() == pytest.approx(1.0, abs=0.1)


def test_initial_values() -> None:
    """Values N(0, 1/sqrt(v)), keys U(+-1/sqrt(key_dim)), projections N(0, 1/sqrt(in))."""
    config = MemoryLayerConfig(
        layers=(0,), num_half_keys=32, top_k=4, key_dim=64, value_dim=100, scalar_gate="sigmoid"
    )
    layer = ProductKeyMemory(200, config, ValueTable(config.num_rows, 100))
    assert float(layer.table.weight.std()) == pytest.approx(100**-0.5, rel=0.02)
    assert 0.98 * 64**-0.5 < float(layer.keys.half_keys.abs().max()) <= 64**-0.5
    assert layer.value_gate is not None and layer.value_proj is not None
    assert float(layer.value_gate.weight.std()) == pytest.approx(200**-0.5, rel=0.02)
    assert float(layer.value_proj.weight.std()) == pytest.approx(100**-0.5, rel=0.02)
    assert float(layer.scalar_gate.gate.weight.abs().max()) == 0.0
    assert float(layer.scalar_gate.gate.bias) == 0.0
    beside = config.model_copy(update={"placement": "beside"})
    layer = ProductKeyMemory(200, beside, ValueTable(config.num_rows, 100))
    assert float(layer.scalar_gate.gate.bias) == -4.0


def test_two_layers_add_their_gradients_to_a_shared_table() -> None:
    """The second layer reads what the first put out, both from one table."""
    config = config_of({})
    first = make_layer(config, torch.float64)
    assert isinstance(first, ProductKeyMemory)
    second = ProductKeyMemory(D, config, first.table, own_values=False, dtype=torch.float64)
    first64 = as_float64(first)
    second64 = as_float64(second) | {"values.weight": first64["values.weight"]}
    hidden = torch.randn(N, D, dtype=torch.float64)

    def loss64() -> Tensor:
        middle = hidden + dense_layer(first64, hidden, config, row_order=None)
        return (middle + dense_layer(second64, middle, config, row_order=None)).square().sum()

    def loss() -> Tensor:
        middle = hidden + first(hidden)
        return (middle + second(middle)).square().sum()

    loss64().backward()
    truth = first64["values.weight"].grad
    loss().backward()
    assert first.table.weight.grad is not None
    sparse = first.table.weight.grad.to_dense()
    torch.testing.assert_close(sparse, truth, atol=1e-9, rtol=1e-9)

    first.table.weight.grad = None
    first.table.queued = True
    loss().backward()
    assert len(first.table.queue) == 2
    dense = torch.zeros_like(sparse)
    gradients = reduce_uses(first.table.queue.take())
    dense[gradients.rows_u] = gradients.grad_uv
    torch.testing.assert_close(dense, truth, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["product_key", "peer"])
@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (D,), (2, 3, D)])
def test_any_leading_shape(kind: str, shape: tuple[int, ...]) -> None:
    config = config_of({"kind": kind, "gate": "none" if kind == "peer" else "silu"})
    layer = make_layer(config, torch.float32)
    out = layer(torch.randn(shape))
    assert out.shape == shape
    out.sum().backward()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("kind", ["product_key", "peer"])
def test_nothing_uninitialised_is_read(kind: str) -> None:
    config = config_of({"kind": kind, "gate": "none"}, query_bias=True, scalar_gate="sigmoid")
    check_layer(config, torch.float64, 1e-10, queued=True)
    layer = make_layer(config, torch.float32)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_compiles_whole() -> None:
    for kind in ("product_key", "peer"):
        config = config_of({"kind": kind, "gate": "none"}, scalar_gate="sigmoid")
        layer = make_layer(config, torch.float64)
        for table in layer.modules():
            if isinstance(table, ValueTable):
                table.queued = True
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        hidden = torch.randn(N, D, dtype=torch.float64)
        torch.testing.assert_close(compiled(hidden), layer(hidden), atol=1e-10, rtol=1e-10)
        compiled(hidden).square().sum().backward()
        tables = [m for m in layer.modules() if isinstance(m, ValueTable)]
        assert [len(table.queue) for table in tables] == [1] * len(tables)

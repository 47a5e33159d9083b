"""Putting memory into a decoder: the modules only; saving and opening are the models room's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from strata.errors import ConfigError, ModelError
from strata.layers.collectives import Group
from strata.layers.config import MemoryLayerConfig
from strata.layers.peer import PEER
from strata.layers.product_key import ProductKeyMemory
from strata.layers.sharded import ShardedTable
from strata.layers.stored import QuantizedTable
from strata.layers.values import Factory, RowTable, ValueTable

# Makes the table of a number: `make(0)` is what becomes `memory_values.0`.
MakeTable = Callable[[int], RowTable]

TABLES = "memory_values"  # where the decoder keeps its value tables, each exactly once


class Beside(nn.Module):
    """A trained FFN with a memory added to it: y = mlp(x) + memory(x)."""

    def __init__(self, mlp: nn.Module, memory: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.memory = memory

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden) + self.memory(hidden)


def insert_memory(
    model: nn.Module,
    config: MemoryLayerConfig,
    *,
    make_table: MakeTable | None = None,
    group: Group | None = None,
) -> None:
    """Put memory layers into a Hugging Face decoder, in place.

    Each named layer's `mlp` is replaced, or kept with the memory beside it. Value tables become
    children of the decoder (`memory_values.0`, ...), so a checkpoint holds a shared table once.
    New weights take the device of the replaced layer's weights and their dtype.

    Args:
        model: the decoder.
        config: which layers, and what kind of memory.
        make_table: where the value tables come from; None makes new ones.
        group: processes that hold new tables together, by columns; None for whole ones.

    Raises:
        ConfigError: a layer index is out of range, or a width cannot be met.
        ModelError: the model is not a decoder with `layers[i].mlp`, or has memory already.
    """
    decoder, layers = _decoder(model)
    if hasattr(decoder, TABLES):
        raise ModelError("this model has memory layers already: install into a model without")
    wrong = [index for index in config.layers if index >= len(layers)]
    if wrong:
        raise ConfigError(
            f"memory.layers names layer {wrong[0]}, the decoder has {len(layers)}: "
            f"0..{len(layers) - 1} are allowed"
        )
    hidden_dim = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
    if config.kind == "peer" and config.value_dim not in (None, hidden_dim):
        raise ConfigError(
            f"memory.value_dim {config.value_dim} does not fit a PEER layer: its experts have the "
            f"decoder's width {hidden_dim}, leave value_dim out"
        )
    if config.freeze_base:
        model.requires_grad_(False)

    tables = nn.ModuleList()
    per_layer = 2 if config.kind == "peer" else 1
    width = config.value_dim or hidden_dim
    for place, index in enumerate(config.layers):
        layer = layers[index]
        old = layer.get_submodule("mlp")
        sample = next(old.parameters())
        if place == 0 or not config.share_values:
            for _ in range(per_layer):
                if make_table is None:
                    tables.append(_new_table(config, width, sample, group))
                else:
                    tables.append(make_table(len(tables)))
        mine = [t for t in tables[-per_layer:] if isinstance(t, RowTable)]
        memory = _memory(hidden_dim, config, mine, sample)
        new = memory if config.placement == "replace" else Beside(old, memory)
        layer.set_submodule("mlp", new.train(model.training))
    setattr(decoder, TABLES, tables.train(model.training))


def value_tables(model: nn.Module) -> dict[str, RowTable]:
    """The value tables in a model by name, each once however many layers share it."""
    return {name: m for name, m in model.named_modules() if isinstance(m, RowTable)}


def replace_tables(model: nn.Module, make: Callable[[RowTable], RowTable]) -> None:
    """Put another table in the place of each, wherever a layer reads it, one after the other.

    Args:
        model: any module with memory layers.
        make: gives the new table of an old one, of the same size.
    """
    for name in list(value_tables(model)):
        old = model.get_submodule(name)
        assert isinstance(old, RowTable)
        new = make(old)
        for module in list(model.modules()):
            if isinstance(module, ProductKeyMemory | PEER) and old in module.tables:
                module.use_tables([new if t is old else t for t in module.tables])
        if model.get_submodule(name) is old:
            model.set_submodule(name, new)


def _new_table(
    config: MemoryLayerConfig, width: int, sample: Tensor, group: Group | None
) -> RowTable:
    if config.value_storage == "float":
        factory: Factory = {"device": sample.device, "dtype": sample.dtype}
        if group is not None:
            return ShardedTable(config.num_rows, width, group, **factory)
        return ValueTable(config.num_rows, width, **factory)
    return QuantizedTable(config.num_rows, width, config.value_storage, device=sample.device)


def _memory(
    hidden_dim: int, config: MemoryLayerConfig, tables: list[RowTable], sample: Tensor
) -> ProductKeyMemory | PEER:
    factory: Factory = {"device": sample.device, "dtype": sample.dtype}
    if config.kind == "peer":
        down, up = tables
        return PEER(hidden_dim, config, down, up, own_values=False, **factory)
    return ProductKeyMemory(hidden_dim, config, tables[0], own_values=False, **factory)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a decoder, each with an `mlp`.

    Raises:
        ModelError: it has none such.
    """
    return _decoder(model)[1]


def _decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(x, "mlp") for x in layers):
        raise ModelError(
            f"{type(model).__name__} has no layers[i].mlp to replace: strata takes "
            "decoders of the Llama, Qwen, Mistral, Gemma and OLMo kind"
        )
    return decoder, layers

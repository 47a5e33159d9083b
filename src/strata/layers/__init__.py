"""Memory layers: product keys, value tables, PEER; experts; their installation into a decoder.

May import ops only.
"""

from strata.layers.config import MemoryLayerConfig
from strata.layers.experts import Experts, ExpertsConfig, insert_experts
from strata.layers.health import LayerHealth, health, memory_layers, sum_usage, track_usage
from strata.layers.install import MakeTable, insert_memory, replace_tables, value_tables
from strata.layers.keys import ProductKeys
from strata.layers.mapped import MappedTable, cache_counts
from strata.layers.peer import PEER
from strata.layers.product_key import ProductKeyMemory
from strata.layers.row_file import RowPlace
from strata.layers.sharded import ShardedTable
from strata.layers.stored import QuantizedTable, ReadOnlyTable
from strata.layers.values import RowTable, ValueTable

__all__ = [
    "PEER",
    "Experts",
    "ExpertsConfig",
    "LayerHealth",
    "MakeTable",
    "MappedTable",
    "MemoryLayerConfig",
    "ProductKeyMemory",
    "ProductKeys",
    "QuantizedTable",
    "ReadOnlyTable",
    "RowPlace",
    "RowTable",
    "ShardedTable",
    "ValueTable",
    "cache_counts",
    "health",
    "insert_experts",
    "insert_memory",
    "memory_layers",
    "replace_tables",
    "sum_usage",
    "track_usage",
    "value_tables",
]

"""Memory layers: product keys, value tables, PEER, and their installation into a decoder.

May import ops only.
"""

from strata.layers.config import MemoryLayerConfig
from strata.layers.health import LayerHealth, health, memory_layers, track_usage
from strata.layers.install import insert_memory, value_tables
from strata.layers.keys import ProductKeys
from strata.layers.peer import PEER
from strata.layers.product_key import ProductKeyMemory
from strata.layers.values import ValueTable

__all__ = [
    "PEER",
    "LayerHealth",
    "MemoryLayerConfig",
    "ProductKeyMemory",
    "ProductKeys",
    "ValueTable",
    "health",
    "insert_memory",
    "memory_layers",
    "track_usage",
    "value_tables",
]

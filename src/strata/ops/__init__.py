"""Hot operations of memory layers: one folder each, `reference.py` is the truth.

    product_key_topk   queries and two half-key codebooks -> the best rows of the product table
    weighted_bag       rows and weights -> weighted sums of table rows, and its adjoint `row_dots`
    quantized_rows     rows as int8 or fp8 codes with a scale each, and bags over them
    rms_norm           half queries and half-keys, normalised
    row_cache          which rows of a table on disk are in memory, and who makes room
    memory_attention   attention of a text over its context and what each chunk of it reads
    row_update         queued uses of a table -> one in-place update of the rows that were read

This room imports nothing else of strata.
"""

from strata.ops.product_key_topk import product_key_topk
from strata.ops.row_update import RowGradients, Use, collect_uses, reduce_uses, row_update
from strata.ops.weighted_bag import UseQueue, row_dots, weighted_bag

__all__ = [
    "RowGradients",
    "Use",
    "UseQueue",
    "collect_uses",
    "product_key_topk",
    "reduce_uses",
    "row_dots",
    "row_update",
    "weighted_bag",
]

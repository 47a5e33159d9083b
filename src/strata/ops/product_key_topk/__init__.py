"""Product-key top-k: the best rows of a table of M * M rows, found from two lists of M scores."""

from strata.ops.product_key_topk.reference import (
    num_staircase_pairs,
    pick_pairs,
    product_key_topk,
    score_halves,
)

__all__ = [
    "num_staircase_pairs",
    "pick_pairs",
    "product_key_topk",
    "score_halves",
]

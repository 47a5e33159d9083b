"""Product-key top-k in plain torch.

Shapes: n tokens, h heads, s = 2 halves, m half-keys per codebook, d width of a half-key, k picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strata.ops.precision import accumulation_dtype, without_autocast
from strata.ops.weighted_bag import bag_forward, row_gradients


def pick_rows(half_scores_nhsm: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Pick the best rows by the sum of their half scores.

    Args:
        half_scores_nhsm: (n, h, 2, m).
        top_k: 1..m.

    Returns:
        scores_nhk: the sums, descending, in the dtype of the half scores.
        rows_nhk: first half-key times m plus second, int64.
    """
    first_nhk, second_nhk = pick_pairs(half_scores_nhsm, top_k).unbind(-1)
    scores_nhk = half_scores_nhsm[:, :, 0].gather(-1, first_nhk)
    scores_nhk += half_scores_nhsm[:, :, 1].gather(-1, second_nhk)
    return scores_nhk, first_nhk * half_scores_nhsm.shape[-1] + second_nhk


def score_halves(query_nhsd: Tensor, keys_hsmd: Tensor) -> Tensor:
    """Score each half of each query against its codebook: (n, h, 2, m) in fp32 or fp64.

    Not contiguous: in memory the scores of one codebook lie together.
    """
    wide = accumulation_dtype(query_nhsd)
    with without_autocast(query_nhsd.device):
        n, h, s, d = query_nhsd.shape
        m = keys_hsmd.shape[2]
        query_bnd = query_nhsd.to(wide).reshape(n, h * s, d).transpose(0, 1)
        keys_bdm = keys_hsmd.to(wide).reshape(h * s, m, d).transpose(1, 2)
        return torch.bmm(query_bnd, keys_bdm).view(h, s, n, m).permute(2, 0, 1, 3)


def pick_pairs(half_scores_nhsm: Tensor, top_k: int) -> Tensor:
    """Pick the top-k pairs of half-keys by the sum of their scores, best first.

    With both half lists sorted, pair (i, j) is beaten by the (i + 1)(j + 1) - 1 pairs above and
    left of it, so only pairs with (i + 1)(j + 1) <= k can win: the staircase, exact, 119 of 1,024
    pairs at k = 32. It holds for additive scores only.

    Args:
        half_scores_nhsm: (n, h, 2, m), descending order not required.
        top_k: 1..m.

    Returns:
        Half-key indices (n, h, k, 2), int64.
    """
    best_nhsk, index_nhsk = half_scores_nhsm.topk(top_k, dim=-1)
    left_p, right_p = _staircase(top_k, half_scores_nhsm.device)
    sums_nhp = best_nhsk[:, :, 0].index_select(-1, left_p)
    sums_nhp += best_nhsk[:, :, 1].index_select(-1, right_p)
    winners_nhk = sums_nhp.topk(top_k, dim=-1).indices
    first_nhk = index_nhsk[:, :, 0].gather(-1, left_p[winners_nhk])
    second_nhk = index_nhsk[:, :, 1].gather(-1, right_p[winners_nhk])
    return torch.stack((first_nhk, second_nhk), dim=-1)


def half_key_gradients(
    grad_scores_nhk: Tensor, query_nhsd: Tensor, keys_hsmd: Tensor, rows_nhk: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the picked scores to the queries (n, h, 2, d) and half-keys (h, 2, m, d).

    All half-keys make one list of h * 2 * m rows, of which every half query is a bag of k.
    """
    n, h, s, d = query_nhsd.shape
    m, k = keys_hsmd.shape[2], rows_nhk.shape[2]
    halves_nhsk = torch.stack((rows_nhk // m, rows_nhk % m), dim=2)
    codebooks_hs1 = torch.arange(h * s, device=rows_nhk.device).view(h, s, 1) * m
    picks_qk = (halves_nhsk + codebooks_hs1).view(n * h * s, k)
    weights_qk = grad_scores_nhk[:, :, None].expand(n, h, s, k).reshape(n * h * s, k)
    flat_keys = keys_hsmd.reshape(h * s * m, d)
    grad_query = bag_forward(flat_keys, picks_qk, weights_qk).view(n, h, s, d)
    rows_u, grad_ud = row_gradients(picks_qk, weights_qk, query_nhsd.reshape(n * h * s, d))
    grad_keys = torch.zeros_like(flat_keys)
    grad_keys[rows_u] = grad_ud
    return grad_query, grad_keys.view(h, s, m, d)


def num_staircase_pairs(top_k: int) -> int:
    """Pairs that stage 2 has to look at: the sum of top_k // i over i = 1..top_k."""
    return sum(top_k // i for i in range(1, top_k + 1))


def _staircase(top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) with (i + 1)(j + 1) <= top_k, row by row, made where they are used.

    Not cached: a few tiny kernels cost less than a copy from the host, and a cached tensor would
    outlive the fake, inference or compiled mode it was made in.
    """
    i_k = torch.arange(top_k, device=device)
    width_k = top_k // (i_k + 1)
    left_p = i_k.repeat_interleave(width_k, output_size=num_staircase_pairs(top_k))
    starts_k = width_k.cumsum(0) - width_k
    right_p = torch.arange(len(left_p), device=device) - starts_k[left_p]
    return left_p, right_p

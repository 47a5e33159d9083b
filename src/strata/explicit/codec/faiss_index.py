"""Inside a FAISS index: its codebooks, and how they are trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from strata.explicit.extras import require
from strata.ops.codec import ResidualBooks

VECTORS_AT_ONCE = 1024  # FAISS holds a distance to every centroid for each


def residual_books(index: Any) -> ResidualBooks | None:
    """The codebooks of a trained index, if it is of the form that our loops read."""
    faiss = require("faiss", extra="bank", purpose="this codec")
    transform, inner = _parts(index)
    if not isinstance(inner, faiss.Index2Layer):
        return None
    coarse = faiss.downcast_index(inner.q1.quantizer)
    if not isinstance(coarse, faiss.MultiIndexQuantizer):
        return None
    rotation = None
    if transform is not None:
        # Written and read again, an OPQ matrix is a plain linear transform.
        linear = isinstance(transform, faiss.LinearTransform) and not transform.have_bias
        if not linear or not transform.is_orthonormal or transform.d_in != transform.d_out:
            return None
        matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
        rotation = torch.from_numpy(matrix).clone()

    def book(pq: Any) -> Tensor:
        entries = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
        return torch.from_numpy(entries).clone()

    books = ResidualBooks(book(coarse.pq), book(inner.pq), rotation)
    fits = books.coarse_bytes == inner.code_size_1 and books.code_bytes == inner.code_size
    return books if fits else None


def rotates(index: Any) -> bool:
    """Whether it mixes the numbers of a vector before it codes them."""
    return _parts(index)[0] is not None


def codebook_sizes(index: Any) -> list[int]:
    """How many entries each codebook that training fits will have."""
    faiss = require("faiss", extra="bank", purpose="this codec")
    transform, inner = _parts(index)
    sizes = [int(pq.ksub) for pq in _quantizers(index)]
    if isinstance(transform, faiss.OPQMatrix):
        sizes.append(256)  # it fits a product quantizer of 8 bits meanwhile
    if hasattr(inner, "nlist"):
        sizes.append(int(inner.nlist))
    return sizes


def train_quietly(index: Any, vectors_qd: np.ndarray, *, iterations: int, seed: int) -> None:
    """Train without FAISS' warnings about small samples, and in bounded memory."""
    faiss = require("faiss", extra="bank", purpose="this codec")
    transform, inner = _parts(index)
    if isinstance(inner, faiss.IndexPQ):
        # It would number the entries so that near ones have alike bits, for a search that codes
        # never see: 27 s for 16 codebooks whose k-means takes half a second.
        inner.do_polysemous_training = False
    quantizers = _quantizers(index)
    for_rotation = None
    if isinstance(transform, faiss.OPQMatrix):
        for_rotation = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
        transform.pq, transform.niter = for_rotation, min(transform.niter, 5 * iterations)
        quantizers.append(for_rotation)
    for pq in quantizers:
        pq.cp.niter, pq.cp.seed, pq.cp.min_points_per_centroid = iterations, seed + 1, 1
    before = (
        faiss.cvar.multi_index_quantizer_search_bs,
        faiss.cvar.product_quantizer_compute_codes_bs,
    )
    # Else FAISS holds a distance to each of 2 x 16,384 centroids for 32,768 vectors: 4 GiB.
    faiss.cvar.multi_index_quantizer_search_bs = VECTORS_AT_ONCE
    faiss.cvar.product_quantizer_compute_codes_bs = VECTORS_AT_ONCE
    try:
        index.train(vectors_qd)
    finally:
        faiss.cvar.multi_index_quantizer_search_bs = before[0]
        faiss.cvar.product_quantizer_compute_codes_bs = before[1]
        if for_rotation is not None:
            transform.pq = None  # ours, and about to go


def faiss_says(error: RuntimeError) -> str:
    """What FAISS means, without its source file."""
    return str(error).rpartition("Error: ")[2].rpartition(": ")[2].strip() or "unknown fault"


def _quantizers(index: Any) -> list[Any]:
    """Product quantizers inside an index, whose codebooks k-means fits."""
    faiss = require("faiss", extra="bank", purpose="this codec")
    _, inner = _parts(index)
    found = [inner.pq] if hasattr(inner, "pq") else []
    if isinstance(inner, faiss.Index2Layer):
        coarse = faiss.downcast_index(inner.q1.quantizer)
        found += [coarse.pq] if hasattr(coarse, "pq") else []
    return found


def _parts(index: Any) -> tuple[Any, Any]:
    """(linear transform or None, what follows it) of a FAISS index."""
    faiss = require("faiss", extra="bank", purpose="this codec")
    if not isinstance(index, faiss.IndexPreTransform):
        return None, index
    if index.chain.size() != 1:
        return None, None
    return faiss.downcast_VectorTransform(index.chain.at(0)), faiss.downcast_index(index.index)

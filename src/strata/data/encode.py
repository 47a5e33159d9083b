"""Documents to token ids: filters, the tokenizer, the split, and hashes for near duplicates.

A batch is a function of its documents alone, so it comes out the same in every process. This file
and what it imports must not need torch: processes of `workers.py` load it without the rest.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from strata.data.batches import Position, TextBatch
from strata.data.filters import FilterConfig
from strata.data.near_duplicates import BandHasher
from strata.data.order import content_fraction
from strata.data.readers import Document
from strata.data.spill import Documents


@dataclass(frozen=True)
class EncodedBatch:
    """A batch as token ids; `end`, `num_empty` and `bytes_read` as in `TextBatch`.

    Attributes:
        documents: what stayed.
        dropped: filter -> how many documents it dropped.
        bands: (num_documents, bands) uint64, where near duplicates are looked for.
    """

    documents: Documents
    end: Position
    num_empty: int
    bytes_read: int
    dropped: dict[str, int] = field(default_factory=dict)
    bands: np.ndarray | None = None


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer, what is put around each document, and which documents stay.

    Attributes:
        tokenizer: encodes text without special tokens.
        sha256: of its tokenizer.json.
        vocab_size: one more than its greatest id.
        eos_id, bos_id, pad_id: None where the tokenizer names no such token.
        prefix, suffix: ids put before and behind every document.
        val_fraction: the share of documents that go to the validation split, by their content.
        seed: of that choice.
        filters: which documents are left out.
        hasher: of near duplicates; None does not look for them.
    """

    tokenizer: Tokenizer
    sha256: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    val_fraction: float
    seed: int
    filters: FilterConfig = field(default_factory=FilterConfig)
    hasher: BandHasher | None = None

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def encode(self, batch: TextBatch) -> EncodedBatch:
        """Encode what the filters leave of a batch; what yields no tokens counts as empty."""
        dropped: Counter[str] = Counter()
        given = list(self._filtered(batch.documents, dropped))
        texts = self._encode_all([document.text for document in given])
        prompts = self._encode_all([document.prompt for document in given])
        flat = array("I")
        lengths, loss_from, is_val, stayed = [], [], [], []
        num_empty = batch.num_empty
        for document, prompt, text in zip(given, prompts, texts, strict=True):
            if not prompt and not text and not self.suffix:
                num_empty += 1
                continue
            if rule := self.filters.dropped_by_tokens(len(prompt) + len(text)):
                dropped[rule] += 1
                continue
            start = len(flat)
            for ids in (self.prefix, prompt, text, self.suffix):
                flat.extend(ids)
            lengths.append(len(flat) - start)
            loss_from.append(len(self.prefix) + len(prompt) if document.prompt else 0)
            is_val.append(batch.is_val or self._is_val(document))
            stayed.append(document)
        documents = Documents(
            tokens=np.array(flat, self.dtype),
            lengths=np.array(lengths, np.int64),
            loss_from=np.array(loss_from, np.int32),
            is_val=np.array(is_val, bool),
        )
        bands = self.hasher.hash([_whole(document) for document in stayed]) if self.hasher else None
        return EncodedBatch(documents, batch.end, num_empty, batch.bytes_read, dict(dropped), bands)

    def _filtered(self, documents: list[Document], dropped: Counter[str]) -> Iterator[Document]:
        for document in documents:
            rule = self.filters.dropped_by(_whole(document))
            if rule is None:
                yield document
            else:
                dropped[rule] += 1

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        if not any(texts):
            return [[] for _ in texts]
        # The fast variant leaves out the offsets, which nobody reads here; the ids are the same.
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _is_val(self, document: Document) -> bool:
        if self.val_fraction == 0.0:
            return False
        content = f"{document.prompt}\0{document.text}".encode()
        return content_fraction(content, seed=self.seed, purpose="val") < self.val_fraction


def _whole(document: Document) -> str:
    return document.prompt + document.text

"""Documents to token ids: the tokenizer and the split.

A batch is a function of its documents alone, so it comes out the same in every process. This file
and what it imports must not need torch: processes of `workers.py` load it without the rest.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from strata.data.batches import Position, TextBatch
from strata.data.order import content_fraction
from strata.data.readers import Document
from strata.data.spill import Documents


@dataclass(frozen=True)
class EncodedBatch:
    """A batch as token ids; the other fields as in `TextBatch`."""

    documents: Documents
    end: Position
    num_empty: int
    bytes_read: int


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and what is put around each document.

    Attributes:
        tokenizer: encodes text without special tokens.
        sha256: of its tokenizer.json.
        vocab_size: one more than its greatest id.
        eos_id, bos_id, pad_id: None where the tokenizer names no such token.
        prefix, suffix: ids put before and behind every document.
        val_fraction: the share of documents that go to the validation split, by their content.
        seed: of that choice.
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

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def encode(self, batch: TextBatch) -> EncodedBatch:
        """Encode a batch; a document that yields no tokens counts as empty."""
        texts = self._encode_all([document.text for document in batch.documents])
        prompts = self._encode_all([document.prompt for document in batch.documents])
        flat = array("I")
        lengths, loss_from, is_val = [], [], []
        num_empty = batch.num_empty
        for document, prompt, text in zip(batch.documents, prompts, texts, strict=True):
            if not prompt and not text and not self.suffix:
                num_empty += 1
                continue
            start = len(flat)
            for ids in (self.prefix, prompt, text, self.suffix):
                flat.extend(ids)
            lengths.append(len(flat) - start)
            loss_from.append(len(self.prefix) + len(prompt) if document.prompt else 0)
            is_val.append(batch.is_val or self._is_val(document))
        documents = Documents(
            tokens=np.array(flat, self.dtype),
            lengths=np.array(lengths, np.int64),
            loss_from=np.array(loss_from, np.int32),
            is_val=np.array(is_val, bool),
        )
        return EncodedBatch(documents, batch.end, num_empty, batch.bytes_read)

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

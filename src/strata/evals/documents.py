"""Documents to be scored: token ids and which of them carry loss, from shards or from text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.data.manifest import SplitEntry, TokenManifest
from strata.data.readers import ReadOptions, read_documents
from strata.data.shards import check_documents, open_shard
from strata.data.sources import Source
from strata.errors import DataError
from strata.evals.scoring import encode_completion


@dataclass(frozen=True)
class ScoredDocument:
    """One document.

    Attributes:
        ids_t: token ids.
        scored_t: which of them carry loss.
        num_bytes: UTF-8 bytes of the text that carries loss, or None.
        done: how much of the whole is read with it, for progress.
    """

    ids_t: NDArray[np.int64]
    scored_t: NDArray[np.bool_]
    num_bytes: int | None
    done: int


def shard_documents(
    folder: Path, split: SplitEntry, *, manifest: TokenManifest, bytes_v: NDArray[np.int64] | None
) -> Iterator[ScoredDocument]:
    """Documents of prepared tokens, in the order of the stream; `done` counts tokens.

    Args:
        folder: of the split.
        split: its part of the manifest.
        manifest: of the whole folder.
        bytes_v: bytes each token id stands for, or None.

    Raises:
        DataError: a shard is damaged.
    """
    done = 0
    for entry in split.shards:
        shard = open_shard(folder, entry, dtype=manifest.dtype)
        check_documents(shard)
        stops = np.append(shard.documents[1:], len(shard.tokens))
        for first, last, loss_from in zip(shard.documents, stops, shard.loss_from, strict=True):
            ids_t = shard.tokens[first:last].astype(np.int64)
            if ids_t.max() >= manifest.vocab_size:
                raise DataError(
                    f"{shard.path} is damaged: token {ids_t.max()} is outside the vocabulary of "
                    f"{manifest.vocab_size}: prepare the data again or copy it anew"
                )
            scored_t = np.arange(len(ids_t)) >= loss_from
            num_bytes = None if bytes_v is None else int(bytes_v[ids_t[scored_t]].sum())
            yield ScoredDocument(ids_t, scored_t, num_bytes, done + int(last))
        done += len(shard.tokens)


def text_documents(
    sources: Iterable[Source],
    *,
    options: ReadOptions,
    prefix: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[ScoredDocument]:
    """Documents of text files, as ids closed by the end token; `done` counts bytes of the files.

    Args:
        sources: the files; rows without text are left out.
        options: how records become documents.
        prefix: ids in front of every document, without loss.
        tokenizer: of the model.

    Raises:
        DataError: a file is damaged.
    """
    end, read = end_ids(tokenizer), 0
    for source in sources:
        for document in read_documents(source, options=options):
            if not document.text:
                continue
            before = [*prefix, *encode_completion(tokenizer, document.prompt)]
            ids_t = np.array([*before, *encode_completion(tokenizer, document.text), *end])
            scored_t = np.arange(len(ids_t)) >= len(before)
            num_bytes = len(document.text.encode("utf-8"))
            yield ScoredDocument(ids_t, scored_t, num_bytes, read + document.bytes_read)
        read += source.entry.num_bytes


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What closes a document: the tokenizer's eos, if it has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def open_vocabulary(
    folder: Path,
    manifest: TokenManifest,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Tokenizer:
    """The folder's own tokenizer, after checking that it is the model's.

    Raises:
        DataError: it is missing, or not the model's.
    """
    vocab_size = model.config.get_text_config().vocab_size
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"{folder} was prepared with {manifest.vocab_size} token ids, the model has "
            f"{vocab_size}: prepare the data with the model's tokenizer"
        )
    path = folder / "tokenizer" / "tokenizer.json"
    try:
        own = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path} cannot be opened: {' '.join(str(error).split())[:160]}") from None
    if tokenizer is not None and tokenizer.get_vocab() != own.get_vocab(with_added_tokens=True):
        raise DataError(
            f"{folder} was prepared with another tokenizer than the model's: prepare it again"
        )
    return own


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64] | None:
    """How many bytes of text each id stands for; None unless the tokenizer is byte-level.

    A byte-level vocabulary writes each byte as one character; special tokens stand for no text.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    bytes_v = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for text, index in vocabulary.items():
        if index not in added:
            bytes_v[index] = len(text)
        elif not added[index].special:
            bytes_v[index] = len(text.encode("utf-8"))
    return bytes_v

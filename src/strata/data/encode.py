"""Documents to token ids, in batches, with the tokenizer's own threads kept busy."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from strata.data.manifest import sha256_of
from strata.data.order import content_fraction
from strata.data.readers import Document, ReadOptions, read_documents
from strata.data.sources import Source
from strata.data.spill import Documents
from strata.errors import DataError

_MAX_BATCH_DOCUMENTS = 4096
_MAX_CONFIG_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Position:
    """How far reading has come: `record` records of file number `source`, all files before it."""

    source: int
    record: int


@dataclass(frozen=True)
class TextBatch:
    """Documents that are encoded in one go.

    Attributes:
        documents: none of them empty.
        end: the position behind the last record looked at.
        num_empty: records without text that were left out.
        bytes_read: of all sources so far, for progress.
        is_val: all of them belong to the validation split.
    """

    documents: list[Document]
    end: Position
    num_empty: int
    bytes_read: int
    is_val: bool = False


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
        for document, prompt, text in zip(batch.documents, prompts, texts, strict=True):
            if not prompt and not text and not self.suffix:
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
        num_empty = batch.num_empty + len(batch.documents) - len(lengths)
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


def load_encoder(
    folder: Path,
    *,
    append_eos: bool,
    prepend_bos: bool | None,
    parse_special_tokens: bool,
    val_fraction: float,
    seed: int,
) -> TextEncoder:
    """Open the tokenizer of a folder.

    Raises:
        DataError: there is none, it is damaged, or it lacks the special token asked for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"no tokenizer.json in {folder}: make one with `strata tokenizer train`, or save a "
            "fast tokenizer there with save_pretrained"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())[:160]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Otherwise a text that mentions "<eos>" would end its own document.
    tokenizer.encode_special_tokens = not parse_special_tokens
    ids = {
        name: _special_id(folder, tokenizer, name)
        for name in ("eos_token", "bos_token", "pad_token")
    }
    wanted = [("eos_token", append_eos), ("bos_token", prepend_bos)]
    for name, needed in wanted:
        if needed and ids[name] is None:
            option = "append_eos" if name == "eos_token" else "prepend_bos"
            raise DataError(
                f"{folder}/tokenizer_config.json names no {name}: add one, or set {option} to false"
            )
    eos_id, bos_id = ids["eos_token"], ids["bos_token"]
    if prepend_bos is None:  # documents begin as prompts will
        prepend_bos = bos_id is not None and tokenizer.encode("").ids[:1] == [bos_id]
    return TextEncoder(
        tokenizer=tokenizer,
        sha256=sha256_of(path),
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1,
        eos_id=eos_id,
        bos_id=bos_id,
        pad_id=ids["pad_token"],
        prefix=(bos_id,) if prepend_bos and bos_id is not None else (),
        suffix=(eos_id,) if append_eos and eos_id is not None else (),
        val_fraction=val_fraction,
        seed=seed,
    )


def _special_id(folder: Path, tokenizer: Tokenizer, name: str) -> int | None:
    """The id of a special token that the tokenizer's configuration names."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_object(folder / file).get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found = tokenizer.token_to_id(token)
            if found is None:
                raise DataError(f"{folder / file}: {name} {token!r} is not in tokenizer.json")
            return found
    return None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise DataError(f"{path} is too large for a tokenizer's configuration")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DataError(f"{path} is damaged: it is not JSON") from None
    return content if isinstance(content, dict) else {}


def read_batches(
    sources: Sequence[Source],
    *,
    options: ReadOptions,
    start: Position,
    batch_bytes: int,
    num_train: int,
) -> Iterator[TextBatch]:
    """Group the documents of all sources, from `start` on, into batches of about `batch_bytes`.

    The sources behind the first `num_train` are validation; no batch holds both kinds.
    """
    documents: list[Document] = []
    end = start
    size_bytes = num_empty = 0
    done_bytes = sum(source.entry.num_bytes for source in sources[: start.source])
    for number in range(start.source, len(sources)):
        is_val = number >= num_train
        if number == num_train and documents:
            yield TextBatch(documents, end, num_empty, done_bytes)
            documents, size_bytes, num_empty = [], 0, 0
        if number + 1 < len(sources):
            sources[number + 1].fetch_ahead()
        skip = start.record if number == start.source else 0
        for document in read_documents(sources[number], options=options, skip=skip):
            end = Position(number, document.record)
            if not document.text and not document.prompt:
                num_empty += 1
                continue
            documents.append(document)
            size_bytes += _size_bytes(document)
            if size_bytes >= batch_bytes or len(documents) >= _MAX_BATCH_DOCUMENTS:
                bytes_read = done_bytes + document.bytes_read
                yield TextBatch(documents, end, num_empty, bytes_read, is_val)
                documents, size_bytes, num_empty = [], 0, 0
        done_bytes += sources[number].entry.num_bytes
    is_val = len(sources) > num_train
    yield TextBatch(documents, end, num_empty, done_bytes, is_val)


def _size_bytes(document: Document) -> int:
    """About how many bytes of UTF-8 a document is, without encoding it."""
    return sum(len(text) if text.isascii() else 3 * len(text) for text in document[:2])


def encode_batches(encoder: TextEncoder, batches: Iterable[TextBatch]) -> Iterator[EncodedBatch]:
    """Encode batches in order, each in the background while the next one is read."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode") as pool:
        waiting: Future[EncodedBatch] | None = None
        for batch in batches:
            following = pool.submit(encoder.encode, batch)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()

"""A reference for every chunk of a prepared folder, in parts that survive a kill."""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from strata.data.dataset import TokenDataset
from strata.data.leaks import leaks
from strata.data.manifest import MANIFEST_NAME, read_manifest, write_json
from strata.data.progress import ProgressBar
from strata.data.references import (
    LOCK_NAME,
    NONE,
    PROGRESS_NAME,
    Origin,
    PartEntry,
    Progress,
    ReferencesConfig,
    ReferencesManifest,
    data_identity,
    read_model,
    read_references,
    refuse_other_origin,
)
from strata.data.write_references import Reference, part_ends, write_part
from strata.errors import DataError
from strata.files import storage_errors

_SEARCHED_AT_ONCE = 256
_KEPT_TEXTS = 1 << 16  # tokenised references kept while a split is read

Find = Callable[[Sequence[str], int], list[list[Any]]]  # of `Reference`, best first


def find_references(
    tokens: Path,
    *,
    out: Path,
    find: Find,
    searched: dict[str, str],
    config: ReferencesConfig,
    progress: bool = False,
) -> ReferencesManifest:
    """Choose a reference for every chunk of a prepared folder.

    A call that was interrupted goes on after its last whole part, by the same call; a finished
    folder is left as it is.

    Args:
        tokens: a folder made by `strata data prepare`.
        out: the folder to make.
        find: at most so many references for each text, best first.
        searched: names what `find` searches and how; a folder goes on only under the same.
        config: how references are chosen.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the tokens or an existing `out` cannot be used.
        StorageError: the disk is full or `out` cannot be written; what was done so far is kept.
    """
    tokens, out = Path(tokens), Path(out)
    manifest = read_manifest(tokens)
    splits = [name for name, entry in manifest.splits.items() if entry.shards]
    origin = Origin(data=data_identity(manifest), searched=searched, config=config)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if (out / MANIFEST_NAME).exists():
            there = read_references(out)
            refuse_other_origin(out, there.origin, origin)
            (out / PROGRESS_NAME).unlink(missing_ok=True)
            return there
        with _held(out):
            done = _read_progress(out, origin)
            datasets = {name: TokenDataset.open(tokens, split=name) for name in splits}
            total = sum(dataset.num_tokens for dataset in datasets.values())
            with ProgressBar("finding references", total=total, enabled=progress) as bar:
                before = 0
                for name, dataset in datasets.items():
                    finder = _Finder(dataset, tokens, find, config, tokens_before=before)
                    done = _do_split(out, name, finder, done, bar)
                    before += dataset.num_tokens
            finished = ReferencesManifest(origin=origin, splits=done.splits)
            write_json(out / MANIFEST_NAME, finished)
            (out / PROGRESS_NAME).unlink()
            return finished


def _do_split(out: Path, name: str, finder: _Finder, done: Progress, bar: ProgressBar) -> Progress:
    parts = list(done.splits.get(name, ()))
    first = sum(part.num_documents for part in parts)
    (out / name).mkdir(exist_ok=True)
    for begin, end in finder.parts(first):
        parts.append(finder.write(out / name / f"{len(parts):05d}", begin, end))
        done = done.model_copy(update={"splits": {**done.splits, name: tuple(parts)}})
        write_json(out / PROGRESS_NAME, done)
        bar.update(finder.tokens_done(end))
    return done


class _Finder:
    """Chooses for the documents of one split."""

    def __init__(
        self,
        dataset: TokenDataset,
        folder: Path,
        find: Find,
        config: ReferencesConfig,
        *,
        tokens_before: int,
    ) -> None:
        self._dataset = dataset
        self._find = find
        self._config = config
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        self._tokens_kept: OrderedDict[str, list[int]] = OrderedDict()
        lengths = dataset.document_lengths().astype(np.int64)
        self._token_ends = tokens_before + np.cumsum(lengths)
        self._chunk_counts = -(-lengths // config.chunk_tokens)

    def tokens_done(self, documents: int) -> int:
        """Tokens of the splits before and of this many documents, at least one."""
        return int(self._token_ends[documents - 1])

    def parts(self, first: int) -> Iterator[tuple[int, int]]:
        """Ranges of documents of about `part_chunks` chunks, from a document on."""
        begin = first
        for count in part_ends(self._chunk_counts[first:], self._config.part_chunks):
            yield begin, first + count
            begin = first + count

    def write(self, base: Path, begin: int, end: int) -> PartEntry:
        """Choose for some documents and write their files."""
        numbers: dict[str, int] = {}
        found: list[Any] = []
        chosen: list[int] = []
        num_leaks = 0
        for document, hits in self._hits(begin, end):
            leaky: dict[str, bool] = {}
            for candidates in hits:
                choice = NONE
                for hit in candidates:
                    if hit.id not in leaky:
                        leaky[hit.id] = self._leaks(hit, document)
                        num_leaks += leaky[hit.id]
                    if not leaky[hit.id]:
                        choice = numbers.setdefault(hit.id, len(found))
                        if choice == len(found):
                            found.append(hit)
                        break
                chosen.append(choice)
        return write_part(base, chosen, found, num_documents=end - begin, num_leaks=num_leaks)

    def _hits(self, begin: int, end: int) -> Iterator[tuple[np.ndarray, list[list[Any]]]]:
        """Each document and the hits of each of its chunks, searched many at once."""
        waiting: list[np.ndarray] = []
        texts: list[str] = []
        counts: list[int] = []
        for document in range(begin, end):
            tokens = self._dataset.document(document)
            step = self._config.chunk_tokens
            pieces = [tokens[at : at + step].tolist() for at in range(0, len(tokens), step)]
            waiting.append(tokens)
            counts.append(len(pieces))
            texts += self._tokenizer.decode_batch(pieces, skip_special_tokens=True)
            if len(texts) >= _SEARCHED_AT_ONCE or document + 1 == end:
                hits = self._search(texts)
                at = 0
                for one, count in zip(waiting, counts, strict=True):
                    yield one, hits[at : at + count]
                    at += count
                waiting, texts, counts = [], [], []

    def _search(self, texts: list[str]) -> list[list[Any]]:
        asked = [number for number, text in enumerate(texts) if text.strip()]
        hits: list[list[Any]] = [[] for _ in texts]
        for at in range(0, len(asked), _SEARCHED_AT_ONCE):
            part = asked[at : at + _SEARCHED_AT_ONCE]
            found = self._find([texts[number] for number in part], self._config.candidates)
            for number, candidates in zip(part, found, strict=True):
                hits[number] = candidates
        return hits

    def _leaks(self, hit: Reference, document: np.ndarray) -> bool:
        ids = self._tokens_kept.pop(hit.id, None)
        if ids is None:
            ids = self._tokenizer.encode(hit.text, add_special_tokens=False).ids
            if len(self._tokens_kept) >= _KEPT_TEXTS:
                self._tokens_kept.popitem(last=False)
        self._tokens_kept[hit.id] = ids
        # What has no token can be read by nobody.
        return not ids or leaks(ids, document, threshold=self._config.leak_threshold)


def _read_progress(out: Path, origin: Origin) -> Progress:
    path = out / PROGRESS_NAME
    if not path.is_file():
        others = [entry.name for entry in out.iterdir() if entry.name != LOCK_NAME]
        if others:
            raise DataError(f"{out} exists and holds other files: give an empty or new --out")
        done = Progress(origin=origin, splits={})
        write_json(path, done)
        return done
    done = read_model(path, Progress)
    refuse_other_origin(out, done.origin, origin)
    return done


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The folder in work, held by this process alone."""
    descriptor = os.open(out / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is finding references in {out}: wait for it or stop it"
            ) from None
        yield
    finally:
        os.close(descriptor)

"""A bank on disk: made, opened, filled, searched, read, mended.

A `Bank` sees one version: what others commit meanwhile shows after `refresh()`, what it commits
itself at once. Searching and reading may go on in several threads; writing is for one process at a
time. Lance's threads do not survive a fork: open a bank after forking, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from strata.errors import BankError
from strata.explicit.bank import change, info, portable, records, rows, search, settings, upkeep
from strata.explicit.bank.add import Adder, sample_references
from strata.explicit.bank.files import Files, LocalFiles, files_at, path_of
from strata.explicit.bank.folder import make_folder
from strata.explicit.bank.given import Cut, DocumentLike, EmbedderLike, EncoderLike, as_documents
from strata.explicit.bank.info import SourceInfo, Stats, VersionInfo
from strata.explicit.bank.intake import AddReport, Means
from strata.explicit.bank.own import Own
from strata.explicit.bank.partition import OpenMeans
from strata.explicit.bank.ray_add import (
    PARTITION_CHARACTERS,
    RayAdder,
    gpus_per_worker,
    running,
)
from strata.explicit.bank.records import Record
from strata.explicit.bank.settings import BankSettings, EmbedderSettings
from strata.explicit.bank.store import Store
from strata.explicit.bank.upkeep import CompactReport
from strata.explicit.bank.vectors import VectorTables
from strata.explicit.bank.verify import VerifyReport, verify
from strata.explicit.codec import Codec, codec_state
from strata.explicit.embed import make_embedder
from strata.explicit.encode import Encoder
from strata.explicit.fingerprint import Fingerprint, refuse_other
from strata.explicit.hits import Hit, Ranking
from strata.explicit.memories import Memories, MemoryShape
from strata.explicit.settings import ExplicitMemoryConfig


class Bank:
    """References, vectors and memories in a folder. Made by `create`, `open` or `import_`.

    Attributes:
        path: the folder, or the URL on an object store.
        settings: what `bank.json` says.
        codec: the bank's, or None while it belongs to no model.
        index_rows: from so many rows on, vectors are searched through an index.
    """

    def __init__(
        self, path: str | Path, given: BankSettings, codec: Codec | None, store: Store
    ) -> None:
        self.path = path_of(path)
        self.settings, self.codec = given, codec
        self.index_rows = search.INDEX_ROWS
        self._store = store
        self._vectors = VectorTables()
        self._checked = False
        self._own: Own | None = None
        self._embedder: EmbedderLike | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: Any = None,
        config: ExplicitMemoryConfig | None = None,
        embedder: EmbedderLike | EmbedderSettings | str | None = None,
        shape: MemoryShape | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> Bank:
        """Make an empty bank.

        Args:
            path: a folder that does not exist or is empty, or such a URL ("s3://bucket/bank").
            model, tokenizer: whose bank it is; both, or neither for one that holds text and
                vectors only, until `use` or `bind`.
            config: how references are cut, encoded and stored; None for the paper's.
            embedder: whose vectors the bank holds, itself or its name ("minilm"); None for none,
                then it is searched by words.
            shape, fingerprint: of a model that is not given itself, both or neither.

        Raises:
            BankError: there is something already, or the codec's name is unknown.
            HostError: the model cannot have memory, or not as `config` asks.
            ModelError: no embedder of that name.
        """
        files = files_at(path)
        config = config or ExplicitMemoryConfig()
        own = None
        if model is not None:
            own = Own.of(model, tokenizer, config)
            shape, fingerprint = own.encoder.shape, own.fingerprint
        if isinstance(embedder, str):
            embedder = make_embedder(embedder)
        given = BankSettings(config=config, embedder=settings.embedder_settings(embedder))
        if shape is not None or fingerprint is not None:
            given = given.with_model(shape, fingerprint)
        codec = settings.open_codec(files, given)
        bank = cls(path, given, codec, make_folder(files, given))
        bank._checked = fingerprint is not None
        bank._own = own
        if embedder is not None and not isinstance(embedder, EmbedderSettings):
            bank._embedder = embedder
        return bank

    @classmethod
    def open(cls, path: str | Path, *, version: int | None = None) -> Bank:
        """Open a bank.

        Args:
            path: its folder or URL.
            version: an older one, from `versions`; it can be read but not written.

        Raises:
            BankError: no bank, a damaged one, or no such version.
        """
        files = files_at(path)
        given = settings.read_settings(files)
        return cls(path, given, settings.open_codec(files, given), Store(files, version=version))

    def use(self, model: PreTrainedModel, tokenizer: Any) -> Bank:
        """Write with this model from now on, if it is the bank's; returns the bank.

        Raises:
            BankError: another model's bank; one sentence says what differs.
        """
        own = Own.of(model, tokenizer, self.settings.config)
        if self.settings.fingerprint is None:
            self.bind(own.encoder.shape, own.fingerprint)
        else:
            self.check(own.fingerprint)
        self._own = own
        return self

    @property
    def encoder(self) -> Encoder:
        """Of the model that the bank was created with or told to `use`.

        Raises:
            BankError: there was none.
        """
        if self._own is None:
            raise BankError(
                f"bank {self.path} has no model at hand to cut and encode with: call "
                "use(model, tokenizer) first"
            )
        return self._own.encoder

    @property
    def version(self) -> int:
        """Which version this object sees."""
        return self._store.version

    @property
    def embedder_name(self) -> str | None:
        """Which embedder made its vectors; None where it has none."""
        return None if self.settings.embedder is None else self.settings.embedder.name

    @property
    def _files(self) -> Files:
        return self._store.files

    def __len__(self) -> int:
        return self._store.seal.rows

    def refresh(self) -> None:
        """See what others committed meanwhile, settings too."""
        self.settings = settings.read_settings(self._files)
        self.codec = settings.open_codec(self._files, self.settings)
        self._store.refresh()

    def check(self, model: Fingerprint) -> None:
        """Refuse any model but the one that this bank belongs to.

        Raises:
            BankError: one sentence on what differs, or the bank belongs to no model yet.
        """
        if self.settings.fingerprint is None:
            raise BankError(f"bank {self.path} belongs to no model yet: bind it to one")
        refuse_other(self.settings.fingerprint, model)
        self._checked = True

    def bind(self, shape: MemoryShape, fingerprint: Fingerprint) -> None:
        """Give a bank that was made without a model the one that its memories will belong to.

        Raises:
            BankError: it belongs to one.
        """
        with self._writing():
            if self.settings.fingerprint is not None:
                raise BankError(f"bank {self.path} belongs to a model already: make a new bank")
            given = self.settings.with_model(shape, fingerprint)
            codec = settings.open_codec(self._files, given)
            settings.write_settings(self._files, given)
            self.settings, self.codec, self._checked = given, codec, True

    def train(
        self,
        documents: Iterable[DocumentLike],
        *,
        cut: Cut,
        encoder: EncoderLike,
        memories: int = 512,
        batch_size: int = 16,
        iterations: int = 10,
    ) -> int:
        """Train the codec on references drawn evenly from documents.

        Args:
            documents: a sample, or all that will be added.
            cut: a document to its references.
            encoder: of the bank's model.
            memories: how many references to encode; all of them are held in memory, in fp32.
            batch_size: references encoded at a time.
            iterations: of k-means.

        Returns:
            References used.

        Raises:
            BankError: the codec is trained or has nothing to train, or the sample is too small.
        """
        with self._writing():
            codec = self._codec_for(encoder)
            if codec.trained:
                raise BankError(f"codec {codec.name!r} of bank {self.path} needs no training")
            sample = sample_references(documents, cut, memories)
            if not sample:
                raise BankError("no text in the documents given: nothing to train a codec on")
            parts = []
            for first in range(0, len(sample), batch_size):
                texts = [reference.text for reference in sample[first : first + batch_size]]
                parts.append(encoder.encode(texts).to(device="cpu"))
            codec.train(Memories.cat(parts), iterations=iterations)
            content, sha256 = codec_state(codec)
            self._files.put(settings.CODEC, content)
            given = self.settings.model_copy(update={"codec_sha256": sha256})
            settings.write_settings(self._files, given)
            self.settings = given
            return len(sample)

    def add(
        self,
        documents: str | Path | Iterable[str | Path | DocumentLike],
        *,
        cold: bool = False,
        cut: Cut | None = None,
        encoder: EncoderLike | None = None,
        embedder: EmbedderLike | None = None,
        batch_references: int = 1024,
        batch_size: int = 64,
        on_progress: Callable[[AddReport], None] | None = None,
    ) -> AddReport:
        """Add documents: new ones, and those that changed under their source.

        A document is committed whole. What is there already is skipped, so that a run that was
        killed is finished by running it again. A text that another source holds is not stored
        twice; removing that source removes it, and the next `add` puts it back.

        Args:
            documents: a file or folder, a list of them, or documents, each with text, source and
                metadata.
            cold: store text only; memories are encoded when they are first read.
            cut, encoder, embedder: without `cut`, the bank's own: the model that it was created
                with or that it is told to `use`, and its embedder by name; a codec that needs
                training is trained on a sample first. With `cut` (a document to its references),
                just what is given: no encoder leaves the new rows cold.
            batch_references: a commit comes with the first document's end after as many.
            batch_size: references embedded and encoded at a time.
            on_progress: called after each commit.

        Raises:
            BankError: another writer, another embedder or model, or a document that cannot be
                stored; what was committed before stays.
        """
        given = as_documents(documents)
        if cut is None:
            cut, encoder, embedder = self._ways(given, cold=cold)
        with self._writing():
            settings.refuse_other_embedder(self.path, self.settings.embedder, embedder)
            codec = None if encoder is None else self._codec_for(encoder)
            if codec is not None and not codec.trained:
                raise BankError(
                    f"codec {codec.name!r} of bank {self.path} is not trained yet: train it on a "
                    "sample of the documents first"
                )
            adder = Adder(
                self._store,
                Means(cut, codec, encoder, embedder),
                batch_references=batch_references,
                batch_size=batch_size,
                on_progress=on_progress,
            )
            report = adder.run(given)
            search.keep_indexed(self._store, index_rows=self.index_rows)
            return report

    def add_with_ray(
        self,
        documents: str | Path | Iterable[str | Path | DocumentLike],
        *,
        open_means: OpenMeans,
        num_workers: int,
        device: str = "auto",
        batch_references: int = 65_536,
        batch_size: int = 64,
        partition_characters: int = PARTITION_CHARACTERS,
        on_progress: Callable[[AddReport], None] | None = None,
    ) -> AddReport:
        """As `add`, but processes of Ray cut, embed, encode and write; this one commits.

        The bank gets what `add` gives it, in the same order, whatever workers are lost meanwhile.
        All machines must see the bank under the same path. Ray is the one that this process is
        connected to or that RAY_ADDRESS names, or is started here for as long as it takes.

        Args:
            documents: as in `add`; a codec that needs training must have been trained.
            open_means: called once in each worker with the bank's settings; Ray pickles it to
                bring it there.
            num_workers: processes.
            device: cpu, cuda (one GPU a worker), or auto: cuda where there is one for each.
            batch_references: a commit comes with the first partition's end after as many.
            batch_size: references embedded and encoded at a time.
            partition_characters: of text that a worker takes at a time, but for the last document.
            on_progress: called after each commit.

        Raises:
            BankError: as in `add`.
            WorkerError: Ray cannot be reached, or a worker failed again and again.
        """
        if num_workers < 1 or partition_characters < 1:
            raise BankError(f"{num_workers} workers, {partition_characters} characters: at least 1")
        given = as_documents(documents)
        with self._writing():
            with running(num_workers) as ray:
                adder = RayAdder(
                    self._store,
                    open_means,
                    num_workers=num_workers,
                    gpus_per_worker=gpus_per_worker(ray, device, num_workers),
                    batch_references=batch_references,
                    batch_size=batch_size,
                    partition_characters=partition_characters,
                    on_progress=on_progress,
                )
                report = adder.run(given)
            search.keep_indexed(self._store, index_rows=self.index_rows)
            return report

    def remove(self, sources: Iterable[str]) -> int:
        """Take sources out, all in one commit; their text stays on the disk until `compact`.

        Returns:
            References removed.

        Raises:
            BankError: a source is not in the bank; nothing is removed then.
        """
        with self._writing():
            return change.remove(self._store, sources)

    def fill(self, ids: Sequence[str], memories: Memories) -> None:
        """Give cold rows their memories, in one commit; rows that have some keep them.

        Every call writes a file: fill many rows at once, or compact afterwards.

        Args:
            ids: n records, distinct.
            memories: n, in the same order, from the bank's model after `check`.

        Raises:
            BankError: an id is not in the bank.
        """
        if len(ids) != len(memories) or len(set(ids)) != len(ids):
            raise BankError(f"{len(ids)} ids for {len(memories)} memories, or an id twice")
        with self._writing():
            change.fill(self._store, self._codec_for(None), ids, memories)

    def cold(self, *, limit: int | None = None) -> list[str]:
        """Ids of rows without memories, at most `limit` of them."""
        return rows.cold(self._store, limit)

    def cold_among(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` without memories, in order; their codes are not read.

        Raises:
            BankError: an id is not in the bank.
        """
        found = rows.by_id(self._store, ids, ["id", "checksum"])
        return [name for name in ids if records.is_cold(found[name]["checksum"])]

    def search(
        self,
        query: Any,
        top_k: int = 5,
        where: Mapping[str, Any] | None = None,
        *,
        exact: bool = False,
    ) -> list[Hit]:
        """The best references for a vector (cosine) or for the words of a text (BM25).

        Args:
            query: (width,) floats, or a string; a string has no syntax.
            top_k: 1 to 10,000.
            where: metadata that a hit must have, {key: value}, all of them.
            exact: compare a vector with every row even where there is an index.

        Returns:
            Hits, best first, each checked against its checksum; fewer than top_k where there are
            no more.

        Raises:
            BankError: a wrong query, or a damaged bank.
        """
        found = self.read(self.rank(query, top_k, where, exact=exact))
        if isinstance(query, str):  # equal scores are common: in an order of no place on the disk
            found.sort(key=lambda hit: (-hit.score, hit.id))
        return found

    def rank(
        self,
        query: Any,
        top_k: int = 5,
        where: Mapping[str, Any] | None = None,
        *,
        exact: bool = False,
    ) -> Ranking:
        """As `search`, but nothing is read of what was found: `read` does, all or some."""
        if isinstance(query, str):
            return search.by_words(self._store, query, top_k, where)
        return search.by_vector(self._store, self._vectors, query, top_k, where, exact=exact)

    def read(self, ranking: Ranking) -> list[Hit]:
        """The references of a ranking, in order, each checked against its checksum.

        Raises:
            BankError: a record is damaged.
        """
        return search.hits(self._store, ranking)

    def take(self, ids: Sequence[str]) -> list[Record]:
        """Whole records, in the order of their ids, each checked.

        Raises:
            BankError: an id is not in the bank, or its record is damaged.
        """
        found = rows.by_id(self._store, ids, self._store.columns.names)
        return [records.checked_record(found[identifier]) for identifier in ids]

    def of_source(self, source: str) -> list[Hit]:
        """References of one source, in the order of its text, with the score 0; none if unknown.

        Raises:
            BankError: a damaged record.
        """
        where = records.one_of("source_id", [records.source_digest(source)])
        found = [
            records.checked_hit(row, 0.0)
            for batch in self._store.scan(records.HIT_COLUMNS, where=where)
            for row in batch.to_pylist()
        ]
        return sorted(found, key=lambda hit: hit.start)

    def sample_texts(self, count: int) -> list[str]:
        """Texts of at most `count` references, evenly spaced through the bank."""
        return rows.sample_texts(self._store, count)

    def blobs(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Codes of records, each checked; cold ones are left out.

        Raises:
            BankError: an id is not in the bank, or its codes are damaged.
        """
        there = rows.by_id(self._store, ids, ["id", "codes", "checksum"])
        found = {identifier: records.checked_codes(row) for identifier, row in there.items()}
        return {identifier: codes for identifier, codes in found.items() if codes is not None}

    def load(self, ids: Sequence[str]) -> Memories:
        """Decoded memories, in the order of their ids.

        Raises:
            BankError: an id is not in the bank, is cold, or its codes are damaged.
        """
        if self.codec is None:
            raise BankError(f"bank {self.path} belongs to no model yet: it has no memories")
        blobs = self.blobs(ids)
        for identifier in ids:
            if identifier not in blobs:
                raise BankError(f"record {identifier} has no memory yet: encode and fill it")
        return self.codec.decode([blobs[identifier] for identifier in ids])

    def memories(
        self, where: Mapping[str, Any] | None = None, *, rows_at_once: int = 64
    ) -> Iterator[tuple[list[str], Memories]]:
        """Ids and decoded memories of all rows that have one, batch by batch.

        Args:
            where: metadata that a row must have, {key: value}.
            rows_at_once: of a batch, at most.

        Raises:
            BankError: the bank belongs to no model yet, or codes are damaged.
        """
        if self.codec is None:
            raise BankError(f"bank {self.path} belongs to no model yet: it has no memories")
        yield from rows.memories(self._store, self.codec, where, rows_at_once)

    def show(self, identifier: str) -> Record:
        """One record; the first 4 or more digits of its id are enough where no other begins so.

        Raises:
            BankError: none or several begin so.
        """
        return self.take([rows.id_of(self._store, identifier)])[0]

    def ls(self) -> list[SourceInfo]:
        """All sources, by name."""
        return info.sources(self._store)

    def stats(self) -> Stats:
        """The bank in numbers; reads texts and sources once."""
        return info.stats(self._store, self.codec)

    def digest(self, *, memories: bool = True) -> str:
        """A hash of all content, whatever its order: equal for banks of equal records.

        Args:
            memories: with False only what is searched and read as text counts, so that the hash
                stays when cold memories are written.
        """
        return records.content_digest(
            check if memories else records.without_codes(check)
            for batch in self._store.scan(["checksum"], rows_at_once=8192)
            for check in batch["checksum"].to_pylist()
        )

    def verify(self) -> VerifyReport:
        """Read everything of this version once and say what is broken; nothing is changed."""
        return verify(self._store, self.codec)

    def compact(self, *, keep_s: float = 3600.0, purge: bool = False) -> CompactReport:
        """Merge small files, index all rows, and give up versions replaced long enough ago.

        Args:
            keep_s: how long a version can still be opened after the next one came. A reader that
                has an older one open is told to open the bank again.
            purge: rewrite every file that holds removed rows and keep no old version: after it,
                removed text is gone from the folder.
        """
        with self._writing():
            vector = 0 if self.settings.embedder is None else 4 * self.settings.embedder.width
            codes = 0 if self.codec is None else self.codec.bytes_per_memory
            return upkeep.compact(
                self._store,
                keep_s=0.0 if purge else keep_s,
                index_rows=self.index_rows,
                bytes_per_row=codes + vector + 1024,
                purge=purge,
            )

    def versions(self) -> list[VersionInfo]:
        """Versions that can be opened, oldest first."""
        return info.versions(self._files)

    def export(self, out: str | Path) -> int:
        """Write this version to a new folder of plain files, parquet and JSON; returns records.

        Raises:
            BankError: there is something at `out`, or a record is damaged.
        """
        return portable.export(self._store, Path(out))

    @classmethod
    def import_(cls, source: str | Path, path: str | Path) -> Bank:
        """Make a bank with the content of an exported one.

        Args:
            source: the folder that `export` wrote.
            path: a folder that does not exist or is empty.

        Raises:
            BankError: the export is damaged, or there is something at `path`.
        """
        source, files = Path(source), files_at(path)
        given = portable.check_export(source)
        codec = settings.open_codec(LocalFiles(source), given)
        store = make_folder(files, given, lambda store: portable.read_into(store, source, given))
        return cls(path, given, codec, store)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the writer's lock, and be at the newest version."""
        with self._files.writing():
            there = settings.read_settings(self._files)
            if there != self.settings:
                self.settings, self.codec = there, settings.open_codec(self._files, there)
                self._checked = False
            self._store.roll_forward()
            yield

    def _ways(
        self, documents: Iterable[Any], *, cold: bool
    ) -> tuple[Cut, EncoderLike | None, EmbedderLike | None]:
        """Cut, encoder and embedder of the bank's own; its codec is trained if it has to be."""
        encoder, own = self.encoder, self._own
        assert own is not None
        if self._embedder is None and self.settings.embedder is not None:
            self._embedder = make_embedder(self.settings.embedder.name)
        if cold:
            return own.cut, None, self._embedder
        if self.codec is not None and not self.codec.trained:
            if isinstance(documents, Iterator):
                raise BankError(
                    f"codec {self.codec.name!r} is trained on a sample before documents are added, "
                    "and an iterator gives them once: give a list, or paths"
                )
            self.train(documents, cut=own.cut, encoder=encoder)
        return own.cut, encoder, self._embedder

    def _codec_for(self, encoder: EncoderLike | None) -> Codec:
        """The codec, where memories may be written."""
        if self.codec is None:
            raise BankError(f"bank {self.path} belongs to no model yet: bind it to one")
        if not self._checked:
            raise BankError(
                f"bank {self.path} was not checked against the model yet: call "
                "check(fingerprint(...)) before memories are written"
            )
        shape = getattr(encoder, "shape", None)
        if shape is not None and shape != self.codec.shape:
            raise BankError(f"the encoder's memory heads are not those of bank {self.path}")
        return self.codec

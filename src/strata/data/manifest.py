"""What a folder of tokens says about itself: `manifest.json`, written last.

DIR/manifest.json            this file; a folder without it is unfinished
DIR/tokenizer/               a copy of the tokenizer
DIR/train/00000.tokens.npy   uint16 or uint32: documents, one after the other
DIR/train/00000.documents.npy   int64: where each document starts in the shard
DIR/train/00000.loss_from.npy   int32: how many leading tokens of each carry no loss
DIR/val/...                  the same, where a validation split was asked for
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from strata.config import FrozenConfig
from strata.data.filters import FilterConfig
from strata.data.near_duplicates import NearDuplicates
from strata.data.sources import DatasetEntry, SourceEntry
from strata.errors import DataError
from strata.files import replace_text

FORMAT: Final = "strata-tokens"
FORMAT_VERSION: Final = 1
MANIFEST_NAME = "manifest.json"

_MAX_MANIFEST_BYTES = 256 * 2**20
_HASH_STEP_BYTES = 1 << 20

Count = Annotated[int, Field(ge=0)]


class FileEntry(FrozenConfig):
    """Size and sha256 of one file."""

    num_bytes: Count
    sha256: str


class ShardEntry(FrozenConfig):
    """One shard: three files that share a name."""

    name: Annotated[str, Field(pattern=r"^[0-9]{5,10}$")]
    num_tokens: Count
    num_documents: Count
    tokens: FileEntry
    documents: FileEntry
    loss_from: FileEntry


class SplitEntry(FrozenConfig):
    """One split: its shards, in the order of the stream."""

    num_tokens: Count
    num_documents: Count
    shards: tuple[ShardEntry, ...]


class PreparedFrom(FrozenConfig):
    """Everything that decides the bytes of a token folder; equal origins give equal bytes.

    Attributes:
        datasets: which of the sources, counted over `sources` and `val_sources`, belong to data
            sets, and at which commit.
    """

    sources: tuple[SourceEntry, ...]
    val_sources: tuple[SourceEntry, ...] = ()
    datasets: tuple[DatasetEntry, ...] = ()
    tokenizer_sha256: str
    seed: int
    shuffle: bool
    text_field: str
    txt_documents: str
    val_fraction: float
    shard_tokens: int
    append_eos: bool
    prepend_bos: bool
    parse_special_tokens: bool
    filters: FilterConfig = Field(default_factory=FilterConfig)
    near_duplicates: NearDuplicates | None = None


class TokenManifest(FrozenConfig):
    """The whole of `manifest.json`.

    Attributes:
        dtype: of the tokens on disk.
        vocab_size: one more than the greatest id that the tokenizer knows.
        eos_id, bos_id, pad_id: ids of the tokenizer's special tokens, None where it has none.
        num_tokens, num_documents: sums over the splits.
        num_empty: source records left out because they hold no text.
        num_dropped: how many documents each filter left out: a document counts for the first one
            that drops it. `near_duplicates` is one of them.
        splits: `train`, and `val` where `val_fraction` > 0 or sources of it were given.
        prepared_from: the arguments and sources.
    """

    format: Literal["strata-tokens"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None
    num_tokens: Count
    num_documents: Count
    num_empty: Count
    num_dropped: dict[str, Count] = Field(default_factory=dict)
    splits: dict[Literal["train", "val"], SplitEntry]
    prepared_from: PreparedFrom


def read_manifest(folder: Path) -> TokenManifest:
    """Read and check the manifest of a token folder.

    Raises:
        DataError: there is none, or it is not one that this version reads.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if (folder / ".prepare").is_dir():
            raise DataError(f"{folder} is unfinished: run the same `strata data prepare` again")
        raise DataError(f"no {MANIFEST_NAME} in {folder}: make it with `strata data prepare`")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise DataError(f"{path} is larger than {_MAX_MANIFEST_BYTES // 2**20} MiB: not a manifest")
    try:
        return TokenManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        if where in ("format", "format_version"):
            raise DataError(
                f"{path}: {where} is {first['input']!r}, this strata reads "
                f"{FORMAT} version {FORMAT_VERSION}: prepare the data again"
            ) from None
        raise DataError(f"{path} is damaged: {where}: {first['msg']}: prepare it again") from None


def refuse_other_origin(out: Path, there: PreparedFrom, given: PreparedFrom) -> None:
    """Refuse to touch a folder that was made from other arguments or sources.

    Raises:
        DataError: they differ; the line says in what.
    """
    differing = []
    for name in PreparedFrom.model_fields:
        old, new = getattr(there, name), getattr(given, name)
        if old != new:
            if name == "sources":
                differing.append("the sources are others or have changed")
            elif name == "val_sources":
                differing.append("the sources of val are others or have changed")
            elif name == "datasets":
                differing.append(f"the data sets were {_names(old)}, now {_names(new)}")
            elif name in ("filters", "near_duplicates"):
                differing.append(f"{name} were {_settings(old)}, now {_settings(new)}")
            elif name == "tokenizer_sha256":
                differing.append("the tokenizer is another")
            else:
                differing.append(f"{name} was {old!r}, now {new!r}")
    if differing:
        raise DataError(
            f"{out} was prepared with other arguments ({'; '.join(differing)}): "
            "give another --out or delete it"
        )


def _names(entries: tuple[DatasetEntry, ...]) -> str:
    return ", ".join(f"{e.asked} ({e.split}) at {e.revision}" for e in entries) or "none"


def _settings(config: FrozenConfig | None) -> str:
    return config.model_dump_json(exclude_defaults=True) if config is not None else "none"


def write_json(path: Path, content: FrozenConfig) -> None:
    """Write a model as JSON so that the file is either the old one or the whole new one."""
    replace_text(path, content.model_dump_json(indent=1) + "\n")

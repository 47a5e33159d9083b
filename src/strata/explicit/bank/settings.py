"""What a bank says about itself: `bank.json`, checked as a whole before anything of it is used.

BANK is a folder, or a URL of an object store.

BANK/bank.json            this file
BANK/codec.safetensors    what training a codec found, where there is something to train
BANK/references.lance/    one Lance dataset, a row a reference
BANK/seals/               one small file a version: which files of the dataset belong to it
BANK/writer.lock          held by whoever writes
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from strata.errors import BankError
from strata.explicit.bank.files import Files, LocalFiles
from strata.explicit.bank.given import EmbedderLike
from strata.explicit.codec import MAX_STATE_BYTES, Codec, make_codec, read_codec
from strata.explicit.fingerprint import Fingerprint
from strata.explicit.memories import MemoryShape
from strata.explicit.settings import ExplicitMemoryConfig

FORMAT: Final = "strata-bank"
FORMAT_VERSION: Final = 1
SETTINGS = "bank.json"
CODEC = "codec.safetensors"
DATASET = "references.lance"
SEALS = "seals"
LOCK = "writer.lock"

_MAX_SETTINGS_BYTES = 4 * 2**20


class EmbedderSettings(BaseModel):
    """Which embedder made the vectors, and how wide they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=1000)
    width: int = Field(ge=1, le=65_536)


class BankSettings(BaseModel):
    """The whole of `bank.json`.

    Attributes:
        config: how references are cut, encoded and stored.
        embedder: None for a bank without vectors.
        heads, tokens, head_dim: the memories' shape; None in a bank that belongs to no model yet.
        fingerprint: the model; None likewise.
        codec_sha256: of `codec.safetensors`, once the codec is trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["strata-bank"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    config: ExplicitMemoryConfig
    embedder: EmbedderSettings | None = None
    heads: tuple[tuple[int, int], ...] | None = Field(default=None, max_length=100_000)
    tokens: int | None = Field(default=None, ge=1, le=4096)
    head_dim: int | None = Field(default=None, ge=1, le=4096)
    fingerprint: Fingerprint | None = None
    codec_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @property
    def shape(self) -> MemoryShape | None:
        """Of the memories."""
        if self.heads is None or self.tokens is None or self.head_dim is None:
            return None
        return MemoryShape(self.heads, self.tokens, self.head_dim)

    def with_model(
        self, shape: MemoryShape | None, fingerprint: Fingerprint | None
    ) -> BankSettings:
        """The same of a bank that belongs to a model.

        Raises:
            BankError: one of the two is missing.
        """
        if shape is None or fingerprint is None:
            raise BankError(
                "a bank belongs to a model by its memory shape and its fingerprint: both"
            )
        update = {
            "heads": shape.heads,
            "tokens": shape.tokens,
            "head_dim": shape.head_dim,
            "fingerprint": fingerprint,
        }
        return self.model_copy(update=update)


def read_settings(files: Files) -> BankSettings:
    """Read and check `bank.json`.

    Raises:
        BankError: there is none, it is damaged, or another version of strata wrote it.
    """
    path = files.where(SETTINGS)
    try:
        if files.sizes([SETTINGS]).get(SETTINGS, 0) > _MAX_SETTINGS_BYTES:
            raise BankError(f"{path} is larger than {_MAX_SETTINGS_BYTES // 2**20} MiB: not a bank")
        content = files.read(SETTINGS)
    except (FileNotFoundError, NotADirectoryError):
        raise BankError(
            f"no bank at {files}: give the folder that holds {SETTINGS}, or create one"
        ) from None
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}") from None
    tree = parse_sealed(path, content)
    if tree.get("format") != FORMAT or tree.get("format_version") != FORMAT_VERSION:
        raise BankError(
            f"{path} is {tree.get('format')!r} version {tree.get('format_version')!r}, this strata "
            f"reads {FORMAT} version {FORMAT_VERSION}"
        )
    try:
        return BankSettings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BankError(f"{path}: {where}: {' '.join(first['msg'].split())}") from None


def write_settings(files: Files, settings: BankSettings) -> None:
    """Write `bank.json` so that it is either the old one or the whole new one."""
    files.put(SETTINGS, sealed(settings.model_dump(mode="json")))


def open_codec(files: Files, given: BankSettings) -> Codec | None:
    """The codec that settings name, trained if it was; None where there is no model.

    Raises:
        BankError: its file is missing or damaged.
    """
    if given.shape is None:
        return None
    if given.codec_sha256 is None:
        return make_codec(given.config.codec, given.shape)
    path = files.where(CODEC)
    try:
        if files.sizes([CODEC]).get(CODEC, 0) > MAX_STATE_BYTES:
            raise BankError(f"{path} is larger than {MAX_STATE_BYTES // 2**20} MiB: not a codec")
        content = files.read(CODEC)
    except OSError as error:
        raise BankError(f"{path} cannot be read ({error.strerror}): the bank is damaged") from None
    return read_codec(given.config.codec, given.shape, content, given.codec_sha256, origin=path)


def embedder_settings(
    given: EmbedderLike | EmbedderSettings | None,
) -> EmbedderSettings | None:
    """An embedder as settings name it."""
    if given is None or isinstance(given, EmbedderSettings):
        return given
    return EmbedderSettings(name=given.name, width=given.width)


def refuse_other_embedder(
    bank: object, wanted: EmbedderSettings | None, given: EmbedderLike | None
) -> None:
    """Refuse any embedder but the one that made a bank's vectors, and none where there is one.

    Raises:
        BankError: it is another one.
    """
    if (given is None) != (wanted is None):
        has = "no vectors" if wanted is None else f"vectors of embedder {wanted.name!r}"
        raise BankError(f"bank {bank} holds {has}: give that embedder, or none")
    if given is not None and wanted is not None and embedder_settings(given) != wanted:
        raise BankError(
            f"bank {bank} holds vectors of embedder {wanted.name!r} (width {wanted.width}), "
            f"given {given.name!r} (width {given.width}): give the former, or make a new bank"
        )


def parse_sealed(path: str | Path, content: bytes) -> dict[str, Any]:
    """A JSON object whose last key, `sha256`, is that of the rest.

    Raises:
        BankError: it is not, or a byte of it is another than was written.
    """
    try:
        tree = json.loads(content.decode())
    except (ValueError, RecursionError):
        raise BankError(f"{path} is damaged: not JSON") from None
    if not isinstance(tree, dict) or "sha256" not in tree:
        raise BankError(f"{path} is not one of strata's files: it has no checksum")
    given = tree.pop("sha256")
    if given != _digest(tree):
        raise BankError(f"{path} is damaged: its checksum does not match what it says")
    return tree


def sealed(tree: dict[str, Any]) -> bytes:
    """What `parse_sealed` reads."""
    content = json.dumps({**tree, "sha256": _digest(tree)}, indent=1, ensure_ascii=True)
    return content.encode() + b"\n"


def write_sealed(path: Path, tree: dict[str, Any]) -> None:
    """Write what `parse_sealed` reads, beside its place, synced, renamed."""
    LocalFiles(path.parent).put(path.name, sealed(tree))


def _digest(tree: dict[str, Any]) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

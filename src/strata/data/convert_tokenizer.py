"""Tokenizers that are one file, of tiktoken or sentencepiece, as folders like any other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from strata.data.sentencepiece_file import read_sentencepiece
from strata.data.tiktoken_file import is_tiktoken, read_tiktoken
from strata.data.tokenizer_folder import begin_with, refuse_existing, save_tokenizer
from strata.errors import DataError

_SUFFIXES = (".tiktoken", ".model")


def convert_tokenizer(
    path: Path,
    *,
    out: Path,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    add_bos: bool | None = None,
) -> int:
    """Convert a tokenizer file to a folder for `AutoTokenizer.from_pretrained`.

    Args:
        path: a tiktoken file (`*.tiktoken`, the `tokenizer.model` of Llama 3) or a sentencepiece
            `.model`. Which one it is, its content says.
        out: the folder to make; it appears only when it is whole.
        bos, eos, pad: special tokens. A tiktoken file names none but Llama 3's, so they become new
            ones behind its own; those of a sentencepiece model must be among its pieces.
        add_bos: let encoding begin a text with the `bos` token; None does so for Llama 3.

    Returns:
        The size of the vocabulary.

    Raises:
        DataError: the file is missing, damaged or of another kind, a special token is missing, or
            `out` exists.
        StorageError: `out` cannot be written.
    """
    path, out = Path(path), Path(out)
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}: give a file of {' or '.join(_SUFFIXES)}")
    refuse_existing(out)
    begins = False
    try:
        if is_tiktoken(path):
            tokenizer, special, begins = read_tiktoken(path, bos=bos, eos=eos, pad=pad)
        else:
            tokenizer, special = read_sentencepiece(path, bos=bos, eos=eos, pad=pad)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if add_bos or (add_bos is None and begins):
        if "bos_token" not in special:
            raise DataError(f"{path} names no bos token to begin texts with: give one with --bos")
        begin_with(tokenizer, special["bos_token"])
    save_tokenizer(tokenizer, out, special)
    return tokenizer.get_vocab_size(with_added_tokens=True)


@contextmanager
def tokenizer_folder(given: Path) -> Iterator[Path]:
    """A folder with a tokenizer: `given`, or what a file is converted to while the block lasts.

    Raises:
        DataError: the file cannot be converted, or names no end-of-text token.
    """
    if not given.is_file():
        yield given
        return
    if given.suffix == ".json":
        raise DataError(f"{given} is a file: give the folder that it lies in")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "tokenizer")
        convert_tokenizer(given, out=folder)
        if '"eos_token"' not in (folder / "tokenizer_config.json").read_text(encoding="utf-8"):
            raise DataError(
                f"{given} names no token that ends a document: convert it first, with "
                f"`strata tokenizer convert {given} --out DIR --eos TOKEN`"
            )
        yield folder

"""Tokenizers of tiktoken: a file of byte strings in the order in which they are merged.

The file says neither how a text is split beforehand nor what special tokens there are. We split as
transformers' converter does by default, which is the way of cl100k and of Llama 3; a tokenizer that
splits otherwise (o200k, Qwen) has to come from the hub, where its folder says so.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from strata.errors import DataError

MAX_FILE_BYTES = 64 * 2**20

_LLAMA3_RANKS = 128_000
_LLAMA3_SPECIAL = 256


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins as tiktoken's do: base64, a space, a number."""
    with open(path, "rb") as file:
        return _parse_line(file.readline(4096)) is not None


def read_tiktoken(
    path: Path, *, bos: str | None, eos: str | None, pad: str | None
) -> tuple[Tokenizer, dict[str, str], bool]:
    """Convert a tiktoken file.

    Args:
        path: the file.
        bos, eos, pad: special tokens, which get the ids behind the file's; None leaves one out. A
            file of 128,000 tokens is Llama 3's, with the special tokens that model has.

    Returns:
        The tokenizer, its special tokens by their names, and whether texts begin with `bos_token`.

    Raises:
        DataError: it is damaged, or lacks some of the 256 bytes.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = _read_ranks(path)
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    special = [token for token in named.values() if token is not None]
    is_llama3 = len(ranks) == _LLAMA3_RANKS
    if is_llama3:
        known = _llama3_special_tokens()
        named["bos_token"] = bos or known[0]
        named["eos_token"] = eos or known[1]
        special = [*known, *special]

    class Converter(TikTokenConverter):
        """transformers' own, without the package that it reads files with."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    tokenizer = Converter(vocab_file=str(path)).converted()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(special)]
    )
    return tokenizer, {name: token for name, token in named.items() if token}, is_llama3


def _llama3_special_tokens() -> list[str]:
    """Those of Llama 3, in the order of their ids: a few have a use, the others are reserved."""
    used = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    }
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(_LLAMA3_SPECIAL))
    return [used.get(number) or next(reserved) for number in range(_LLAMA3_SPECIAL)]


def _read_ranks(path: Path) -> dict[bytes, int]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path} is larger than {MAX_FILE_BYTES // 2**20} MiB: no tokenizer")
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            parsed = _parse_line(line)
            if parsed is None:
                raise DataError(f"{path}, line {number}: not base64, a space and a number")
            token, rank = parsed
            if token in ranks or rank != len(ranks):
                raise DataError(
                    f"{path}, line {number}: rank {rank} where {len(ranks)} was expected; strata "
                    "converts files whose tokens are numbered from 0 without a gap"
                )
            ranks[token] = rank
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if missing:
        raise DataError(f"{path} lacks {missing} of the 256 bytes: not every text is tokens of it")
    return ranks


def _parse_line(line: bytes) -> tuple[bytes, int] | None:
    fields = line.split()
    if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 9:
        return None
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error:
        return None
    return (token, int(fields[1])) if token else None

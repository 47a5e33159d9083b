"""Opening a tokenizer for `prepare`: its special tokens, and what it puts before a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from strata.data.encode import TextEncoder
from strata.errors import DataError
from strata.files import sha256_of

_MAX_CONFIG_BYTES = 64 * 2**20


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

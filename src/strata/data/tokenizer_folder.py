"""Writing a tokenizer as the folder that transformers opens."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, processors

from strata.errors import DataError, StorageError


def refuse_existing(out: Path) -> None:
    """Refuse to write over something.

    Raises:
        DataError: `out` exists.
    """
    if out.exists():
        raise DataError(f"{out} exists: give another --out or delete it")


def begin_with(tokenizer: Tokenizer, bos: str) -> None:
    """Let encoding begin every text with a token."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def save_tokenizer(tokenizer: Tokenizer, out: Path, special_tokens: dict[str, str]) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        tokenizer: what encodes.
        out: the folder to make.
        special_tokens: `bos_token` and its like -> the token.

    Raises:
        StorageError: `out` cannot be written.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }

    def fill(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    write_folder(out, fill)


def write_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under another name and rename it, so that it is never seen half-made.

    Raises:
        StorageError: `out` cannot be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or out}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

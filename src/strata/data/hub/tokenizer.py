"""Tokenizers of models on the hub, fetched at one commit."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from strata.data.convert_tokenizer import convert_tokenizer
from strata.data.hub.errors import explain
from strata.data.tokenizer_folder import refuse_existing, write_folder
from strata.errors import DataError, StrataError

ALIASES = {
    "gemma2": "google/gemma-2-2b",
    "gpt2": "openai-community/gpt2",
    "llama2": "meta-llama/Llama-2-7b-hf",
    "llama3": "meta-llama/Meta-Llama-3-8B",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "olmo2": "allenai/OLMo-2-1124-7B",
    "qwen2": "Qwen/Qwen2-7B",
    "qwen3": "Qwen/Qwen3-8B",
}
ORIGIN_NAME = "origin.json"

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def fetch_tokenizer(
    name: str, *, out: Path, revision: str | None = None, token_env: str | None = None
) -> int:
    """Fetch the tokenizer of a model on the hub into a folder.

    `origin.json` in it says which repository and commit it is of.

    Args:
        name: one of `ALIASES`, or `owner/name`.
        out: the folder to make; it appears only when it is whole.
        revision: a branch, a tag or a commit; None means the main branch.
        token_env: the environment variable that holds a token; None takes HF_TOKEN, or the login
            of the hub's own command line, where there is one.

    Returns:
        The size of the vocabulary.

    Raises:
        DataError: there is no such alias, the repository has no tokenizer, or `out` exists.
        HubError: the hub cannot be reached, or does not give it.
        StorageError: `out` cannot be written.
    """
    out = Path(out)
    repo = ALIASES.get(name, name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        raise DataError(
            f"no tokenizer is called {name!r}: give owner/name as on the hub, or one of "
            f"{', '.join(ALIASES)}"
        )
    refuse_existing(out)
    token = _token(token_env)
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = HfApi().model_info(repo, revision=revision, token=token).sha
        snapshot = Path(
            snapshot_download(repo, revision=commit, allow_patterns=list(_FILES), token=token)
        )
    except Exception as error:  # the HTTP library's own have no common base with the hub's
        known = explain(error, repo, kind="model", revision=revision, token_env=token_env)
        if known is None:
            raise
        raise known from None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "tokenizer")
        size = _collect(repo, snapshot, folder)
        origin = json.dumps({"repo": repo, "revision": commit}, indent=1)
        (folder / ORIGIN_NAME).write_text(origin + "\n", encoding="utf-8")
        write_folder(out, lambda made: _copy(folder, made))
    return size


def _token(token_env: str | None) -> str | None:
    if token_env is None:
        return None
    token = os.environ.get(token_env, "").strip()
    if not token:
        raise DataError(
            f"{token_env} is not set: put a token of https://huggingface.co/settings/tokens into "
            "it, or leave --token-env out for what needs none"
        )
    return token


def _collect(repo: str, snapshot: Path, folder: Path) -> int:
    """Put a tokenizer.json and what belongs to it into a folder that is made."""
    if (snapshot / "tokenizer.json").is_file():
        folder.mkdir()
        for name in _FILES:
            if (snapshot / name).is_file():
                shutil.copyfile(snapshot / name, folder / name)
        return _size(repo, folder)
    if (snapshot / "tokenizer.model").is_file():
        try:
            bos, eos, pad, add_bos = _configured(snapshot / "tokenizer_config.json")
            return convert_tokenizer(
                snapshot / "tokenizer.model",
                out=folder,
                bos=bos,
                eos=eos,
                pad=pad,
                add_bos=add_bos,
            )
        except StrataError as error:
            raise DataError(f"{repo}: {str(error).replace(f'{snapshot}/', '')}") from None
    if (snapshot / "vocab.json").is_file() and (snapshot / "merges.txt").is_file():
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(snapshot).save_pretrained(folder)
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{repo}: transformers cannot open its tokenizer: {reason}") from None
        return _size(repo, folder)
    raise DataError(f"{repo} has no tokenizer.json, tokenizer.model or vocab.json: no tokenizer")


def _configured(path: Path) -> tuple[str | None, str | None, str | None, bool | None]:
    """bos, eos, pad and whether texts begin with bos, as a tokenizer_config.json says."""
    if not path.is_file():
        return None, None, None, None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path.name} is damaged: it is not JSON") from None
    found = [config.get(f"{name}_token") for name in ("bos", "eos", "pad")]
    bos, eos, pad = (token.get("content") if isinstance(token, dict) else token for token in found)
    return bos, eos, pad, config.get("add_bos_token")


def _size(repo: str, folder: Path) -> int:
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{repo}: its tokenizer.json is damaged: {reason}") from None
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _copy(folder: Path, made: Path) -> None:
    for path in sorted(folder.iterdir()):
        shutil.copyfile(path, made / path.name)

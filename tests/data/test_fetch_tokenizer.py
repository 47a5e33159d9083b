"""Tokenizers come from the hub at one commit, and what keeps them from it is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_tokenizer_files import RANKS, write_ranks
from tiny_documents import folder_bytes
from tiny_hub import Hub, serving
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from strata.data.hub.tokenizer import ALIASES, fetch_tokenizer
from strata.errors import HubError

FIRST, SECOND = "1" * 40, "2" * 40
REPO = "owner/model"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Path) -> Iterator[Hub]:
    """A hub with a tokenizer and a model's weights at FIRST, and another tokenizer at SECOND."""
    pytest.importorskip("datasets")
    with serving(monkeypatch, tmp_path / "cache") as hub:
        model = tmp_path / "model"
        shutil.copytree(tokenizer, model)
        (model / "model.safetensors").write_bytes(b"not fetched")
        hub.add(REPO, model, commit=FIRST)
        yield hub


def test_a_tokenizer_is_fetched(tmp_path: Path, hub: Hub, tokenizer: Path, run: Run) -> None:
    code, printed, _ = run("tokenizer", "fetch", REPO, "--out", tmp_path / "a", "--json")
    assert code == 0
    assert json.loads(printed) == {"out": str(tmp_path / "a"), "vocab_size": 320}
    fetched = folder_bytes(tmp_path / "a")
    assert json.loads(fetched.pop("origin.json")) == {"repo": REPO, "revision": FIRST}
    assert fetched == folder_bytes(tokenizer)
    assert not any("safetensors" in path for path in hub.asked)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").eos_token == "<eos>"


def test_aliases_and_revisions(
    tmp_path: Path, hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for repo in ALIASES.values():
        hub.add(repo, tmp_path / "model", commit=FIRST)
    write_ranks(tmp_path / "ranks.model")
    (tmp_path / "raw").mkdir()
    shutil.copy(tmp_path / "ranks.model", tmp_path / "raw" / "tokenizer.model")
    config = {"eos_token": {"content": "<e>"}, "bos_token": "<b>", "add_bos_token": True}
    (tmp_path / "raw" / "tokenizer_config.json").write_text(json.dumps(config))
    hub.add(ALIASES["llama3"], tmp_path / "raw", commit=SECOND, branch="raw")
    assert run("tokenizer", "fetch", "llama3")[0] == 0
    assert json.loads((tmp_path / "llama3" / "origin.json").read_text())["revision"] == FIRST
    # A repository with nothing but tiktoken's file is converted.
    assert fetch_tokenizer("llama3", out=tmp_path / "b", revision="raw") == len(RANKS) + 2
    converted = Tokenizer.from_file(str(tmp_path / "b" / "tokenizer.json"))
    assert converted.encode("river").ids == [len(RANKS), RANKS[b"river"]]
    assert json.loads((tmp_path / "b" / "origin.json").read_text())["revision"] == SECOND


def test_gated_repositories(
    tmp_path: Path, hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add(REPO)

    def fetch(*more: object) -> tuple[int, str, str]:
        return run("tokenizer", "fetch", REPO, "--out", tmp_path / "a", *more)

    code, out, error = fetch()
    assert (code, out) == (1, "") and error.count("\n") == 1
    assert f"the model {REPO} is gated: accept its terms at https://huggingface.co/{REPO}" in error
    assert "put it into HF_TOKEN" in error
    code, _, error = fetch("--token-env", "MY_TOKEN")
    assert code == 2 and error.count("\n") == 1
    assert "MY_TOKEN is not set: put a token of https://huggingface.co/settings/tokens" in error
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    code, _, error = fetch("--token-env", "MY_TOKEN")
    assert code == 0, error
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "cache")
    hub.locked.add(REPO)
    code, _, error = fetch("--token-env", "MY_TOKEN")
    assert code == 1 and "hf_secret" not in error
    assert "the token in MY_TOKEN may not read it: ask for access at" in error


def test_what_cannot_be_fetched(tmp_path: Path, hub: Hub, run: Run) -> None:
    def refused(*arguments: object, code: int = 2) -> str:
        given, out, error = run("tokenizer", "fetch", *arguments, "--out", tmp_path / "a")
        assert (given, out) == (code, "") and error.count("\n") == 1, error
        assert not (tmp_path / "a").exists()
        return error

    assert "no tokenizer is called 'llama33': give owner/name" in refused("llama33")
    assert "no model owner/none on the hub" in refused("owner/none", code=1)
    assert "has no revision 'v9'" in refused(REPO, "--revision", "v9", code=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    hub.add("owner/empty", tmp_path / "empty", commit=FIRST)
    assert "has no tokenizer.json, tokenizer.model or vocab.json" in refused("owner/empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    hub.add("owner/broken", tmp_path / "empty", commit=SECOND)
    assert "owner/broken: its tokenizer.json is damaged" in refused("owner/broken")


def test_offline_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="is on the hub, and HF_HUB_OFFLINE says not to ask it"):
        fetch_tokenizer("llama3", out=tmp_path / "a")

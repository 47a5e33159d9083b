"""`strata data references` through the command line, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from strata.data.references import ChunkReferences

pytest.importorskip("lance")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bank(run: Run, tmp_path: Path, tiny_model: Path) -> Path:
    """Towns of which the documents tell, and a document itself; searched by words."""
    folder, texts = tmp_path / "bank", tmp_path / "texts"
    texts.mkdir()
    (texts / "accra.txt").write_text("Accra lies at the sea and has a harbour.")
    (texts / "copy.txt").write_text("Ada lives in Accra, house 5.")
    options = ("--model", tiny_model, "--embedder", "none", "--reference-tokens", 40)
    code, _, err = run("bank", "create", folder, *options)
    assert code == 0, err
    code, _, err = run("bank", "add", folder, texts, "--model", tiny_model, "--cold")
    assert code == 0, err
    return folder


def test_chunks_get_references_and_no_copies(
    run: Run, bank: Path, tmp_path: Path, tiny_data: Path
) -> None:
    out = tmp_path / "references"
    options = ("--bank", bank, "--out", out, "--leak-threshold", 0.8)
    code, printed, err = run("data", "references", tiny_data, *options, "--json")
    assert code == 0, err
    counts = json.loads(printed)
    assert counts["num_chunks"] >= 300 and counts["num_found"] > 0 and counts["num_leaks"] > 0
    references = ChunkReferences.open(out, tokens=tiny_data)
    numbers = references.numbers(np.arange(references.num_chunks))
    names = {Path(references[int(n)].source).name for n in numbers if n >= 0}
    assert {"accra.txt", "copy.txt"} <= names  # the copy is none of another house's document
    code, again, err = run("data", "references", tiny_data, *options)
    assert code == 0 and f"{counts['num_chunks']:,} chunks" in again, err


def test_wrong_input_is_one_line(run: Run, bank: Path, tmp_path: Path, tiny_data: Path) -> None:
    out = tmp_path / "references"
    for arguments, expected in (
        ((tiny_data, "--bank", bank, "--out", out, "--by", "smell"), "--by is vector, text"),
        ((tiny_data, "--bank", bank, "--out", out, "--leak-threshold", 2), "leak_threshold"),
        ((tiny_data, "--bank", tmp_path / "no", "--out", out), "no"),
        ((tmp_path / "no", "--bank", bank, "--out", out), "strata data prepare"),
    ):
        code, printed, err = run("data", "references", *arguments)
        assert code == 2 and not printed
        assert expected in err and err.count("\n") == 1, err

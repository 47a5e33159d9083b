"""Documents to prepare, and what is left of them on disk."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from strata.data.manifest import TokenManifest

Prepare = Callable[..., TokenManifest]  # prepare_to(out, source, ..., seed=7)

WORDS = (
    *("the", "river", "runs", "to", "sea", "from", "a", "hill"),
    *("where", "one", "stone", "lies", "under", "snow", "until", "spring"),
)


def make_texts(count: int, *, seed: int = 0, max_words: int = 40) -> list[str]:
    """Random documents of 1 to `max_words` words, each with its number, so that all differ."""
    rng = random.Random(seed)
    return [
        f"{number}: {' '.join(rng.choices(WORDS, k=rng.randint(1, max_words)))}"
        for number in range(count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones included."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

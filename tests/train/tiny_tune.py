"""A toy world for fine-tuning: who lives where stands in references, and questions ask for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Bruno", "Chidi", "Farah", "Goran", "Hana")
PLACES = ("Accra", "Bergen", "Cusco", "Dakar")


def facts(count: int, *, seed: int = 0) -> list[tuple[str, str, str]]:
    """(name, place, another place)."""
    rng = random.Random(seed)
    return [(rng.choice(NAMES), *rng.sample(PLACES, 2)) for _ in range(count)]


def sft_rows(count: int, *, seed: int = 0, chat: bool = False) -> list[dict[str, Any]]:
    """Two of three rows with references."""
    rows = []
    for number, (name, place, _) in enumerate(facts(count, seed=seed)):
        asked, said = f"Where is {name}?", f" {place}"
        row: dict[str, Any] = (
            {
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": place}],
            }
            if chat
            else {"prompt": asked, "completion": said}
        )
        if number % 3:
            row["references"] = [f"{name} is in {place}."]
        rows.append(row)
    return rows


def dpo_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Each with a reference; the rejected answer is another place, and unsure of it."""
    return [
        {
            "prompt": f"Where is {name}?",
            "chosen": f" {place}",
            "rejected": f" {other}, maybe",
            "references": [f"{name} is in {place}."],
        }
        for name, place, other in facts(count, seed=seed)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

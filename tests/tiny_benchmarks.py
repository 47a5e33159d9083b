"""Rows of our own in the fields of the published benchmarks, a few for each file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

_TOWNS = ("Aral", "Bryn", "Cairn", "Dunn", "Elm")
_GOODS = ("salt", "wool", "peat", "tin", "rope")


def _choices(number: int, count: int = 4) -> list[str]:
    return [f"{_GOODS[(number + k) % 5]} from {_TOWNS[k]}" for k in range(count)]


def _plain(number: int) -> dict[str, Any]:
    town = _TOWNS[number]
    return {
        "id": f"row-{number}",
        "question": f"What does the town of {town} sell?",
        "choices": _choices(number),
        "answer": number % 4,
        "subject": f"{'north' if number % 2 else 'south'}_trade",
        "split": "test",
    }


def _with(**fields: Any) -> list[dict[str, Any]]:
    """Five rows; a callable field is given the row's number."""
    return [
        _plain(n) | {k: v(n) if callable(v) else v for k, v in fields.items()} for n in range(5)
    ]


def _cloze(number: int) -> str:
    return f"The {_GOODS[number]} of {_TOWNS[number]} is sold in {_TOWNS[number]}, and the carts"


def rows() -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of their file."""
    plain = _with()
    dev = [row | {"split": "dev", "question": f"Once more: {row['question']}"} for row in plain]
    pair = {"choices": lambda n: _choices(n, 2), "answer": lambda n: n % 2}
    sides = [
        {
            "id": f"judged-{n}",
            "question": f"Who is mayor of {_TOWNS[n]}?",
            "knowledge": f"{_TOWNS[n]} has a mayor called {_GOODS[n].title()}.",
            "right_answer": _GOODS[n].title(),
            "hallucinated_answer": f"The mayor of {_TOWNS[n]} is a horse.",
        }
        for n in range(5)
    ]
    general = [
        {
            "id": f"general-{n}",
            "question": f"Name what {_TOWNS[n]} sells.",
            "response": _GOODS[n],
            "hallucination": n in (1, 4),
            "hallucination_spans": [_GOODS[n]] if n in (1, 4) else [],
        }
        for n in range(5)
    ]
    return {
        "arc_easy": plain,
        "arc_challenge": plain,
        "openbookqa": plain,
        "medqa_us": plain,
        "medmcqa": plain,
        "mmlu": dev + plain,
        "hellaswag": _with(question=lambda n: f"Trade: A cart comes to {_TOWNS[n]}. the driver"),
        "piqa": _with(**pair),
        "winogrande": _with(
            **pair,
            question=lambda n: f"The cart from {_TOWNS[n]} passed the mule because _ was faster.",
            context_options=lambda n: [
                f"The cart from {_TOWNS[n]} passed the mule because the {one}"
                for one in ("cart", "mule")
            ],
            continuation="was faster.",
        ),
        "boolq": _with(
            context=lambda n: f"{_TOWNS[n]} sells {_GOODS[n]}.",
            question=lambda n: f"does {_TOWNS[n]} sell rope?",
            choices=["no", "yes"],
            answer=lambda n: int(n == 4),
        ),
        "lambada": [
            {"id": f"l-{n}", "question": _cloze(n), "answers": ["leave"], "split": "test"}
            for n in range(5)
        ],
        "gsm8k": [
            {
                "id": f"g-{n}",
                "question": f"{_TOWNS[n]} has {n} carts and buys two. How many has it?",
                "answers": [str(n + 2)],
                "rationale": f"{n} + 2 = <<{n}+2={n + 2}>>{n + 2}",
                "split": "test",
            }
            for n in range(5)
        ],
        "pubmedqa": [
            row | {"split": split}
            for split in ("train", "test")
            for row in _with(
                context=lambda n: f"METHODS: We asked {_TOWNS[n]}.",
                choices=["yes", "no", "maybe"],
                answer=lambda n: n % 3,
            )
        ],
        "jecqa": _with(
            answer=lambda n: n % 4 if n % 2 else None,
            answer_set=lambda n: [n % 4] if n % 2 else [0, 2],
        ),
        "truthfulqa_mc": _with(
            mc2_choices=lambda n: _choices(n), mc2_labels=[1, 0, 1, 0], best_answer="salt"
        ),
        "halluqa_zh": _with(choices=lambda n: _choices(n, 5 if n else 2), answer=lambda n: n % 2),
        "halueval_qa": sides,
        "halueval_general": general,
    }


def write(folder: Path) -> Path:
    """The files, packed as users have them."""
    folder.mkdir(exist_ok=True)
    for name, given in rows().items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in given)
    return folder

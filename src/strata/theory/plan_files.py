"""A plan as files, which other verbs take as they are.

OUT/plan.json          setting, budgets, the comparison
OUT/explicit.jsonl     for `strata bank add BANK OUT/explicit.jsonl --id-field id --model MODEL`
OUT/parameters.jsonl   a corpus, for `strata data prepare OUT/parameters.jsonl --out TOKENS`
OUT/text.jsonl         for a bank that is searched only: `strata bank add ... --cold`

A row is one reference: `id`, `text`, `uses`, `tokens`. Its id is its source, with its place where
the source has several. Each is as short as a reference has to be, so that a bank cuts none again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strata.errors import DataError, StorageError
from strata.theory.cost import FORMATS, Format
from strata.theory.planner import Plan
from strata.theory.setting import CostSetting
from strata.theory.uses import Placeable

PLAN_NAME = "plan.json"


def write_plan(
    out: Path,
    plan: Plan,
    references: Sequence[Placeable],
    *,
    tokens_n: NDArray[Any],
    uses_n: ArrayLike,
    setting: CostSetting,
    more: dict[str, Any] | None = None,
) -> None:
    """Write a plan, whole or not at all.

    Args:
        out: the folder to make.
        plan: of these references.
        references: in the plan's order.
        tokens_n, uses_n: of each.
        setting: that costs were taken of.
        more: further fields of plan.json.

    Raises:
        StorageError: `out` exists, or its parent does not.
    """
    check_out(out)
    ids = reference_ids(references)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        files = {name: (partial / f"{name}.jsonl").open("w", encoding="utf-8") for name in FORMATS}
        try:
            for reference, identifier, name, tokens, uses in zip(
                references, ids, plan.formats(), tokens_n, np.asarray(uses_n), strict=True
            ):
                row = {
                    "id": identifier,
                    "text": reference.text,
                    "uses": round(float(uses), 6),
                    "tokens": int(tokens),
                }
                files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        finally:
            for file in files.values():
                file.close()
        tree = {**plan.to_json(), "setting": setting.model_dump(mode="json"), **(more or {})}
        text = json.dumps(tree, ensure_ascii=False, indent=1)
        (partial / PLAN_NAME).write_text(text + "\n", encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def reference_ids(references: Sequence[Placeable]) -> list[str]:
    """Names of references in a plan's files."""
    count = Counter(reference.source for reference in references)
    return [
        one.source if count[one.source] == 1 else f"{one.source}:{one.start}-{one.end}"
        for one in references
    ]


def check_out(out: Path) -> None:
    """Find out before the work that a plan could not be written.

    Raises:
        StorageError: see `write_plan`.
    """
    if out.exists():
        raise StorageError(f"{out} is there already: give another --out or delete it")
    if not out.parent.is_dir():
        raise StorageError(f"{out}: there is no folder {out.parent}, create it first")


def read_formats(folder: Path) -> dict[str, Format]:
    """The format of each reference of a written plan, by its id.

    Raises:
        DataError: no plan there, or damaged.
    """
    found: dict[str, Format] = {}
    try:
        for name in FORMATS:
            with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
                for line in file:
                    found[json.loads(line)["id"]] = name
    except FileNotFoundError as error:
        raise DataError(f"no plan in {folder}: {error.filename} is missing") from None
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{folder}/{name}.jsonl is damaged: make the plan again") from None
    return found

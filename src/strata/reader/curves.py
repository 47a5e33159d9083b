"""What was seen of the reader while it learnt: RUN/probes.jsonl, and a picture of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from strata.errors import DataError
from strata.files import replace_text, storage_errors

PROBES_NAME = "probes.jsonl"
PICTURE_NAME = "curves.png"


@dataclass(frozen=True)
class Look:
    """One look at the reader.

    Attributes:
        number, stage: of the stage, from 1, and its name.
        step: of the stage.
        tokens: positions read so far, in all stages.
        loss: training loss of that step, nats a token.
        kept: tokens that a memory head kept of a reference; None where no memory was asked for.
        exact: share of questions answered exactly, by way (see `probe`).
        contains: share of answers that hold an accepted one.
        num_questions: asked in each way; of known ones at most.
        wall_s: of the look.
        also: further numbers of whoever watches.
    """

    number: int
    stage: str
    step: int
    tokens: int
    loss: float | None
    kept: int | None
    exact: dict[str, float]
    contains: dict[str, float]
    num_questions: int
    wall_s: float
    also: dict[str, float] = field(default_factory=dict)


def read_looks(out: Path) -> list[Look]:
    """All looks so far, in order.

    Raises:
        DataError: the file was changed by others.
    """
    path = out / PROBES_NAME
    if not path.exists():
        return []
    try:
        return [Look(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    except (ValueError, TypeError):
        raise DataError(f"{path} is damaged: mend or delete it, it is a record only") from None


def add_look(out: Path, look: Look) -> None:
    """Write a look down; those of the same or a later step, which come again, go.

    Raises:
        StorageError: the disk is full.
    """
    kept = [old for old in read_looks(out) if (old.number, old.step) < (look.number, look.step)]
    path = out / PROBES_NAME
    with storage_errors(path):
        lines = [json.dumps(asdict(one)) + "\n" for one in [*kept, look]]
        replace_text(path, "".join(lines))


def save_curves(looks: Sequence[Look], path: Path) -> None:
    """Exact answers against tokens read, a curve a way, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for way in dict.fromkeys(way for look in looks for way in look.exact):
        points = [(look.tokens / 1e6, look.exact[way]) for look in looks if way in look.exact]
        axes.plot(*zip(*points, strict=True), label=way.replace("_", " "), marker=".")
    for before, after in pairwise(looks):
        if before.number != after.number:
            axes.axvline(before.tokens / 1e6, color="0.8", linewidth=1, zorder=0)
    axes.set(xlabel="tokens read, millions", ylabel="answered exactly", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)

"""A corpus placed under budgets, and how often its references are used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from made_profile import profile

from strata.errors import ConfigError, DataError, StorageError
from strata.theory.cost import FORMATS
from strata.theory.plan_files import read_formats, write_plan
from strata.theory.planner import Budgets, make_plan
from strata.theory.setting import make_setting
from strata.theory.uses import count_uses, zipf_uses

PAPER = make_setting()
MEMORY, TEXT = 38.5 * 1024, 600.0


@dataclass(frozen=True)
class Piece:
    text: str
    source: str
    start: int = 0
    end: int = 1


def plan_of(uses: list[float], **budgets: float):
    count = len(uses)
    return make_plan(PAPER, [128] * count, [TEXT] * count, uses, Budgets(**budgets))


def test_without_budgets_each_use_count_has_the_cheapest_format() -> None:
    made = plan_of([0, 0.4, 0.6, 13_000, 14_000])
    assert made.formats() == ["text", "text", "explicit", "explicit", "parameters"]
    assert made.exact and made.gap == 0
    mixed, *single = made.rows
    assert [row.name for row in made.rows] == ["planned", *FORMATS]
    assert mixed.total < min(row.total for row in single)
    assert mixed.total == pytest.approx(mixed.write + mixed.read)
    assert mixed.per_use == pytest.approx(mixed.total / 27_001)


def test_budgets_push_what_is_used_least_into_text() -> None:
    uses = [100, 1, 3, 50, 2, 20_000]
    made = plan_of(uses, disk_bytes=6 * TEXT + 2.5 * MEMORY, ram_bytes=0)
    assert made.formats() == ["explicit", "text", "text", "text", "text", "explicit"]
    assert made.rows[0].fits and made.rows[0].disk_bytes <= 6 * TEXT + 2.5 * MEMORY
    assert not {row.name: row.fits for row in made.rows}["explicit"]
    # Parameters would save 0.95 TFLOPs, encoding the other five far more: only then are they next.
    short, enough = (plan_of(uses, compute_tflops=2.24 + 0.3082 * n) for n in (4, 5))
    assert short.formats() == ["explicit"] * 6
    assert enough.formats() == ["explicit"] * 5 + ["parameters"]


def test_seconds_may_place_otherwise_than_operations() -> None:
    """A slow disk makes frequent reads of memories dear: parameters from fewer uses on."""
    rates = profile(disk_read_latency_s=10e-3)
    uses = [100.0, 1000.0]
    assert plan_of(uses).formats() == ["explicit", "explicit"]
    made = make_plan(PAPER, [128] * 2, [TEXT] * 2, uses, Budgets(), profile=rates)
    assert made.formats() == ["explicit", "parameters"] and made.unit == "s"


def test_a_plan_refuses() -> None:
    with pytest.raises(ConfigError, match="does not hold the corpus as text"):
        plan_of([1.0, 2.0], disk_bytes=TEXT)
    with pytest.raises(ConfigError, match="no references"):
        plan_of([])
    with pytest.raises(ConfigError, match="0 or more"):
        plan_of([-1.0])
    with pytest.raises(ConfigError, match="0 or more"):
        plan_of([float("nan")])
    with pytest.raises(ConfigError, match="give 0 or more"):
        plan_of([1.0], ram_bytes=-1)


def test_zipf() -> None:
    uses = zipf_uses(4, exponent=1.0, total=25.0)
    np.testing.assert_allclose(uses, [12, 6, 4, 3])
    np.testing.assert_allclose(zipf_uses(4, exponent=0, total=8), 2)
    with pytest.raises(ConfigError, match="exponent"):
        zipf_uses(4, exponent=-1, total=1)
    with pytest.raises(ConfigError, match="number of uses"):
        zipf_uses(4, exponent=1, total=float("inf"))


PIECES = [
    Piece("Aral has salt.", "aral", 0, 14),
    Piece("Its mayor is Orla.", "aral", 15, 33),
    Piece("Bryn has a bridge.", "bryn", 0, 18),
]


def write_log(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_log_is_counted_in_every_way_it_may_be_written(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log.jsonl",
        {"used": [{"source": "aral", "start": 0, "end": 14}, {"source": "bryn"}]},
        {"source": "aral", "start": 16, "end": 17, "uses": 2},
        {"source": "aral", "answers": ["orla"]},
        {"source": "aral"},
        {"source": "nowhere"},
        {"question": "the bridge?", "answers": ["Bryn"]},
        {"prompt": "the unknown?"},
    )
    asked: list[str] = []

    def find(queries):
        asked.extend(queries)
        return [[2] if "bridge" in query else [] for query in queries]

    found = count_uses(log, PIECES, find=find)
    np.testing.assert_allclose(found.uses_n, [1 + 0.5, 2 + 1 + 0.5, 1 + 1])
    assert (found.rows, found.lost) == (7, 2) and len(asked) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no queries"),
        ("[1]\n", "line 1 holds list"),
        ("{\n", "line 1 is not JSON"),
        ('{"id": 1}\n', "says nothing that was read"),
        ('{"question": " "}\n', "says nothing that was read"),
        ('{"source": 3}\n', "source must be a string"),
        ('{"used": [3]}\n', "source must be a string"),
        ('{"source": "aral", "uses": "many"}\n', "uses must be a number"),
        ('{"source": "aral", "uses": -1}\n', "uses must be a number"),
        ('{"source": "nowhere"}\n', "no row names anything of the corpus"),
        ('{"question": "the bridge?"}\n', "have to be searched for"),
    ],
)
def test_a_log_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(DataError, match=says):
        count_uses(tmp_path / "log.jsonl", PIECES)


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no query log"):
        count_uses(tmp_path / "missing", PIECES)
    with pytest.raises(DataError, match="is a folder"):
        count_uses(tmp_path, PIECES)


def test_a_plan_is_written_whole_and_read_again(tmp_path: Path) -> None:
    uses = [20_000.0, 5.0, 0.0]
    made = plan_of(uses)
    out = tmp_path / "plan"
    write_plan(
        out, made, PIECES, tokens_n=np.array([5, 6, 7]), uses_n=uses, setting=PAPER, more={"log": 3}
    )
    assert read_formats(out) == {
        "aral:0-14": "parameters", "aral:15-33": "explicit", "bryn": "text"
    }  # fmt: skip
    row = json.loads((out / "explicit.jsonl").read_text())
    assert row == {"id": "aral:15-33", "text": "Its mayor is Orla.", "uses": 5.0, "tokens": 6}
    tree = json.loads((out / "plan.json").read_text())
    assert tree["log"] == 3 and [one["name"] for one in tree["rows"]] == ["planned", *FORMATS]
    with pytest.raises(StorageError, match="is there already"):
        write_plan(out, made, PIECES, tokens_n=np.ones(3), uses_n=uses, setting=PAPER)
    with pytest.raises(StorageError, match="there is no folder"):
        write_plan(
            tmp_path / "a" / "b", made, PIECES, tokens_n=np.ones(3), uses_n=uses, setting=PAPER
        )
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
    (out / "text.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"text\.jsonl is damaged"):
        read_formats(out)
    with pytest.raises(DataError, match="no plan in"):
        read_formats(tmp_path)

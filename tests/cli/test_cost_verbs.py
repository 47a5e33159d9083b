"""`strata cost`, `cost calibrate` and `cost plan` through the command line, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

Run = Callable[..., tuple[int, str, str]]

PROFILE = {
    "name": "made up", "matmul_flops_per_s": 1e11, "memory_bytes_per_s": 1e10,
    "disk_read_latency_s": 1e-4, "disk_read_bytes_per_s": 1e9, "disk_write_bytes_per_s": 1e9,
    "disk_bytes": 1e12, "ram_bytes": 1e10, "price_per_hour": 1.0, "disk_price_per_gb_month": 0.1,
}  # fmt: skip


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(PROFILE))
    return path


def test_the_papers_constants(run: Run) -> None:
    code, out, err = run("cost", "--json")
    tree = json.loads(out)
    assert code == 0, err
    assert list(tree) == ["write", "read", "crossovers"]
    assert [f"{tree['write'][name]:.3g}" for name in ("parameters", "explicit", "text")] == [
        "2.24", "0.308", "0",
    ]  # fmt: skip
    assert [f"{tree['read'][name]:.3g}" for name in ("parameters", "explicit", "text")] == [
        "0", "0.000144", "0.624",
    ]  # fmt: skip
    assert [f"{at:.3g}" for at in tree["crossovers"]] == ["0.494", "1.34e+04"]
    code, out, _ = run("cost")
    assert code == 0 and "0.308" in out and "0.494" in out and "13,388" in out


def test_a_profile_adds_seconds_bytes_and_money(run: Run, profile: Path, tmp_path: Path) -> None:
    picture = tmp_path / "cost.png"
    code, out, err = run(
        "cost", "--profile", profile, "--months", 12, "--uses", 3, "--plot", picture, "--json"
    )
    tree = json.loads(out)
    assert code == 0, err
    assert tree["crossovers"][1] == pytest.approx(13_388.36, abs=0.01)
    assert tree["seconds"]["crossovers"][1] < tree["crossovers"][1]
    assert tree["bytes"]["disk"]["explicit"] == 38.5 * 1024 + 576
    assert tree["room"]["text"] == pytest.approx(1e12 / 576)
    assert tree["money"]["currency"] == "USD"
    assert tree["totals"][0]["cheapest"] == "explicit" and tree["totals"][0]["uses"] == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    profile.write_text(json.dumps(PROFILE))  # JSON is YAML
    code, out, _ = run("cost", "--profile", profile)
    assert code == 0 and "room for" in out


def test_any_shape(run: Run, tiny_model: Path) -> None:
    code, out, err = run("cost", "--model", tiny_model, "--set", "memory.tokens=4", "--json")
    assert code == 0, err
    # One memory layer of two, two heads of 16: 2 * 1 * 2 * 64 * 4 * 32.
    assert json.loads(out)["read"]["explicit"] == 2 * 2 * 64 * 4 * 32 / 1e12
    given = [f"--set=shape.{name}={value}" for name, value in {
        "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "width": 32,
        "mlp_width": 64, "vocab_size": 320,
    }.items()]  # fmt: skip
    code, again, _ = run("cost", *given, "--set=memory.num_layers=1", "--set=memory.tokens=4",
                         "--json")  # fmt: skip
    assert code == 0 and json.loads(again) == json.loads(out)


def test_the_shape_of_a_bank(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lance")
    code, _, err = run(
        "bank", "create", tmp_path / "bank", "--model", tiny_model, "--embedder", "none",
        "--reference-tokens", 24, "--tokens", 4, "--layers", "1", "--codec", "int8",
    )  # fmt: skip
    assert code == 0, err
    options = ("--model", tiny_model, "--profile")
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    code, out, err = run("cost", "--bank", tmp_path / "bank", *options, path, "--json")
    assert code == 0, err
    tree = json.loads(out)
    # One head keeps 4 keys and 4 values of 16 bytes and a scale; text is 24 tokens of 4.5 bytes.
    assert tree["bytes"]["disk"]["explicit"] == 8 * (16 + 2) + 24 * 4.5


def test_calibrate(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from strata.theory import calibrate

    small = partial(calibrate.calibrate, file_bytes=4 * 2**20)
    monkeypatch.setattr(calibrate, "calibrate", small)
    out_path = tmp_path / "p.json"
    code, out, err = run(
        "cost", "calibrate", "--dir", tmp_path, "--out", out_path, "--rounds", 1,
        "--price-per-hour", 2,
    )  # fmt: skip
    assert code == 0, err
    assert "GFLOP/s" in out and f"wrote {out_path}" in out
    assert json.loads(out_path.read_text())["price_per_hour"] == 2
    code, out, err = run("cost", "--profile", out_path, "--json")
    assert code == 0 and json.loads(out)["seconds"]["write"]["explicit"] > 0, err


def plan(run: Run, towns: Path, tiny_model: Path, *options: object) -> tuple[int, str, str]:
    return run(
        "cost", "plan", towns, "--model", tiny_model, "--set", "memory.reference_tokens=24",
        "--set", "memory.tokens=4", *options,
    )  # fmt: skip


def test_a_plan_goes_into_a_bank_and_into_training(
    run: Run, towns: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Of three towns one is asked for all the time, one now and then, one never."""
    pytest.importorskip("lance")
    log = tmp_path / "log.jsonl"
    rows = [
        {"source": str(towns / "aral.txt"), "answers": ["Orla Venn"], "uses": 1e7},
        {"question": "who built the bridge of Bryn?"},
        {"question": "which bridge was built in the year of the flood"},
        {"source": "elsewhere"},
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "plan"
    code, shown, err = plan(
        run, towns, tiny_model, "--queries", log, "--out", out, "--json", "--budget-disk", "1MB"
    )
    assert code == 0, err
    tree = json.loads(shown)
    assert tree["log_rows"] == 4 and tree["log_rows_lost"] == 1 and "1 of 4 rows" in err
    placed = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("parameters", "explicit", "text")
    }
    towns_in = {
        name: {Path(row["id"].split(":")[0]).name for row in rows} for name, rows in placed.items()
    }
    assert towns_in["parameters"] == {"aral.txt"} and towns_in["explicit"] == {"bryn.md"}
    assert any("Orla" in row["text"] for row in placed["parameters"])
    assert any("wool" in row["text"] for row in placed["text"])
    costs = {row["name"]: row["total"] for row in tree["rows"]}
    assert costs["planned"] < min(costs[name] for name in ("parameters", "explicit", "text"))

    bank = tmp_path / "bank"
    assert run("bank", "create", bank, "--model", tiny_model, "--embedder", "none",
               "--reference-tokens", 24, "--tokens", 4)[0] == 0  # fmt: skip
    code, shown, err = run(
        "bank", "add", bank, out / "explicit.jsonl", "--id-field", "id", "--model", tiny_model,
        "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(shown)["references"] == len(placed["explicit"]), err
    held = json.loads(run("bank", "ls", bank, "--json")[1])
    assert {one["source"] for one in held} == {row["id"] for row in placed["explicit"]}
    code, _, err = run(
        "data", "prepare", out / "parameters.jsonl", "--tokenizer", tiny_model, "--out",
        tmp_path / "tokens", "--val-fraction", "0",
    )  # fmt: skip
    assert code == 0, err


def test_a_plan_by_zipf_and_for_a_human(
    run: Run, towns: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (towns / "again.txt").write_text((towns / "aral.txt").read_text())
    code, shown, err = plan(
        run, towns, tiny_model, "--zipf", 1, "--total-uses", 100, "--out", tmp_path / "plan"
    )
    assert code == 0, err
    assert "planned" in shown and "No plan costs less" in shown and "count once" in shown
    assert "strata bank add BANK" in shown
    tree = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert tree["budgets"]["disk_bytes"] is None and tree["setting"]["memory"]["tokens"] == 4


@pytest.mark.parametrize(
    ("text", "bytes"), [("10GB", 1e10), ("512MiB", 512 * 2**20), ("1000", 1000), ("1.5k", 1500)]
)
def test_bytes_are_read(text: str, bytes: float) -> None:
    from strata.cli.cost_plan import parse_bytes

    assert parse_bytes("--budget-disk", text) == bytes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset", "gpt5"), "no preset 'gpt5': give one of memory3_2b"),
        (("--set", "shape.layers=3"), "unknown key shape.layers; allowed here: num_layers"),
        (("--set", "shape.num_layers=0"), "shape.num_layers"),
        (("--set", "nonsense"), "is not of the form a.b=value"),
        (("--set", "memory.tokens=200"), "memory.tokens 200 exceeds memory.reference_tokens 128"),
        (("--set", "memory.num_layers=45"), "exceeds the 44 layers"),
        (("--set", "memory.num_heads=177"), "exceeds the 176 KV heads"),
        (("--set", "memory.depth=3"), "memory.depth 3"),
        (("--set", "shape.num_kv_heads=7"), "no multiple of num_kv_heads 7"),
        (("--model", "{empty}"), "no config.json in"),
        (("--model", "{experts}"), "mixture of 8 experts"),
        (("--model", "{broken}"), "is not JSON"),
        (("--model", "{nothing}"), "does not say num_hidden_layers"),
        (("--profile", "{empty}/missing.yaml"), "no profile at"),
        (("--profile", "{bad}"), "matmul_flops_per_s"),
        (("--months", "3"), "need --profile"),
        (("--profile", "{good}", "--cached", "2"), "give a share between 0 and 1"),
        (("--profile", "{free}", "--months", "2"), "no prices"),
        (("--uses", "-1"), "--uses -1.0: give 0 or more"),
        (("--codec", "zip"), "codec 'zip'"),
        (("--bank", "{empty}"), "no bank at"),
        (("--plot", "{empty}/no/where.png"), "there is no folder"),
        (("calibrate", "--out", "{empty}/profile.txt"), ".yaml or .json"),
        (("calibrate", "--out", "{empty}/p.yaml", "--rounds", "0"), "rounds 0"),
        (("calibrate", "--out", "{empty}/p.yaml", "--disk-price", "-1"), "give 0 or more"),
        (("plan", "{towns}", "--out", "{empty}/p"), "either --queries LOG or --zipf S"),
        (("plan", "{towns}", "--out", "{empty}/p", "--zipf", "1"), "needs --total-uses"),
        (("plan", "{towns}", "--out", "{empty}", "--zipf", "1", "--total-uses", "9"),
         "there already"),
        (("plan", "{towns}", "--out", "{empty}/p", "--zipf", "1", "--total-uses", "9"),
         "give --model, or --tokenizer"),
        (("plan", "{towns}", "--out", "{empty}/p", "--zipf", "1", "--total-uses", "9",
          "--tokenizer", "{empty}"), "no tokenizer in"),
        (("plan", "{towns}", "--out", "{empty}/p", "--zipf", "1", "--total-uses", "0"),
         "more than 0"),
        (("plan", "{towns}", "--out", "{empty}/p", "--zipf", "1", "--total-uses", "9",
          "--budget-disk", "much"), "give bytes as 10GB"),
        (("plan", "{towns}", "--out", "{empty}/p", "--zipf", "1", "--total-uses", "9",
          "--budget-disk", "3", "--tokenizer", "{model}"), "does not hold the corpus as text"),
        (("plan", "{towns}", "--out", "{empty}/p", "--queries", "{bad}", "--tokenizer", "{model}"),
         "is not JSON"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    run: Run, towns: Path, tiny_model: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    places = {"towns": towns, "model": tiny_model}
    for name in ("empty", "experts", "broken", "nothing"):
        places[name] = tmp_path / name
        places[name].mkdir()
    (places["experts"] / "config.json").write_text('{"num_local_experts": 8}')
    (places["broken"] / "config.json").write_text("{")
    (places["nothing"] / "config.json").write_text("{}")
    free = {name: value for name, value in PROFILE.items() if "price" not in name}
    for name, tree in (("bad", {"name": "x", "ram_bytes": 1}), ("good", PROFILE), ("free", free)):
        places[name] = tmp_path / f"{name}.yaml"
        places[name].write_text(yaml.safe_dump(tree))
    code, out, err = run("cost", *(argument.format(**places) for argument in arguments))
    lines = [line for line in err.splitlines() if line.strip()]
    assert code in (1, 2) and out == "", (out, err)
    assert len(lines) == 1 and lines[0].startswith("strata: error: ") and says in lines[0], err

"""`strata cost`: what knowledge costs in parameters, explicit memory and text."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strata.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from strata.theory.machine import HardwareProfile
    from strata.theory.setting import CostSetting

Preset = Annotated[
    str, typer.Option(help="shape of memory3_2b (the paper's), llama3_1b or llama3_8b")
]
Model = Annotated[
    Path | None, typer.Option(help="take the shape of this Hugging Face model folder")
]
BankFolder = Annotated[
    Path | None, typer.Option("--bank", help="take layers, heads, tokens and codec of this bank")
]
Codec = Annotated[
    str | None, typer.Option(help="of stored memories: bf16, int8, faiss, a FAISS factory string")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="shape.num_layers=32, memory.tokens=16, ... (repeatable)"),
]
Profile = Annotated[
    Path | None, typer.Option(help="of `strata cost calibrate`: count seconds and bytes too")
]
Cached = Annotated[float, typer.Option(help="share of reads that a cache in RAM serves, 0 to 1")]
Months = Annotated[
    float | None, typer.Option(help="count money: the profile's prices, bytes kept so long")
]

_USES = (0.1, 1, 100, 10_000, 100_000)


def cost(
    context: typer.Context,
    preset: Preset = "memory3_2b",
    model: Model = None,
    bank: BankFolder = None,
    codec: Codec = None,
    set_: Set = None,
    profile: Profile = None,
    cached: Cached = 0.0,
    months: Months = None,
    uses: Annotated[
        list[float] | None, typer.Option(help="show totals for so many uses (repeatable)")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of uses against total cost")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The cost of one reference in each memory format, by how often it is used."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from strata.theory import machine
    from strata.theory.cost import flops
    from strata.theory.plot import save_plot
    from strata.theory.report import costs_json, costs_tables

    setting = make_setting(preset, model, bank, codec, set_)
    rates = None if profile is None else read_profile(profile)
    if rates is None and (months is not None or cached):
        raise ConfigError("--months and --cached need --profile: make one with cost calibrate")
    for number in uses or ():
        if not (number >= 0 and math.isfinite(number)):
            raise ConfigError(f"--uses {number}: give 0 or more")
    if plot is not None and not plot.parent.is_dir():
        raise StorageError(f"--plot {plot}: there is no folder {plot.parent}, create it first")
    counted = [flops(setting)]
    if rates is not None:
        counted.append(machine.seconds(setting, rates, cached=cached))
        if months is not None:
            counted.append(machine.money(setting, rates, months=months, cached=cached))
    if plot is not None:
        name = preset if model is None else model.name
        tokens = setting.memory.reference_tokens
        save_plot(counted[-1], plot, title=f"a reference of {tokens} tokens, {name}")
        print(f"wrote {plot}", file=sys.stderr)
    if as_json:
        print(json.dumps(costs_json(counted, setting, rates, uses or [])))
    else:
        Console().print(costs_tables(counted, setting, rates, uses or _USES))


def calibrate(
    out: Annotated[Path, typer.Option(help="the profile, .yaml or .json")] = Path("profile.yaml"),
    folder: Annotated[Path, typer.Option("--dir", help="on the disk that banks lie on")] = Path(
        "."
    ),
    bank: Annotated[
        Path | None, typer.Option(help="also measure searching this bank, by its own retriever")
    ] = None,
    price_per_hour: Annotated[float, typer.Option(help="of this machine while it computes")] = 0.0,
    disk_price: Annotated[float, typer.Option(help="of a GB (1e9 bytes) a month")] = 0.0,
    ram_price: Annotated[float, typer.Option(help="of a GB a month")] = 0.0,
    currency: Annotated[str, typer.Option(help="of these prices")] = "USD",
    rounds: Annotated[int, typer.Option(help="repetitions; medians count")] = 7,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure this machine: matrix products, memory, disk; write a profile for `--profile`."""
    from rich.console import Console

    from strata.config import FrozenConfig, dump_yaml, validate
    from strata.device import pick_device
    from strata.theory.calibrate import calibrate as measure
    from strata.theory.machine import HardwareProfile

    if out.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"--out {out}: give the path of a .yaml or .json file")
    if not out.parent.is_dir():
        raise StorageError(f"--out {out}: there is no folder {out.parent}, create it first")
    prices = {
        "price_per_hour": price_per_hour,
        "disk_price_per_gb_month": disk_price,
        "ram_price_per_gb_month": ram_price,
        "currency": currency,
    }
    for name, price in prices.items():
        if isinstance(price, float) and not (price >= 0 and math.isfinite(price)):
            raise ConfigError(f"{name} {price}: give 0 or more")
    with Console(stderr=True).status("starting") as status:
        search_s = 0.0 if bank is None else _search_s(bank, device=device, rounds=rounds)
        measured = measure(
            folder,
            device=pick_device(device),
            search_s=search_s,
            rounds=rounds,
            say=lambda what: status.update(f"measuring {what}"),
        )
    tree = measured.model_dump() | prices
    profile: FrozenConfig = validate(HardwareProfile, tree, origin="the profile")
    text = json.dumps(tree, indent=1) + "\n" if out.suffix == ".json" else dump_yaml(profile)
    out.write_text(text, encoding="utf-8")
    if as_json:
        print(json.dumps(tree))
        return
    print(
        f"{measured.name}, {measured.device}, {measured.threads} threads, {measured.dtype}\n"
        f"matrix products  {measured.matmul_flops_per_s / 1e9:,.1f} GFLOP/s\n"
        f"memory           {measured.memory_bytes_per_s / 1e9:,.1f} GB/s, read plus written\n"
        f"disk             {measured.disk_read_latency_s * 1e6:,.0f} us a random read, then "
        f"{measured.disk_read_bytes_per_s / 1e9:,.2f} GB/s; written at "
        f"{measured.disk_write_bytes_per_s / 1e9:,.2f} GB/s"
        f"{' (from the page cache: this disk cannot be read past it)' * measured.disk_cached}\n"
        + (f"search           {search_s * 1e3:,.1f} ms a query\n" if bank is not None else "")
        + f"free             {measured.disk_bytes / 1e9:,.0f} GB of disk, "
        f"{measured.ram_bytes / 1e9:,.1f} GB of memory\n"
        f"wrote {out}"
    )


def make_setting(
    preset: str,
    model: Path | None,
    bank: Path | None,
    codec: str | None,
    overrides: list[str] | None,
) -> CostSetting:
    """The setting that the options of a verb say."""
    from strata.theory import setting

    shape = None if model is None else setting.read_shape(model)
    memory: dict[str, Any] = {}
    if bank is not None:
        memory, own_codec = _of_bank(bank)
        codec = codec or own_codec
    given: dict[str, Any] = {
        "preset": preset, "shape": shape, "memory": memory, "overrides": overrides or (),
    }  # fmt: skip
    made = setting.make_setting(**given)
    if codec is not None:
        from strata.explicit.sizes import vector_bytes

        stored = {"per_vector": vector_bytes(codec, head_dim=made.shape.head_dim)}
        made = setting.make_setting(**given, bytes=stored)
    return made


def _of_bank(bank: Path) -> tuple[dict[str, Any], str]:
    """Fields of MemoryShape, and the codec, of a bank."""
    from strata.explicit.bank import Bank

    given = Bank.open(bank).settings
    memory: dict[str, Any] = {"reference_tokens": given.config.reference_tokens}
    if given.fingerprint is not None:
        layers = given.fingerprint.layers
        memory |= {
            "num_layers": len(layers),
            "depth": max(layers) + 1,
            "num_heads": len(given.fingerprint.heads),
            "tokens": given.fingerprint.tokens,
        }
    return memory, given.config.codec


def read_profile(path: Path) -> HardwareProfile:
    """A profile from YAML or JSON, which is YAML too."""
    from strata.config import load_config
    from strata.theory.machine import HardwareProfile

    if not path.exists():
        raise ConfigError(f"no profile at {path}: make one with strata cost calibrate --out {path}")
    return load_config(HardwareProfile, path)


def _search_s(bank: Path, *, device: str, rounds: int) -> float:
    """Median seconds to find five references of a bank for a text of its own."""
    import statistics
    import time

    from strata.explicit.bank import Bank
    from strata.explicit.source import open_retriever

    opened = Bank.open(bank)
    texts = opened.sample_texts(max(1, rounds) + 1)
    if not texts:
        raise ConfigError(f"{bank} holds no references: nothing to search")
    retriever = open_retriever(opened, device=device)
    times = []
    for number, text in enumerate(texts):
        begin_s = time.perf_counter()
        retriever.search([text], 5)
        if number or len(texts) == 1:  # the first one reads the index
            times.append(time.perf_counter() - begin_s)
    return statistics.median(times)

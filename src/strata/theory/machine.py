"""What the same reads and writes take on one machine: seconds, bytes and money.

seconds = operations / matmul rate, but what a chunk attends to is also streamed from memory once a
generated token, and the slower of the two counts; what is read from a disk waits for its latency
and its bytes; what is found shares the time of a search. A profile holds the rates;
`strata cost calibrate` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from strata.config import FrozenConfig
from strata.errors import ConfigError
from strata.theory.cost import FORMATS, Costs, Floats, Format, operations
from strata.theory.setting import CostSetting

_GB = 1e9
_HOUR_S = 3600.0


class HardwareProfile(FrozenConfig):
    """What one machine does in a second, what it holds, and what it costs.

    Attributes:
        name: of the machine, in words.
        device, threads, dtype: that the rates below were measured with.
        matmul_flops_per_s: of a large matrix product.
        memory_bytes_per_s: read plus written, of a large copy.
        disk_read_latency_s: of a random read, before its first byte.
        disk_read_bytes_per_s: of random reads of a mebibyte, after the latency.
        disk_write_bytes_per_s: synced.
        disk_cached: whether the reads came from the system's page cache, since this disk cannot be
            read past it.
        search_s: to find the references of one query; 0 where it was not measured.
        disk_bytes, ram_bytes: for banks and text, and for parameters.
        price_per_hour: of the machine while it computes.
        disk_price_per_gb_month, ram_price_per_gb_month: of a place, in 1e9 bytes.
        currency: of the prices.
    """

    name: str
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    dtype: str = "float32"
    matmul_flops_per_s: float = Field(gt=0, allow_inf_nan=False)
    memory_bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    disk_read_latency_s: float = Field(ge=0, allow_inf_nan=False)
    disk_read_bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    disk_write_bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    disk_cached: bool = False
    search_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    disk_bytes: float = Field(gt=0, allow_inf_nan=False)
    ram_bytes: float = Field(gt=0, allow_inf_nan=False)
    price_per_hour: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    disk_price_per_gb_month: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    ram_price_per_gb_month: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    currency: str = "USD"

    @property
    def priced(self) -> bool:
        """Whether any price was given."""
        prices = (self.price_per_hour, self.disk_price_per_gb_month, self.ram_price_per_gb_month)
        return any(prices)


@dataclass(frozen=True)
class Weights:
    """Bytes of one reference; each a number or (n,).

    Attributes:
        text: its characters.
        memory: its explicit memory, as stored.
        memory_open: the same with full numbers, as it is computed with.
        context: its keys and values in all layers, while it stands in a prompt.
        parameters: as many as hold what it says.
    """

    text: Floats
    memory: Floats
    memory_open: Floats
    context: Floats
    parameters: Floats

    @property
    def disk_m(self) -> Floats:
        """On the disk in each format: its text always, for search, citing and training anew."""
        return np.stack([self.text, self.text + self.memory, self.text])

    @property
    def ram_m(self) -> Floats:
        """In memory in each format, as long as the model is served."""
        nothing = np.zeros_like(self.text)
        return np.stack([self.parameters, nothing, nothing])


def weights(
    setting: CostSetting,
    reference_tokens: ArrayLike | None = None,
    text_bytes: ArrayLike | None = None,
) -> Weights:
    """Bytes of references in each format.

    A stored memory has room for `memory.tokens` tokens whatever the reference's length.

    Args:
        setting: decoder and memory.
        reference_tokens: (n,); None for one of the setting's length.
        text_bytes: (n,), where known; None for `bytes.per_text_token` each.
    """
    shape, memory, bytes = setting.shape, setting.memory, setting.bytes
    length = np.asarray(
        memory.reference_tokens if reference_tokens is None else reference_tokens, np.float64
    )
    text = length * bytes.per_text_token if text_bytes is None else np.asarray(text_bytes)
    vectors = 2 * setting.memory_heads * memory.tokens * np.ones_like(length)
    pairs = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    return Weights(
        text=text.astype(np.float64),
        memory=vectors * setting.vector_bytes,
        memory_open=vectors * shape.head_dim * bytes.per_number,
        context=length * pairs * bytes.per_number,
        parameters=length * bytes.bits_per_token / bytes.bits_per_parameter * bytes.per_number,
    )


def seconds(
    setting: CostSetting,
    profile: HardwareProfile,
    reference_tokens: ArrayLike | None = None,
    text_bytes: ArrayLike | None = None,
    *,
    cached: float = 0.0,
) -> Costs:
    """Seconds of this machine to write a reference and to read it once.

    A read is also the latency that it adds to an answer. Parameters are read with the model, for
    nothing; training is taken to run at the matmul rate.

    Args:
        setting: decoder and memory.
        profile: of the machine.
        reference_tokens, text_bytes: (n,); None for one reference of the setting's.
        cached: share of reads, 0 to 1, that a cache in RAM serves.

    Raises:
        ConfigError: `cached` is no share.
    """
    if not 0 <= cached <= 1:
        raise ConfigError(f"cached {cached}: give a share between 0 and 1")
    done = operations(setting, reference_tokens)
    weigh = weights(setting, reference_tokens, text_bytes)
    rate, stream = profile.matmul_flops_per_s, profile.memory_bytes_per_s
    chunk = setting.memory.chunk_tokens
    search_s = profile.search_s / setting.memory.references_per_search

    def fetch_s(count: Floats) -> Floats:
        at_all = profile.disk_read_latency_s + count / profile.disk_read_bytes_per_s
        return search_s + (1 - cached) * at_all

    def attend_s(count: Floats, size: Floats) -> Floats:
        return np.maximum(count / rate, chunk * size / stream)

    opened_s = (weigh.memory + weigh.memory_open) / stream
    nothing = np.zeros_like(done.train)
    return Costs(
        "s",
        np.stack(
            [
                done.train / rate,
                done.encode / rate + weigh.memory / profile.disk_write_bytes_per_s,
                nothing,
            ]
        ),
        np.stack(
            [
                nothing,
                fetch_s(weigh.memory) + opened_s + attend_s(done.read_explicit, weigh.memory_open),
                fetch_s(weigh.text) + done.prefill / rate + attend_s(done.read_text, weigh.context),
            ]
        ),
    )


def money(
    setting: CostSetting,
    profile: HardwareProfile,
    reference_tokens: ArrayLike | None = None,
    text_bytes: ArrayLike | None = None,
    *,
    months: float,
    cached: float = 0.0,
) -> Costs:
    """The price of these seconds, and of the bytes for so many months, which counts as writing.

    Raises:
        ConfigError: the profile has no price, or there are fewer than 0 months.
    """
    if not profile.priced:
        raise ConfigError(
            "the profile has no prices: write price_per_hour, disk_price_per_gb_month or "
            "ram_price_per_gb_month into it"
        )
    if not months >= 0:
        raise ConfigError(f"{months} months: give 0 or more")
    time = seconds(setting, profile, reference_tokens, text_bytes, cached=cached)
    weigh = weights(setting, reference_tokens, text_bytes)
    disk = weigh.disk_m * profile.disk_price_per_gb_month
    ram = weigh.ram_m * profile.ram_price_per_gb_month
    hour = profile.price_per_hour / _HOUR_S
    return Costs(
        profile.currency,
        time.write_m * hour + (disk + ram) / _GB * months,
        time.read_m * hour,
    )


def room(setting: CostSetting, profile: HardwareProfile) -> dict[Format, float]:
    """How many references of the setting's length each tier of the machine holds, alone.

    Parameters are held in RAM, memories with their text, and text, on the disk.
    """
    weigh = weights(setting)
    ram, disk = weigh.ram_m, weigh.disk_m
    return {
        name: float(profile.ram_bytes / ram[m] if name == "parameters" else
                    profile.disk_bytes / disk[m])
        for m, name in enumerate(FORMATS)
    }  # fmt: skip

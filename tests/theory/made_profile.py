"""A machine whose every part but its arithmetic is as fast as can be."""

from __future__ import annotations

from strata.theory.machine import HardwareProfile


def profile(**changes: float) -> HardwareProfile:
    """A TFLOP a second; `changes` slow other parts down."""
    fields = dict(
        matmul_flops_per_s=1e12, memory_bytes_per_s=1e18, disk_read_latency_s=0.0,
        disk_read_bytes_per_s=1e18, disk_write_bytes_per_s=1e18, disk_bytes=1e12, ram_bytes=1e9,
    )  # fmt: skip
    return HardwareProfile(name="made up", **(fields | changes))

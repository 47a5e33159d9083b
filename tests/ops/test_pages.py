"""Huge pages: asked for where there are some, and nothing is changed by it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from strata.ops import pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _huge_kib() -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="no huge pages here"
)
@pytest.mark.parametrize("collapse", [False, True])
def test_large_tensor_is_held_in_huge_pages(collapse: bool) -> None:
    before = _huge_kib()
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    if collapse:
        tensor.fill_(7)
    assert pages.use_huge_pages(tensor, collapse=collapse)
    if not collapse:
        tensor.fill_(7)
    assert bool((tensor == 7).all())
    assert _huge_kib() - before >= 32 << 10


def test_small_tensors_and_other_devices_are_left_alone() -> None:
    assert not pages.use_huge_pages(torch.zeros(100))
    assert not pages.use_huge_pages(torch.empty(1 << 30, device="meta"))


def test_other_systems_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pages._libc.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    try:
        assert not pages.use_huge_pages(torch.zeros(64 << 20, dtype=torch.uint8))
    finally:
        pages._libc.cache_clear()


def test_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pages, "_SIZE_FILE", tmp_path / "none")
    pages._page_bytes.cache_clear()
    try:
        assert not pages.use_huge_pages(torch.zeros(64 << 20, dtype=torch.uint8))
    finally:
        pages._page_bytes.cache_clear()

"""The classes of knowledge, at their thresholds."""

from __future__ import annotations

import pytest

from strata.theory.knowledge import classify, lacks, supplied


@pytest.mark.parametrize(
    ("alone", "behind", "kind"),
    [
        ((0.51, 0.99), [(0.0, 0.0)], "known"),
        ((0.5, 0.99), [(0.9, 0.9)], "imitable"),
        ((0.99, 0.5), [(0.9, 0.95), (1.0, 0.9)], "imitable"),
        ((0.0, 0.0), [(0.9, 0.95), (1.0, 0.89)], "separable"),
        ((0.0, 0.0), [(0.89, 1.0), (1.0, 0.89)], "not"),
        ((0.2,), [(0.6,)], "not"),
    ],
)
def test_classes(alone: tuple[float, ...], behind: list[tuple[float, ...]], kind: str) -> None:
    assert classify(alone, behind) == kind


def test_every_output_token_counts() -> None:
    assert lacks((0.9, 0.5, 0.9)) and not lacks((0.9, 0.51))
    assert supplied((0.9, 1.0)) and not supplied((1.0, 0.8999))

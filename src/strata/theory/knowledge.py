"""Whether a model knows something, and whether text can stand in for knowing it.

A specific piece of knowledge relates an input to output tokens. A model lacks it if it gives some
output token a probability of 1/2 at most; a prefix supplies it if every output token then has at
least 0.9. Knowledge that a model lacks is separable if some prefix supplies it, and imitable if
any text that states it does. What is separable can live outside the parameters.

Measured with some wordings of a stating text, the classes are (the first that fits)

    known      the model lacks nothing
    imitable   every wording supplies it
    separable  some wording does, but not every one
    not        none does

so "imitable" is shown for the wordings tried, and "not" says only that none of them did.

Source: "Memory3" (arXiv 2407.01178), section 2, definitions of separable and imitable knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Kind = Literal["known", "imitable", "separable", "not"]
KINDS: tuple[Kind, ...] = ("known", "imitable", "separable", "not")

LACKED_AT_MOST = 0.5
SUPPLIED_AT_LEAST = 0.9


def lacks(probabilities: Sequence[float]) -> bool:
    """Whether a model lacks what these are the output tokens' probabilities of, at least one."""
    return min(probabilities) <= LACKED_AT_MOST


def supplied(probabilities: Sequence[float]) -> bool:
    """Whether a prefix gives what a model needs: every output token likely behind it."""
    return min(probabilities) >= SUPPLIED_AT_LEAST


def classify(alone: Sequence[float], behind: Sequence[Sequence[float]]) -> Kind:
    """The class of a piece of knowledge.

    Args:
        alone: probability of each output token with nothing in front of the input, 0 to 1.
        behind: the same behind each wording of a stating text, at least one.
    """
    if not lacks(alone):
        return "known"
    count = sum(supplied(probabilities) for probabilities in behind)
    if count == len(behind):
        return "imitable"
    return "separable" if count else "not"

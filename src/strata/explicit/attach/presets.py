"""How memories are read: where they stand, and how much they weigh."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from strata.explicit.attach.fetch import AttachError
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig, Positions


@dataclass(frozen=True)
class Preset:
    """One way to read memories.

    A query's attention over its memories (scores s_j, after scaling and any softcap) and over the
    rest (the marker and the context, scores c_i) is one softmax over

        s_j / temperature + (scale - 1) * logsumexp_j(s_j / temperature)   and   c_i,

    which is two attentions merged by their log-sum-exps, that of the memories times `scale`.
    With temperature 1 and scale 1 it is plain attention over all of them.

    Attributes:
        positions: "parallel": all memories of a piece share the interval of `reference_tokens`
            positions before the text; "sequential": one interval each, best hit first; None: as
            the settings that the memories were written with say.
        temperature: above 0; below 1 sharpens attention among the memories.
        scale: above 0; below 1 lessens what the memories weigh together where their log-sum-exp
            is positive.
        selector: the token selector that the memories should be written with.
        every_layer: whether they should be written for every layer (but sliding ones), not only
            for the first half.

    Raises:
        AttachError: a temperature or scale of 0 or less, or other positions.
    """

    positions: Positions | None = None
    temperature: float = 1.0
    scale: float = 1.0
    selector: str = "attention"
    every_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            if not getattr(self, name) > 0:
                raise AttachError(f"{name} must be above 0, given {getattr(self, name)}")
        if self.positions not in (None, "parallel", "sequential"):
            raise AttachError(f"positions are parallel or sequential, given {self.positions!r}")

    def config(self, model: PreTrainedModel) -> ExplicitMemoryConfig:
        """Settings to write a bank with, so that this preset can read it.

        Args:
            model: the decoder, for its layers.
        """
        layers: tuple[int, ...] | None = None
        if self.every_layer:
            host = Host(model)
            layers = tuple(n for n in range(host.num_layers) if not host.is_sliding(n))
        return ExplicitMemoryConfig.model_validate({"layers": layers, "selector": self.selector})


PAPER = Preset()
"""For decoders trained to read memories. Source: "Memory3" (arXiv 2407.01178), section 3."""

APE = Preset(temperature=0.9, scale=0.9, selector="all", every_layer=True)
"""For decoders that never saw a memory: all tokens, all layers, the marker as shared prefix.

Both numbers are a start, not a finding of ours: tune them for each decoder on questions whose
answers are known (temperature and scale from 0.1 to 1).

Source: "APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding"
(arXiv 2502.05431), section 4.
"""

"""What it takes to write a reference into a format once, and to read it each time it is used.

Three formats: "parameters" (the model is trained on the reference), "explicit" (its memory is
encoded beforehand and read with a chunk of generated tokens) and "text" (it stands in the prompt).
A reference that is used n times costs write + n * read, and belongs in the format that costs least.

Legend: m formats in the order of `FORMATS`, n references.

Source: "Memory3" (arXiv 2407.01178), the sum over knowledge that it minimises and its appendix on
estimating costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strata.errors import ConfigError
from strata.theory.setting import CostSetting

Format = Literal["parameters", "explicit", "text"]
FORMATS: tuple[Format, ...] = ("parameters", "explicit", "text")
Floats = NDArray[np.float64]

TERA = 1e12


@dataclass(frozen=True)
class Costs:
    """Cost of writing a reference once and of reading it once, in each format.

    Attributes:
        unit: of all numbers: "TFLOPs", "s", or a currency's name.
        write_m, read_m: fp64 of shape (3,), or (3, n) for n references, in the order of `FORMATS`.
    """

    unit: str
    write_m: Floats
    read_m: Floats

    def total(self, uses: ArrayLike) -> Floats:
        """Write and all reads.

        Args:
            uses: of one reference, any shape (u...); of n references, shape (n,).

        Returns:
            (3, u...) or (3, n).
        """
        uses = np.asarray(uses, np.float64)
        if self.write_m.ndim == 2:
            return self.write_m + uses * self.read_m
        shape = (len(FORMATS),) + (1,) * uses.ndim
        return self.write_m.reshape(shape) + uses * self.read_m.reshape(shape)

    def envelope(self) -> list[tuple[float, Format]]:
        """Which format is cheapest from which number of uses on; of one reference.

        Returns:
            (uses, format), ascending from 0 uses. Each total is a line in the number of uses, so
            each format is cheapest in at most one interval.
        """
        lines = [(float(w), float(r)) for w, r in zip(self.write_m, self.read_m, strict=True)]
        now = min(range(len(lines)), key=lambda m: lines[m])
        found: list[tuple[float, Format]] = [(0.0, FORMATS[now])]
        while True:
            write, read = lines[now]
            later = [((w - write) / (read - r), r, m) for m, (w, r) in enumerate(lines) if r < read]
            if not later:
                return found
            at, _, now = min(later)
            found.append((at, FORMATS[now]))

    @property
    def crossovers(self) -> tuple[float, float]:
        """Uses from which text is no longer cheapest, and from which parameters are.

        Explicit memory is cheapest between the two. They are equal where it never is; 0 or infinity
        where there is no such number.
        """
        steps = self.envelope()
        low = next((at for at, name in steps if name != "text"), math.inf)
        high = next((at for at, name in steps if name == "parameters"), math.inf)
        return low, high

    def cheapest(self, uses: float) -> Format:
        """The format that costs least for so many uses; at a tie the one that reads for less.

        Raises:
            ConfigError: fewer than 0 uses.
        """
        if not uses >= 0:
            raise ConfigError(f"{uses} uses: give 0 or more")
        return [name for at, name in self.envelope() if at <= uses][-1]

    def to_json(self) -> dict[str, Any]:
        """`{write: {...}, read: {...}, crossovers: [low, high]}`; infinity is null."""
        return {
            "write": dict(zip(FORMATS, self.write_m.tolist(), strict=True)),
            "read": dict(zip(FORMATS, self.read_m.tolist(), strict=True)),
            "crossovers": [at if math.isfinite(at) else None for at in self.crossovers],
        }


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of each step, a multiply-add as two; each a number or (n,).

    Attributes:
        train: parameters are trained on the reference: forward, and backward at twice that.
        encode: its explicit memory is written.
        read_explicit: a chunk of tokens attends to its memory.
        prefill: it is read as part of a prompt.
        read_text: a chunk of tokens attends to it in the prompt.
    """

    train: Floats
    encode: Floats
    read_explicit: Floats
    prefill: Floats
    read_text: Floats


def operations(setting: CostSetting, reference_tokens: ArrayLike | None = None) -> Operations:
    """Count the operations of all steps.

    Matrix products and attention are counted; norms, activations and embeddings are not. Where the
    paper has d for the width of attention, this has H d_h, which is d in its model; with memory in
    some KV heads only, their share of the query heads selects and reads; `depth` layers are passed
    to encode, which is L_mem where the first layers have memory.

    Args:
        setting: decoder and memory.
        reference_tokens: (n,) lengths of references; None for the setting's.

    Source: "Memory3" (arXiv 2407.01178), appendix on estimating costs.
    """
    shape, memory = setting.shape, setting.memory
    length = np.asarray(
        memory.reference_tokens if reference_tokens is None else reference_tokens, np.float64
    )
    wide = shape.attention_width
    # Multiply-adds of a token: queries and outputs, keys and values; then the MLP.
    attention = 2 * shape.width * wide + 2 * shape.width * shape.head_dim * shape.num_kv_heads
    mlp = shape.mlp_matrices * shape.width * shape.mlp_width
    causal = 2 * length**2 / 2 * wide  # scores and sums, half of them masked
    layers, depth, chunk = shape.num_layers, setting.depth, memory.chunk_tokens
    share = setting.memory_heads / (setting.memory_layers * shape.num_kv_heads)
    picking = setting.memory_layers * share * wide
    kept = np.minimum(memory.tokens, length)
    train = layers * (
        length * (attention + mlp) + 2 * length * memory.train_tokens / 2 * wide
    ) + length * (shape.vocab_size * shape.width)
    encode = (
        depth * (length * attention + causal) + (depth - 1) * length * mlp + picking * length**2
    )
    prefill = layers * (length * attention + causal) + (layers - 1) * length * mlp
    return Operations(
        train=6 * train,
        encode=2 * encode,
        read_explicit=2 * picking * 2 * chunk * kept,
        prefill=2 * prefill,
        read_text=2 * layers * 2 * length * chunk * wide,
    )


def flops(setting: CostSetting, reference_tokens: ArrayLike | None = None) -> Costs:
    """The paper's cost of a reference in each format, in TFLOPs.

    Reading parameters is free and so is writing text; storage, embedding, search and I/O are left
    out (see `strata.theory.machine`).

    Args:
        setting: decoder and memory.
        reference_tokens: (n,) lengths of references; None for one of the setting's length.
    """
    done = operations(setting, reference_tokens)
    nothing = np.zeros_like(done.train)
    return Costs(
        "TFLOPs",
        np.stack([done.train, done.encode, nothing]) / TERA,
        np.stack([nothing, done.read_explicit, done.prefill + done.read_text]) / TERA,
    )

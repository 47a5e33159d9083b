"""What is raced: a decoder's size, and the lengths of what it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig


@dataclass(frozen=True)
class MemorySize:
    """A decoder with random weights, and what it reads and writes.

    Attributes:
        width, num_layers, num_heads, num_kv_heads, mlp_width: of the decoder, a Llama.
        references: in the bank.
        reference_tokens, prompt_tokens, new_tokens: lengths.
        top_k: references for a prompt, or for each of its pieces.
        chunk_tokens: of a piece.
        batches: prompts answered at once.
        codec: of explicit_vq.
    """

    width: int = 768
    num_layers: int = 10
    num_heads: int = 12
    num_kv_heads: int = 4
    mlp_width: int = 2048
    references: int = 200
    reference_tokens: int = 128
    prompt_tokens: int = 128
    new_tokens: int = 128
    top_k: int = 5
    chunk_tokens: int = 64
    batches: tuple[int, ...] = (1, 8)
    codec: str = "faiss"

    def config(self, name: str, host: Host) -> ExplicitMemoryConfig:
        """How the bank of a format is written."""
        if name == "dense":
            return ExplicitMemoryConfig(
                layers=tuple(n for n in range(host.num_layers) if not host.is_sliding(n)),
                selector="all",
                reference_tokens=self.reference_tokens,
            )
        return ExplicitMemoryConfig(
            codec=self.codec if name == "explicit_vq" else "bf16",
            reference_tokens=self.reference_tokens,
        )


SIZES = {
    "small": MemorySize(
        width=64, num_layers=4, num_heads=4, num_kv_heads=2, mlp_width=128, references=24,
        reference_tokens=32, prompt_tokens=32, new_tokens=20, chunk_tokens=16, batches=(1, 2),
        codec="int4",
    ),
    "full": MemorySize(),
}  # fmt: skip

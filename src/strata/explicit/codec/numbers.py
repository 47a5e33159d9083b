"""Codecs that need no training: the numbers themselves, or small integers.

Shapes: q vectors, d head width, b bytes of a vector's code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strata.errors import BankError
from strata.explicit.codec.base import Codec
from strata.explicit.memories import MemoryShape
from strata.ops.codec import decode_int4, decode_int8

PLAIN = ("fp32", "bf16", "int8", "int4")


class Floats(Codec):
    """The numbers themselves."""

    def __init__(self, name: str, shape: MemoryShape) -> None:
        super().__init__(name, shape)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        self.vector_bytes = shape.head_dim * self._dtype.itemsize

    def _encode_vectors(self, vectors_qd: Tensor, kind: str) -> Tensor:
        return vectors_qd.to(self._dtype).contiguous().view(torch.uint8)

    def _decode_vectors(self, codes_qb: Tensor, kind: str) -> Tensor:
        return codes_qb.view(self._dtype).to(torch.float32, copy=True)


class Integers(Codec):
    """int8 or int4, symmetric: the largest entry of a vector gets the largest code.

    The scale is an fp16 and the codes are rounded against it as stored, so its own rounding costs
    nothing but range. Vectors whose entries are all below about 4e-6 (int8) lose precision, for
    their scale is a subnormal; those above 65504 * 127 (int4: * 7) are refused.
    """

    def __init__(self, name: str, shape: MemoryShape) -> None:
        super().__init__(name, shape)
        self._largest = {"int8": 127, "int4": 7}[name]
        self.vector_bytes = 2 + (shape.head_dim if name == "int8" else (shape.head_dim + 1) // 2)

    def _encode_vectors(self, vectors_qd: Tensor, kind: str) -> Tensor:
        scales_q = (vectors_qd.abs().amax(1) / self._largest).to(torch.float16)
        if not scales_q.isfinite().all():
            peak = float(vectors_qd.abs().max())
            raise BankError(f"{kind} as large as {peak:.3g} do not fit {self.name}: use bf16")
        stored_q = scales_q.float()
        inverse_q = torch.where(stored_q > 0, 1 / stored_q, 0.0)
        scaled_qd = (vectors_qd * inverse_q[:, None]).round_()
        entries_qd = scaled_qd.clamp_(-self._largest, self._largest).to(torch.int8)
        if self.name == "int4":
            if entries_qd.shape[1] % 2:
                entries_qd = torch.nn.functional.pad(entries_qd, (0, 1))
            nibbles = entries_qd.view(torch.uint8) & 15
            packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        else:
            packed = entries_qd.view(torch.uint8)
        return torch.cat((scales_q[:, None].contiguous().view(torch.uint8), packed), dim=1)

    def _decode_vectors(self, codes_qb: Tensor, kind: str) -> Tensor:
        decode = decode_int8 if self.name == "int8" else decode_int4
        return decode(codes_qb, self.shape.head_dim)

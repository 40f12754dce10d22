"""Element formats of matrix operands, as float64.

A format of less than 8 bits fills its container from the low end: in shared memory 16 elements take
the first 8 (4-bit) or 12 (6-bit) of 16 bytes.
"""

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """A number format of `bits` bits; `exponent` bits with `bias`, or an integer if 0."""

    name: str
    bits: int
    exponent: int = 0
    bias: int = 0
    signed: bool = True

    @property
    def container(self) -> int:
        """Bytes that an element takes in an operand."""
        return max(1, self.bits // 8)

    @property
    def per_unit(self) -> int:
        """Elements in 16 bytes."""
        return 16 // self.container

    @property
    def smallest(self) -> int:
        """The exponent of denormals."""
        return 1 - self.bias

    @functools.cached_property
    def table(self) -> np.ndarray:
        """The value of each code of a format of at most 8 bits."""
        codes = np.arange(1 << self.bits)
        if not self.exponent:
            kind = np.int8 if self.signed else np.uint8
            return codes.astype(np.uint8).view(kind).astype(np.float64)
        mantissa = self.bits - 1 - self.exponent
        power = (codes >> mantissa) & ((1 << self.exponent) - 1)
        fraction = (codes & ((1 << mantissa) - 1)) / (1 << mantissa)
        size = np.where(power == 0, fraction, 1 + fraction)
        value = size * 2.0 ** (np.maximum(power, 1) - self.bias)
        if self.name == "e4m3":
            value[(codes & 0x7F) == 0x7F] = np.nan
        if self.name == "e5m2":
            value[(codes & 0x7C) == 0x7C] = np.nan
            value[(codes & 0x7F) == 0x7C] = np.inf
        return np.where(codes >> (self.bits - 1), -value, value)

    def widen(self, raw: np.ndarray) -> np.ndarray:
        """Unsigned integers, contiguous along the last axis, as float64 elements along it."""
        if self.name == "f16":
            return raw.view(np.float16).astype(np.float64)
        if self.name == "bf16":
            high = raw.view(np.uint16).astype(np.uint32) << np.uint32(16)
            return high.view(np.float32).astype(np.float64)
        if self.name == "tf32":
            return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
        codes = raw.view(np.uint8)
        if self.bits < 8:
            groups = codes.reshape(*codes.shape[:-1], -1, 16)[..., : 2 * self.bits]
            bits = np.unpackbits(groups, axis=-1, bitorder="little")
            fields = bits.reshape(*bits.shape[:-1], 16, self.bits)
            weights = (1 << np.arange(self.bits)).astype(np.uint8)
            codes = (fields * weights).sum(axis=-1, dtype=np.uint8)
            codes = codes.reshape(*codes.shape[:-2], -1)
        return self.table[codes]


FORMATS = {
    format.name: format
    for format in (
        Format("f16", 16, 5, 15),
        Format("bf16", 16, 8, 127),
        Format("tf32", 32, 8, 127),
        Format("e4m3", 8, 4, 7),
        Format("e5m2", 8, 5, 15),
        Format("e3m2", 6, 3, 3),
        Format("e2m3", 6, 2, 1),
        Format("e2m1", 4, 2, 1),
        Format("s8", 8),
        Format("u8", 8, signed=False),
    )
}

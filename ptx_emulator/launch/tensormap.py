"""Decodes a TMA descriptor (CUtensorMap): 128 bytes, of which the first 64 mean something.

The layout was found by comparing descriptors that host code builds, and reading the code itself.
"""

import functools
import struct
from dataclasses import dataclass

from ..words import words

ELEMENT_BITS = (8, 16, 32, 32, 64, 64, 16, 32, 32, 64, 16, 4, 4, 6)
ELEMENT_NAMES = words("u8 u16 u32 s32 u64 s64 f16 f32 f32ftz f64 bf16 b4x16 b4x16_p64 b6x16_p32")
SWIZZLE_MASK = (0, 1, 3, 7)  # none, 32, 64, 128 bytes: which of address bits 7-9 take part
TILED = (0, 2)  # the driver's encoding, and the one that CuTe DSL's host code writes


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map; dimension 0 is the contiguous one. Strides are in bytes."""

    address: int
    kind: int
    element: str
    bits: int
    interleave: int
    swizzle: int
    swizzle_atom: int
    nan_fill: bool
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return self.bits // 8

    @property
    def box_bytes(self) -> int:
        size = self.item
        for extent in self.box:
            size *= extent
        return size

    @property
    def row_pitch(self) -> int:
        """Bytes from a box row to the next in shared memory: at least the swizzle's span."""
        inner = self.box[0] * self.item
        return max(inner, 16 << self.swizzle) if self.swizzle else inner

    @property
    def footprint(self) -> int:
        """Bytes of shared memory that a box spans."""
        return self.box_bytes // (self.box[0] * self.item) * self.row_pitch


@functools.lru_cache(maxsize=1024)
def decode(raw: bytes) -> TensorMap:
    """The tensor map in 64 bytes or more."""
    address, word = struct.unpack_from("<QI", raw, 0)
    low = struct.unpack_from("<4I", raw, 12)
    (high,) = struct.unpack_from("<I", raw, 28)
    extents = struct.unpack_from("<5I", raw, 32)
    steps, boxes = struct.unpack_from("<2I", raw, 52)
    rank = (word >> 4 & 7) + 1
    element = word >> 7 & 15
    strides = tuple((low[i] | (high >> 4 * i & 15) << 32) << 4 for i in range(rank - 1))
    bits = ELEMENT_BITS[element] if element < len(ELEMENT_BITS) else 0
    box = (steps >> 24, *(boxes >> 8 * i & 255 for i in range(4)))
    return TensorMap(
        address=address,
        kind=word & 15,
        element=ELEMENT_NAMES[element] if element < len(ELEMENT_NAMES) else f"code {element}",
        bits=bits,
        interleave=word >> 11 & 3,
        swizzle=word >> 13 & 3,
        swizzle_atom=word >> 19 & 3,
        nan_fill=bool(word >> 15 & 1),
        dims=tuple(extent + 1 for extent in extents[:rank]),
        strides=(bits // 8, *strides),
        box=tuple(extent + 1 for extent in box[:rank]),
        element_strides=tuple((steps >> 3 * i & 7) + 1 for i in range(rank)),
    )

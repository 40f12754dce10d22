"""Tensor maps as bytes: what host code computes inline, for machines without a driver."""

import struct

from .programs import Map

TILED, BF16 = 0, 10  # as the driver encodes them


def encode(map_: Map, address: int) -> bytes:
    """The 128 bytes of a tensor map over bf16 at `address`; the first 64 have a meaning."""
    word = TILED | len(map_.dims) - 1 << 4 | BF16 << 7
    word |= map_.swizzle << 13 | int(map_.nan_fill) << 15
    strides = [stride >> 4 for stride in map_.strides] + [0] * (4 - len(map_.strides))
    high = sum((stride >> 32) << 4 * i for i, stride in enumerate(strides))
    missing = 5 - len(map_.dims)
    dims = [size - 1 for size in map_.dims] + [0] * missing
    box = [size - 1 for size in map_.box] + [0] * missing
    low = [stride & 0xFFFFFFFF for stride in strides]
    head = struct.pack("<QI4II5I", address, word, *low, high, *dims)
    return (head + struct.pack("<3xB4B", *box) + bytes(4)).ljust(128, b"\0")

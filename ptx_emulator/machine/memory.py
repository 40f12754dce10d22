"""Shared and global memory as NumPy arrays that 32-lane registers index.

A load takes one address a lane (or one NumPy scalar for all lanes) and returns one value a lane (or
a scalar). `mask` is None when all lanes take part.
"""

import ctypes
from typing import Any

import numpy as np

from ..findings import Misaligned, OutOfBounds, Race, UndefinedRead
from ..launch.tensors import Allocations

SHARED_BASE = 1 << 56  # generic addresses of shared memory, then of parameters and local memory
PARAM_BASE = 2 << 56
LOCAL_BASE = 3 << 56
RESERVED_SMEM = 1024  # the first bytes of a CTA's shared memory belong to the system
RANK_SHIFT = 24  # a shared address holds the CTA's rank in its cluster from this bit on

# Shadow of each shared byte. Bytes that nothing wrote read as 0xFF, which is NaN in every float
# type, so that they cannot pass unnoticed into a result.
DEFINED, IN_FLIGHT, UNWRITTEN = 255, 127, 0


def active(mask: Any, lanes: int) -> Any:
    """Indices of active lanes, or None if all are."""
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray):
        return None if mask else np.zeros(0, np.int64)
    return np.flatnonzero(mask) if not mask.all() else None


class SharedMemory:
    """One CTA's shared memory, with a shadow that knows which bytes were ever written."""

    def __init__(self, size: int, strict: bool = False) -> None:
        self.size = (size + 127) // 128 * 128
        self.strict = strict
        self.bytes = np.full(self.size, 255, np.uint8)
        self.shadow = np.full(self.size, UNWRITTEN, np.uint8)
        self.stores = 0

    def check(self, offsets: np.ndarray, nbytes: int, align: int, what: str) -> None:
        """Raise unless each access of `nbytes` at `offsets` is aligned and inside."""
        if offsets.size == 0:
            return
        high, low = int(offsets.max()), int(offsets.min())
        if high + nbytes > self.size or low < RESERVED_SMEM:
            at = high if high + nbytes > self.size else low
            raise OutOfBounds(
                f"{what} of {nbytes} bytes at shared offset {at:#x}; the CTA has "
                f"{RESERVED_SMEM:#x} .. {self.size:#x}"
            )
        if align > 1 and (offsets & (align - 1)).any():
            bad = int(offsets[(offsets & (align - 1)) != 0][0])
            raise Misaligned(f"{what} of {align} bytes at shared offset {bad:#x}")

    def gather(self, offsets: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """(lanes, count) values; checked for bounds, alignment and definedness."""
        nbytes = dtype.itemsize * count
        self.check(offsets, nbytes, nbytes, "a load")
        rows = offsets // nbytes
        shadow = self.shadow.reshape(-1, nbytes)[rows]
        if shadow.min() != DEFINED:
            self._undefined(offsets, shadow)
        return self.bytes.view(dtype).reshape(-1, count)[rows]

    def _undefined(self, offsets: np.ndarray, shadow: np.ndarray) -> None:
        """Bytes were read that no one wrote (a fault if strict), or that are being written."""
        flying = (shadow == IN_FLIGHT).any(axis=1)
        if flying.any():
            at = int(offsets[flying][0])
            raise Race(f"a load at shared offset {at:#x} does not wait for the copy that writes it")
        if self.strict:
            at = int(offsets[(shadow == UNWRITTEN).any(axis=1)][0])
            raise UndefinedRead(f"a load at shared offset {at:#x} reads bytes that nothing wrote")

    def scatter(self, offsets: np.ndarray, values: np.ndarray) -> None:
        """Write (lanes, count) values."""
        nbytes = values.dtype.itemsize * values.shape[1]
        self.check(offsets, nbytes, nbytes, "a store")
        self.stores += 1
        rows = offsets // nbytes
        self.bytes.view(values.dtype).reshape(-1, values.shape[1])[rows] = values
        self.shadow.reshape(-1, nbytes)[rows] = DEFINED


class _WholeMemory:
    """The process's address space from `BASE` on, as one array."""

    BASE = 4096
    __array_interface__ = {
        "data": (BASE, False),
        "shape": ((1 << 47) - BASE,),
        "typestr": "|u1",
        "version": 3,
    }


class GlobalMemory:
    """PyTorch's memory in place; only bytes of registered allocations may be touched."""

    def __init__(self, allocations: Allocations) -> None:
        self.allocations = allocations
        self.bytes = np.asarray(_WholeMemory())
        self.stores = 0

    def check(self, addresses: np.ndarray, nbytes: int, align: int, what: str) -> None:
        if addresses.size == 0:
            return
        known = self.allocations
        if align > 1 and (addresses & np.uint64(align - 1)).any():
            bad = int(addresses[(addresses & np.uint64(align - 1)) != 0][0])
            raise Misaligned(f"{what} of {align} bytes at global address {bad:#x}")
        index = np.searchsorted(known.starts, addresses, "right") - 1
        inside = index >= 0
        if len(known.ends):
            inside &= addresses + np.uint64(nbytes) <= known.ends[index]
        if not inside.all():
            bad = int(addresses[~inside][0])
            raise OutOfBounds(
                f"{what} of {nbytes} bytes at global address {bad:#x}, {self.nearest(bad)}"
            )

    def nearest(self, address: int) -> str:
        """Where an address lies relative to the allocation that begins below it."""
        below = [low for low in self.allocations.starts if low <= address]
        if not below:
            return "below every tensor of the launch"
        start = int(below[-1])
        end = int(self.allocations.ends[len(below) - 1])
        return f"{address - start:#x} bytes into a tensor of {end - start:#x} bytes"

    def gather(self, addresses: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        nbytes = dtype.itemsize * count
        self.check(addresses, nbytes, nbytes, "a load")
        rows = (addresses - np.uint64(_WholeMemory.BASE)) // np.uint64(nbytes)
        cut = len(self.bytes) // nbytes * nbytes
        return self.bytes[:cut].view(dtype).reshape(-1, count)[rows.astype(np.int64)]

    def scatter(self, addresses: np.ndarray, values: np.ndarray) -> None:
        nbytes = values.dtype.itemsize * values.shape[1]
        self.check(addresses, nbytes, nbytes, "a store")
        self.stores += 1
        rows = (addresses - np.uint64(_WholeMemory.BASE)) // np.uint64(nbytes)
        cut = len(self.bytes) // nbytes * nbytes
        table = self.bytes[:cut].view(values.dtype).reshape(-1, values.shape[1])
        table[rows.astype(np.int64)] = values

    def read(self, address: int, nbytes: int) -> bytes:
        self.check(np.array([address], np.uint64), nbytes, 1, "a read")
        return ctypes.string_at(address, nbytes)

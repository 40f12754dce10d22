"""Tensor memory of one CTA: 512 columns of 128 lanes, its allocations, and what is in flight there.

Kept column by column, so `data[column, lane]` is a 32-bit cell. Cells that nothing wrote since
their allocation hold NaN. `flights` are accesses by operations that have not run: who touches their
cells meanwhile did not wait.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..findings import Race, TmemFault
from .async_ops import AsyncOp

COLUMNS, LANES = 512, 128


@dataclass(frozen=True)
class Region:
    """Columns [first, last) of lanes [low, high)."""

    first: int
    last: int
    low: int = 0
    high: int = LANES

    def meets(self, other: "Region") -> bool:
        columns = self.first < other.last and other.first < self.last
        return columns and self.low < other.high and other.low < self.high


@dataclass
class TensorMemory:
    """The tensor memory that a CTA has for itself."""

    name: str
    data: np.ndarray = field(
        default_factory=lambda: np.full((COLUMNS, LANES), 0xFFFFFFFF, np.uint32)
    )
    allocated: dict[int, tuple[int, int]] = field(default_factory=dict)  # first: (columns, group)
    relinquished: bool = False
    promised: list[int] = field(default_factory=list)  # the peer of a pair has allocated them
    flights: list[tuple[AsyncOp, Region, bool]] = field(default_factory=list)  # True: it writes
    stores: dict[int, list[AsyncOp]] = field(default_factory=dict)  # of each warp, not waited for
    pipes: dict[int, AsyncOp] = field(default_factory=dict)  # newest operation of each warp
    reading: dict[int, list[Any]] = field(default_factory=dict)  # of shared memory, by products
    waiting: list[Any] = field(default_factory=list)  # gangs that wait for columns
    races: Any = None  # check/tmem_races.py, unless races are not looked for

    # ---- allocation ----
    def allocate(self, columns: int, group: int) -> int | None:
        """First column of a new allocation; None if there is no room now."""
        if columns not in (32, 64, 128, 256, 512):
            raise TmemFault(f"tcgen05.alloc of {columns} columns: 32, 64, 128, 256 or 512 exist")
        if self.relinquished:
            raise TmemFault("tcgen05.alloc after relinquish_alloc_permit")
        if any(held != group for _, held in self.allocated.values()):
            raise TmemFault("tcgen05.alloc with another cta_group than before")
        for first in range(0, COLUMNS, columns):
            if all(first + columns <= a or a + n <= first for a, (n, _) in self.allocated.items()):
                self.allocated[first] = (columns, group)
                self.data[first : first + columns] = 0xFFFFFFFF
                if self.races is not None:
                    self.races.forget(Region(first, first + columns))
                return first
        return None

    def release(self, address: int, columns: int, group: int, warp: int) -> None:
        if self.allocated.get(address) != (columns, group):
            raise TmemFault(
                f"tcgen05.dealloc of {columns} columns at {address:#x} (cta_group::{group}); "
                f"allocated are {self.allocated}"
            )
        region = Region(address, address + columns)
        self.check(region, True, "tcgen05.dealloc")
        if self.races is not None:
            self.races.check_dealloc(warp, region)
        del self.allocated[address]
        waiting, self.waiting = self.waiting, []
        for gang in waiting:
            gang.wake()

    def at_exit(self) -> None:
        if self.allocated:
            raise TmemFault(f"{self.name} ends with tensor memory allocated: {self.allocated}")

    # ---- accesses ----
    def check(self, region: Region, writes: bool, what: str) -> None:
        """Raise unless a region is allocated and no operation in flight conflicts with it."""
        if region.low < 0 or region.high > LANES:
            raise TmemFault(f"{what} of lanes {region.low} .. {region.high}")
        if not any(
            first <= region.first and region.last <= first + n
            for first, (n, _) in self.allocated.items()
        ):
            raise TmemFault(
                f"{what} of columns {region.first} .. {region.last} of {self.name}; allocated are "
                f"{self.allocated}"
            )
        self.flights = [flight for flight in self.flights if not flight[0].done]
        for op, other, writing in self.flights:
            if (writes or writing) and region.meets(other):
                raise Race(
                    f"{what} of columns {region.first} .. {region.last} of {self.name} does not "
                    f"wait for the {op.name} of columns {other.first} .. {other.last}"
                )

    def in_pipe(self, region: Region, writes: bool, what: str) -> None:
        """As `check`, for an operation of the pipe: products in flight are before it."""
        kept = self.flights
        self.flights = [flight for flight in kept if flight[0].name == "tcgen05.st"]
        try:
            self.check(region, writes, what)
        finally:
            self.flights = [flight for flight in kept if not flight[0].done]

    def fly(self, op: AsyncOp, region: Region, writes: bool) -> None:
        self.flights.append((op, region, writes))

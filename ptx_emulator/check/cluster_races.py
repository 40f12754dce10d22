"""The race checker of a pair of CTAs, as each of them sees it: own warps and words count from 0.

What `ld` and `st` do in the shared memory of the other CTA is not recorded; copies, products and
arrivals there are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..findings import Findings
from .races import WORD, Copy, RaceChecker

MAX_CTAS = 2  # clocks and records grow with the square of a cluster's size


@dataclass(frozen=True)
class _Waiting:
    """Warps at a named barrier."""

    warps: np.ndarray


class RaceView:
    """One CTA's share of a cluster's checker; its interface is that of RaceChecker."""

    def __init__(self, whole: RaceChecker, rank: int) -> None:
        self.whole = whole
        self.first_warp = rank * whole.per_rank
        self.first_byte = rank * whole.size
        self.first_word = self.first_byte // WORD

    # ---- barriers ----
    def initialised(self, barrier: Any, warp: int) -> None:
        self.whole.initialised(barrier, warp + self.first_warp)

    def release(self, barrier: Any, warps: np.ndarray, arrivals: int = 0) -> None:
        self.whole.release(barrier, warps + self.first_warp, arrivals)

    def arrived(self, barrier: Any, number: int) -> None:
        self.whole.arrived(barrier, number)

    def phase_over(self, barrier: Any) -> None:
        self.whole.phase_over(barrier)

    def acquire(self, barrier: Any, warps: np.ndarray) -> None:
        self.whole.acquire(barrier, warps + self.first_warp)

    def named_over(self, barrier: Any, gangs: Iterable[Any]) -> None:
        self.whole.named_over(barrier, [_Waiting(gang.warps + self.first_warp) for gang in gangs])

    def fence_proxy(self, warps: np.ndarray) -> None:
        self.whole.fence_proxy(warps + self.first_warp)

    # ---- shared memory ----
    def read(self, warps: np.ndarray, offsets: np.ndarray, nbytes: int) -> None:
        offsets = offsets.astype(np.int64) + self.first_byte
        self.whole.read(warps + self.first_warp, offsets, nbytes)

    def write(self, warp: int, offsets: np.ndarray, nbytes: int, unchanged: np.ndarray) -> None:
        offsets = offsets.astype(np.int64) + self.first_byte
        self.whole.write(warp + self.first_warp, offsets, nbytes, unchanged)

    def issue_write(self, warps: Any, words: np.ndarray, name: str, proxy: bool) -> Copy:
        words = words + self.first_word
        return self.whole.issue_write(warps + self.first_warp, words, name, proxy)

    def written_for(self, copy: Copy, barrier: Any) -> None:
        self.whole.written_for(copy, barrier)

    def waited(self, copy: Copy, warps: np.ndarray) -> None:
        self.whole.waited(copy, warps + self.first_warp)

    def issue_read(self, warp: int, words: np.ndarray, name: str) -> Copy:
        return self.whole.issue_read(warp + self.first_warp, words + self.first_word, name)

    def was_read(self, copy: Copy | None, warps: np.ndarray | None = None) -> None:
        self.whole.was_read(copy, None if warps is None else warps + self.first_warp)

    def ended(self, warps: np.ndarray, copies: Iterable[Copy | None]) -> None:
        self.whole.ended(warps + self.first_warp, copies)

    # ---- matrix products ----
    def issue_product(self, warp: int, words: np.ndarray, name: str) -> Copy:
        return self.whole.issue_product(warp + self.first_warp, words + self.first_word, name)

    def depart(self, warp: int) -> np.ndarray:
        return self.whole.depart(warp + self.first_warp)

    def products_arrive(self, barrier: Any, known: np.ndarray, copies: list[Copy]) -> None:
        self.whole.products_arrive(barrier, known, copies)


Races = RaceChecker | RaceView


def races_of(
    num_warps: int, size: int, findings: Findings, rank: int, first: Races | None, ranks: int
) -> Races | None:
    """The checker of a CTA of `ranks`, `first` being that of rank 0; None if there is none."""
    if ranks > MAX_CTAS:
        return None
    if ranks == 1:
        return RaceChecker(num_warps, size, findings)
    known = first.whole if isinstance(first, RaceView) else None
    whole = RaceChecker(num_warps, size, findings, ranks) if known is None else known
    return RaceView(whole, rank)

"""Happens-before races in a CTA's shared memory, between warps and asynchronous copies.

Each warp has a vector clock. A release (an arrival at an mbarrier or a named barrier) adds the
warp's clock to the barrier; whoever sees the phase end takes it over. A word of shared memory
remembers who wrote it last and when each warp last read it. An access is a race if what it
conflicts with is not in the clock of the accessing warp, whether or not this run's order hid it.

Columns of a clock, with W warps:

    0 .. W-1         how far each warp is known to have come
    W .. 2W-1        the same, as far as fence.proxy.async has made its writes visible to TMA
    2W               never reached: the time of a copy that nobody has waited for
    2W+1 ..          phases of each mbarrier that are known to be over
    behind those     accesses to tensor memory that are known to be over (tmem_races.py)

What a TMA load wrote is known to those who know that phase of its mbarrier. A TMA store reads until
`wait_group.read`. Stores that change nothing are not races: warps may write the same value.
A tcgen05.commit or a cp.async's arrival brings what its warp knew when it was issued. Arrivals of
unknown origin would count as if every warp had made them, so that they hide races and invent
none. The CTAs of a pair share one checker (cluster_races.py); larger clusters are not checked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..findings import Findings, Race, Unmodelled

WORD = 4  # bytes that share a record
MAX_BARRIERS = 256
TMEM_KINDS = 3  # of accesses to tensor memory
PENDING = np.int32(2**31 - 1)


@dataclass
class Copy:
    """An asynchronous copy's words: [low, high) of one warp, or `words` of `warps`."""

    warps: Any
    words: Any
    told: bool = False  # a wait or an arrival has told of its end


@dataclass
class Sync:
    """The clocks that a barrier has collected, in this phase and over all that are over."""

    column: int
    arriving: np.ndarray
    over: np.ndarray
    announced: int = 0  # arrivals whose clocks are known, not counted by the barrier yet
    maker: tuple[int, int] | None = None  # the warp that initialised it, and when


class RaceChecker:
    """The clocks of one CTA and the records of its shared memory.

    With `ranks`, of a cluster: the warps and the memory of its CTAs follow each other.
    """

    first_warp = first_word = 0  # of the CTA that asks

    def __init__(self, num_warps: int, size: int, findings: Findings, ranks: int = 1) -> None:
        self.findings = findings
        self.whole = self
        self.per_rank = num_warps if ranks > 1 else 0
        self.size = size
        num_warps, size = num_warps * ranks, size * ranks
        self.W = num_warps
        self.tmem = 2 * num_warps + 1 + MAX_BARRIERS  # first of the columns of tensor memory
        self.columns = self.tmem + TMEM_KINDS * num_warps
        self.clock = np.zeros((num_warps, self.columns), np.int32)
        self.own = np.arange(num_warps)
        self.clock[self.own, self.own] = 1
        words = size // WORD
        self.writer = np.zeros(words, np.int32)  # column; at time 0 everyone knows of it
        self.written = np.zeros(words, np.int32)
        self.reads = np.zeros((num_warps, words), np.int32)
        self.same = np.zeros((num_warps, words), np.bool_)  # stored the present value itself
        self.syncs: dict[int, tuple[Any, Sync]] = {}

    # ---- barriers ----
    def sync_of(self, barrier: Any) -> Sync:
        found = self.syncs.get(id(barrier))
        if found is None:
            if len(self.syncs) == MAX_BARRIERS:
                raise Unmodelled(f"a CTA with more than {MAX_BARRIERS} barriers")
            column = 2 * self.W + 1 + len(self.syncs)
            nothing = np.zeros(self.columns, np.int32)
            found = barrier, Sync(column, nothing, nothing.copy())
            self.syncs[id(barrier)] = found
        return found[1]

    def initialised(self, barrier: Any, warp: int) -> None:
        self.sync_of(barrier).maker = warp, int(self.clock[warp, warp])

    def _check_made(self, barrier: Any, sync: Sync, warps: np.ndarray) -> None:
        if sync.maker is None:
            return
        maker, time = sync.maker
        early = warps[self.clock[warps, maker] < time]
        if len(early):
            self._report(
                f"{self.name(early[0])} uses the {barrier.name}, not ordered after "
                f"{self.name(maker)}'s mbarrier.init"
            )

    def release(self, barrier: Any, warps: np.ndarray, arrivals: int = 0) -> None:
        """`warps` are about to arrive."""
        sync = self.sync_of(barrier)
        self._check_made(barrier, sync, warps)
        np.maximum(sync.arriving, self.clock[warps].max(axis=0), out=sync.arriving)
        sync.announced += arrivals
        self.clock[warps, warps] += 1

    def arrived(self, barrier: Any, number: int) -> None:
        """The mbarrier counts arrivals; those that nobody announced may come from any warp."""
        sync = self.sync_of(barrier)
        if sync.announced >= number:
            sync.announced -= number
            return
        np.maximum(sync.arriving, self.clock.max(axis=0), out=sync.arriving)
        self.clock[self.own, self.own] += 1

    def phase_over(self, barrier: Any) -> None:
        sync = self.sync_of(barrier)
        np.maximum(sync.over, sync.arriving, out=sync.over)
        sync.over[sync.column] = barrier.phase
        sync.arriving[:] = 0

    def acquire(self, barrier: Any, warps: np.ndarray) -> None:
        """`warps` have seen that a phase is over."""
        sync = self.sync_of(barrier)
        self._check_made(barrier, sync, warps)
        self.clock[warps] = np.maximum(self.clock[warps], sync.over)

    def named_over(self, barrier: Any, gangs: Iterable[Any]) -> None:
        """A named barrier is complete: all who wait know all who arrived."""
        sync = self.sync_of(barrier)
        for gang in gangs:
            self.clock[gang.warps] = np.maximum(self.clock[gang.warps], sync.arriving)
        sync.arriving[:] = 0

    def fence_proxy(self, warps: np.ndarray) -> None:
        """fence.proxy.async: what a warp knows of becomes visible to the async proxy."""
        W = self.W
        part = self.clock[warps]
        part[:, W : 2 * W] = np.maximum(part[:, W : 2 * W], part[:, :W])
        self.clock[warps] = part
        self.clock[warps, warps] += 1  # what they write from now on it does not cover

    # ---- ordinary accesses ----
    def read(self, warps: np.ndarray, offsets: np.ndarray, nbytes: int) -> None:
        """Each of `warps` reads `nbytes` at its offset."""
        words = words_of(offsets, nbytes)
        who = warps[:, None]
        now = self.clock[warps, warps][:, None]
        self.reads[who, words] = np.maximum(self.reads[who, words], now)
        known = self.clock[who, self.writer[words]] >= self.written[words]
        if not known.all():
            known |= self.same[who, words]
            if not known.all():
                row = int(np.flatnonzero(~known.all(axis=1))[0])
                at = words[row][~known[row]][0]
                self._report(
                    f"{self.name(warps[row])} reads {self.offset(at)} without having "
                    f"waited for {self._origin(at)}"
                )

    def write(self, warp: int, offsets: np.ndarray, nbytes: int, unchanged: np.ndarray) -> None:
        """`warp` writes; `unchanged` tells which of its accesses store what was there."""
        words = words_of(offsets, nbytes)
        clock = self.clock[warp]
        ordered = clock[self.writer[words]] >= self.written[words]
        others = self.reads[:, words] <= clock[: self.W, None, None]
        others[warp] = self.reads[warp][words] != PENDING
        fine = (ordered & others.all(axis=0)).all(axis=1)
        if not (fine | unchanged).all():
            row = int(np.flatnonzero(~(fine | unchanged))[0])
            self._report_write(f"{self.name(warp)} writes", words[row], clock)
        takes = words[fine | ~unchanged].ravel()
        self.same[:, takes] = False
        self.writer[takes] = warp
        self.written[takes] = clock[warp]
        joins = words[unchanged & ~fine].ravel()
        self.same[warp, joins] = True
        self.reads[warp, joins] = clock[warp]

    # ---- asynchronous copies ----
    def issue_write(self, warps: Any, words: np.ndarray, name: str, proxy: bool) -> Copy:
        """A copy into `words` (n, k) is issued by `warps` (n,); `proxy`: through TMA."""
        for warp in np.unique(warps):
            mine = words[warps == warp].ravel()
            clock = self.clock[warp]
            self._check_visible(f"{name}, issued by {self.name(warp)}, writes", mine, warp, proxy)
            where = span_of(mine) if proxy else mine  # TMA writes no word twice
            if not (self.reads[:, where] <= clock[: self.W, None]).all():
                self._report_write(f"{name}, issued by {self.name(warp)}, overwrites", mine, clock)
            self.reads[:, where] = 0
            self.same[:, where] = False
            self.writer[where] = 2 * self.W
            self.written[where] = PENDING
        return Copy(warps, words)

    def written_for(self, copy: Copy, barrier: Any) -> None:
        """The copy is done and about to be counted by an mbarrier."""
        words = copy.words.ravel()
        self.writer[words] = self.sync_of(barrier).column
        self.written[words] = barrier.phase + 1

    def waited(self, copy: Copy, warps: np.ndarray) -> None:
        """`warps` have waited for their part of a cp.async."""
        for warp in np.unique(copy.warps):
            if warp in warps:
                words = copy.words[copy.warps == warp].ravel()
                words = words[self.writer[words] == 2 * self.W]
                self.writer[words] = warp
                self.written[words] = self.clock[warp, warp]

    def issue_read(self, warp: int, words: np.ndarray, name: str) -> Copy:
        """A store from shared words is issued; it reads until it is waited for."""
        self._check_visible(f"{name}, issued by {self.name(warp)}, reads", words, warp, True)
        self.reads[warp, words] = PENDING
        return Copy(warp, words)

    def was_read(self, copy: Copy | None, warps: np.ndarray | None = None) -> None:
        """`warps`, or who issued it, have waited until a store had read its source."""
        if copy is not None and not copy.told and (warps is None or copy.warps in warps):
            copy.told = True  # later waits cover it too, when its source may be read again
            self.reads[copy.warps, copy.words] = self.clock[copy.warps, copy.warps]

    def ended(self, warps: np.ndarray, copies: Iterable[Copy | None]) -> None:
        """`warps` have ended, of whose stores nobody else can tell what they have read."""
        for copy in copies if self.findings.fences else ():
            if copy is not None and not copy.told and copy.warps in warps:
                self._report(
                    f"{self.name(copy.warps)} ends before its bulk store is known to have read "
                    f"{self.offset(copy.words[0])}, where the next CTA may write"
                )

    # ---- matrix products ----
    def issue_product(self, warp: int, words: np.ndarray, name: str) -> Copy:
        """A product that reads `words` is issued; it reads until it is known to be over."""
        self._check_visible(f"{name}, issued by {self.name(warp)}, reads", words, warp, True)
        self.reads[warp, words] = PENDING
        return Copy(warp, words)

    def depart(self, warp: int) -> np.ndarray:
        """What a warp knows when it lets its products' end arrive at a barrier."""
        known = self.clock[warp].copy()
        self.clock[warp, warp] += 1
        return known

    def products_arrive(self, barrier: Any, known: np.ndarray, copies: list[Copy]) -> None:
        """The products are over, and about to be counted by an mbarrier."""
        sync = self.sync_of(barrier)
        np.maximum(sync.arriving, known, out=sync.arriving)
        sync.announced += 1
        for copy in copies:
            pending = copy.words[self.reads[copy.warps, copy.words] == PENDING]
            self.reads[copy.warps, pending] = known[copy.warps]

    # ---- saying what is wrong ----
    def name(self, warp: Any) -> str:
        if not self.per_rank:
            return f"warp {warp}"
        return f"warp {int(warp) % self.per_rank} of rank {int(warp) // self.per_rank}"

    def offset(self, word: Any) -> str:
        return f"shared offset {int(word) * WORD % self.size:#x}"

    def _check_visible(self, what: str, words: np.ndarray, warp: int, proxy: bool) -> None:
        clock, writer, written = self.clock[warp], self.writer[words], self.written[words]
        known = clock[writer] >= written
        if not known.all():
            at = words[~known][0]
            self._report(f"{what} {self.offset(at)}, not ordered after {self._origin(at)}")
        if not proxy:
            return
        generic = writer < self.W
        fenced = clock[np.where(generic, writer + self.W, writer)] >= written
        if not fenced.all():
            at = words[~fenced][0]
            self._report(
                f"{what} {self.offset(at)} with no fence.proxy.async after {self._origin(at)}"
            )

    def _report_write(self, what: str, words: np.ndarray, clock: np.ndarray) -> None:
        for warp in range(self.W):
            late = words[self.reads[warp, words] > clock[warp]]
            if len(late):
                pending = (self.reads[warp, late] == PENDING).any()
                reader = (
                    f"a bulk store or product of {self.name(warp)}"
                    if pending
                    else f"{self.name(warp)}'s read"
                )
                self._report(f"{what} {self.offset(late[0])}, not ordered after {reader}")
                return
        late = words[clock[self.writer[words]] < self.written[words]]
        if len(late):
            at = late[0]
            self._report(f"{what} {self.offset(at)}, not ordered after {self._origin(at)}")

    def _origin(self, word: Any) -> str:
        column = int(self.writer[word])
        if column < self.W:
            return f"{self.name(column)}'s write"
        if column == 2 * self.W:
            return "a copy that is in flight"
        names = [b.name for b, sync in self.syncs.values() if sync.column == column]
        return f"the copy that phase {int(self.written[word]) - 1} of the {names[0]} announces"

    def _report(self, message: str) -> None:
        self.findings.report(Race(message))


def span_of(words: np.ndarray) -> Any:
    """Different words, as a slice if there is none between them that is not among them."""
    first, last = int(words.min()), int(words.max())
    return slice(first, last + 1) if last - first + 1 == len(words) else words


def words_of(offsets: np.ndarray, nbytes: int) -> np.ndarray:
    """(n, words) numbers of the words that each access touches."""
    first = offsets.astype(np.int64) // WORD
    return first[:, None] + np.arange(max(1, nbytes // WORD))


def warps_of(g: Any, lanes: np.ndarray | None, count: int) -> np.ndarray:
    """The warp of each of `count` addresses; one address for all lanes counts for the first."""
    if lanes is None:
        return np.repeat(g.warps, 32) if count == g.lanes else g.warps[:count]
    return g.warps[lanes // 32][:count]


def active_warps(g: Any, lanes: np.ndarray | None) -> np.ndarray:
    """The warps that have an active lane."""
    return g.warps if lanes is None else g.warps[np.unique(lanes // 32)]

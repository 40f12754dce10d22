"""Accesses to tensor memory that nothing orders, by the clocks of check/races.py.

Each clock has three more columns a warp: how many of its tcgen05.ld, of its tcgen05.st, and of the
products and copies that it issued are known to be over. A store is over when the warp has waited
for it, a load too where the session asks for that (`strict="fences"`), else at once. Of what is in
the pipe, those know who have seen the phase of an mbarrier that a later tcgen05.commit ended; the
warp that issued it is no exception. In the pipe, what one warp issues stays in order.

Where the session asks for fences, a warp tells of loads and stores that were over at its last
`fence::before_thread_sync` (a commit is one), and of what others did it knows for its accesses what
it had learned of by its last `fence::after_thread_sync`.

For 16 lanes of each column: who wrote last and when, and when each has last read. An access is a
race if it conflicts with one that its warp does not know to be over, whether or not the two met in
this run.
"""

from typing import Any

import numpy as np

from ..findings import Race
from ..machine.tmem import COLUMNS, LANES, Region
from .races import TMEM_KINDS, RaceChecker

LOAD, STORE, PIPE = range(3)
NAMES = ("tcgen05.ld of {}", "tcgen05.st of {}", "product or copy that {} issued")
ROWS = 16  # lanes that share a record
Where = tuple[slice, slice]


class TmemClocks:
    """What the warps of a cluster know of each other's accesses; columns count from 0 here."""

    def __init__(self, race: RaceChecker, fences: bool) -> None:
        self.race, self.fences, self.W = race, fences, race.W
        self.clock = race.clock[:, race.tmem :]
        self.count = np.zeros(TMEM_KINDS * race.W, np.int32)  # accesses so far
        self.over = self.count.copy()  # those that the warp itself has waited for
        self.when = np.zeros(race.W, np.int32)  # each warp last waited for some, by its own clock
        self.seen = self.clock.copy()  # the clocks, as of each warp's last fence::after

    def column(self, kind: int, warp: int) -> int:
        return kind * self.W + warp

    def waited(self, kind: int, warp: int) -> None:
        """`warp` has waited for its loads or stores."""
        column = self.column(kind, warp)
        self.over[column] = self.count[column]
        self.when[warp] = self.race.clock[warp, warp]
        if not self.fences:
            self.clock[warp, column] = self.count[column]

    def fence(self, warp: int, before: bool) -> None:
        if before:
            self._tell(warp, self.clock[warp])
        else:
            self.seen[warp] = self.clock[warp]

    def committed(self, warp: int, known: np.ndarray) -> None:
        """Note in a clock that is to arrive with a commit what will be over then."""
        told = known[self.race.tmem :]
        self._tell(warp, told)
        told[self.column(PIPE, warp)] = self.count[self.column(PIPE, warp)]

    def _tell(self, warp: int, clock: np.ndarray) -> None:
        for kind in (LOAD, STORE):
            clock[self.column(kind, warp)] = self.over[self.column(kind, warp)]

    def known(self, warp: int) -> np.ndarray:
        """How many accesses of each column an access of `warp` comes after."""
        found = (self.seen if self.fences else self.clock)[warp].copy()
        self._tell(warp, found)  # its own need no fence
        found[self.column(PIPE, warp)] = self.clock[warp, self.column(PIPE, warp)]
        return found

    def known_at_all(self, warp: int) -> np.ndarray:
        """The same without fences, for what is no access: tcgen05.dealloc."""
        found = self.clock[warp].copy()
        waits = self.race.clock[warp, : self.W] >= self.when  # those of these warps it knows of
        for kind in (LOAD, STORE):
            part = slice(kind * self.W, (kind + 1) * self.W)
            found[part] = np.where(waits, self.over[part], found[part])
        return found


class TmemRaces:
    """The records of one CTA's tensor memory; warps are those of the cluster's checker."""

    def __init__(self, clocks: TmemClocks) -> None:
        self.clocks, self.count = clocks, clocks.count
        size = LANES // ROWS, COLUMNS
        self.writer = np.zeros(size, np.int32)  # column; at time 0 everyone knows of it
        self.written = np.zeros(size, np.int32)
        self.readers = np.zeros(0, np.int32)  # columns
        self.reads = np.zeros((0, *size), np.int32)
        self.last = 0  # whose access was the last, by its column
        self.checked: set[tuple[Region, bool]] = set()  # its accesses since, if it is a pipe

    def access(self, kind: int, warp: int, region: Region, writes: bool, what: str) -> None:
        """`warp` is about to access a region, or issues what does."""
        mine, where = self.clocks.column(kind, warp), place_of(region)
        if kind != PIPE or self.last != mine:
            self.last = mine
            self.checked.clear()
        if (region, writes) not in self.checked:  # steps of one product have one D
            who, pipe = (warp, what), mine if kind == PIPE else None
            self.check(self.clocks.known(warp), who, region, writes, pipe)
            if kind == PIPE:
                self.checked.add((region, writes))
        self.count[mine] += 1
        if writes:
            self.writer[where] = mine
            self.written[where] = self.count[mine]
        else:
            row = self._row_of(mine)
            self.reads[row, *where] = self.count[mine]
        if kind == LOAD and not self.clocks.fences:
            self.clocks.waited(LOAD, warp)

    def check_dealloc(self, warp: int, region: Region) -> None:
        known = self.clocks.known_at_all(warp)
        self.check(known, (warp, "a tcgen05.dealloc"), region, True)

    def check(
        self,
        clock: np.ndarray,
        who: tuple[int, str],
        region: Region,
        writes: bool,
        pipe: int | None = None,
    ) -> None:
        """Report an access, in the pipe of column `pipe` or in none, that `clock` does not allow.

        `who`: the warp, and what it does.
        """
        where = place_of(region)
        writer = self.writer[where]
        known = clock[writer] >= self.written[where]
        if pipe is not None:
            known |= writer == pipe
        if not known.all():
            self._report(who, region, int(writer[~known][0]))
        if writes and len(self.readers):
            late = self.reads[:, *where] > clock[self.readers][:, None, None]
            if late.any():
                columns = self.readers[late.any(axis=(1, 2))]
                for column in columns[columns != pipe]:
                    self._report(who, region, int(column))

    def forget(self, region: Region) -> None:
        """A region is allocated; who gets to know its address comes later than all before."""
        where = place_of(region)
        self.written[where] = 0
        self.reads[:, *where] = 0

    def _row_of(self, column: int) -> int:
        rows = np.flatnonzero(self.readers == column)
        if len(rows):
            return int(rows[0])
        self.readers = np.append(self.readers, np.int32(column))
        self.reads = np.concatenate([self.reads, np.zeros((1, *self.writer.shape), np.int32)])
        return len(self.readers) - 1

    def _report(self, who: tuple[int, str], region: Region, column: int) -> None:
        clocks, race, (warp, what) = self.clocks, self.clocks.race, who
        kind, other = divmod(column, clocks.W)
        missing = "nothing"
        if clocks.fences and clocks.clock[warp, column] > clocks.known(warp)[column]:
            missing = f"no tcgen05.fence::after_thread_sync of {race.name(warp)}"
        race.findings.report(
            Race(
                f"{what} of columns {region.first} .. {region.last}, lanes {region.low} .. "
                f"{region.high}: {missing} orders it after a {NAMES[kind].format(race.name(other))}"
            )
        )


def clocks_of(cta: Any) -> TmemClocks:
    """The clocks of a CTA's cluster, whose races are looked for."""
    state = cta.peers[0].state
    if "tcgen05 clocks" not in state:
        state["tcgen05 clocks"] = TmemClocks(cta.race.whole, cta.machine.findings.fences)
    return state["tcgen05 clocks"]


def place_of(region: Region) -> Where:
    """The records of a region."""
    return slice(region.low // ROWS, -(-region.high // ROWS)), slice(region.first, region.last)

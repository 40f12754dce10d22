"""Accesses to tensor memory that nothing orders, by the clocks of check/races.py.

Each clock has three more columns a warp: how many of its tcgen05.ld, of its tcgen05.st, and of the
products and copies that it issued are known to be over. A store is over when the warp has waited
for it, a load too where the session asks for that (`strict="fences"`), else at once. Of what is in
the pipe, those know who have seen the phase of an mbarrier that a later tcgen05.commit ended; the
warp that issued it is no exception. In the pipe, what one warp issues stays in order.

For 16 lanes of each column: who wrote last and when, and when each has last read. An access is a
race if it conflicts with one that is not in its warp's clock, whether or not the two met in this
run. What fences must stand between them is the business of tmem_fences.py.
"""

import numpy as np

from ..findings import Race
from ..machine.tmem import COLUMNS, LANES, Region
from .races import RaceChecker

LOAD, STORE, PIPE = range(3)
NAMES = ("tcgen05.ld of {}", "tcgen05.st of {}", "product or copy that {} issued")
ROWS = 16  # lanes that share a record
Where = tuple[slice, slice]


class TmemRaces:
    """The records of one CTA's tensor memory; warps are those of the cluster's checker."""

    def __init__(self, race: RaceChecker, loads_end_at_waits: bool) -> None:
        self.race, self.loads_end_at_waits = race, loads_end_at_waits
        self.count = race.tmem_count
        size = LANES // ROWS, COLUMNS
        self.writer = np.zeros(size, np.int32)  # column; at time 0 everyone knows of it
        self.written = np.zeros(size, np.int32)
        self.readers = np.zeros(0, np.int32)  # columns
        self.reads = np.zeros((0, *size), np.int32)
        self.last = 0  # whose access was the last, by its column
        self.checked: set[tuple[Region, bool]] = set()  # its accesses since, if it is a pipe

    def column(self, kind: int, warp: int) -> int:
        return self.race.tmem + kind * self.race.W + warp

    def access(self, kind: int, warp: int, region: Region, writes: bool, what: str) -> None:
        """`warp` is about to access a region, or issues what does."""
        mine, where = self.column(kind, warp), place_of(region)
        if kind != PIPE or self.last != mine:
            self.last = mine
            self.checked.clear()
        if (region, writes) not in self.checked:  # steps of one product have one D
            self.check(warp, region, writes, what, mine if kind == PIPE else None)
            if kind == PIPE:
                self.checked.add((region, writes))
        self.count[mine] += 1
        if writes:
            self.writer[where] = mine
            self.written[where] = self.count[mine]
        else:
            row = self._row_of(mine)
            self.reads[row, *where] = self.count[mine]
        if kind == LOAD and not self.loads_end_at_waits:
            self.waited(LOAD, warp)

    def check(
        self, warp: int, region: Region, writes: bool, what: str, pipe: int | None = None
    ) -> None:
        """Report an access of `warp`, in the pipe of column `pipe` or in none, if it is a race."""
        clock, where = self.race.clock[warp], place_of(region)
        writer = self.writer[where]
        known = clock[writer] >= self.written[where]
        if pipe is not None:
            known |= writer == pipe
        if not known.all():
            self._report(what, region, int(writer[~known][0]))
        if writes and len(self.readers):
            late = self.reads[:, *where] > clock[self.readers][:, None, None]
            if late.any():
                columns = self.readers[late.any(axis=(1, 2))]
                for column in columns[columns != pipe]:
                    self._report(what, region, int(column))

    def waited(self, kind: int, warp: int) -> None:
        """`warp` has waited for its loads or stores."""
        column = self.column(kind, warp)
        self.race.clock[warp, column] = self.count[column]

    def committed(self, warp: int, known: np.ndarray) -> None:
        """Note in a clock that is to arrive with a commit what will be over then."""
        column = self.column(PIPE, warp)
        known[column] = self.count[column]

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

    def _report(self, what: str, region: Region, column: int) -> None:
        kind, warp = divmod(column - self.race.tmem, self.race.W)
        other = NAMES[kind].format(self.race.name(warp))
        self.race.findings.report(
            Race(
                f"{what} of columns {region.first} .. {region.last}, lanes {region.low} .. "
                f"{region.high}: nothing orders it after a {other}"
            )
        )


def place_of(region: Region) -> Where:
    """The records of a region."""
    return slice(region.low // ROWS, -(-region.high // ROWS)), slice(region.first, region.last)

"""Races in global memory between the clusters of a launch, and with the launch before.

A word of 4 bytes remembers which cluster wrote it last, when, and who read it. Clusters are agents
with vector clocks. They learn of each other through memory: who reads a word by an atomic, or by a
load that is .acquire, .relaxed or .volatile, learns what those who wrote it so had published by
then: a .release (or .acq_rel) publishes all before it, any other what the last fence did. An access
that conflicts with one which its cluster has not learned of is a race, whatever this run's order.

A launch with programmatic stream serialization may start before the one ahead of it ends. What that
one wrote must not be read, nor overwritten, by a CTA that has not passed griddepcontrol.wait.

Not seen: races inside of a cluster, parts of words, stores of the value that is there already.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..findings import Findings, Race

WORD = 4
Shape = tuple[int, ...]


@dataclass
class Shadow:
    """Of each word of an allocation: the writer, its time, and the reader (-n: n and others)."""

    writer: np.ndarray
    written: np.ndarray
    reader: np.ndarray


class GlobalWatch:
    """The records of a session's global memory; clusters are numbered through all launches."""

    def __init__(self, allocations: Any, findings: Findings) -> None:
        self.allocations, self.findings = allocations, findings
        self.shadows: dict[int, Shadow] = {}
        self.before = self.base = self.last = 0  # clusters of the launch before: (before, base]
        self.overlaps = False
        self.waited: set[int] = set()
        self.names: list[Any] = []

    def begin(self, clusters: list[Any], overlaps: bool) -> None:
        """A launch of clusters, by their first CTAs, that may overlap the launch before."""
        self.before, self.base = self.base, self.last
        self.last = self.base + len(clusters)
        self.overlaps = overlaps
        self.waited.clear()
        self.names = clusters
        self.numbers = {name: self.base + 1 + index for index, name in enumerate(clusters)}
        size = len(clusters)
        self.clock: dict[int, np.ndarray] = {}
        self.published: dict[int, np.ndarray] = {}
        self.places: dict[int, np.ndarray] = {}
        self.nothing = np.zeros(size, np.int32)

    def number_of(self, cta: Any) -> int:
        if "cluster number" not in cta.state:
            cta.state["cluster number"] = self.numbers[cta.peers[0].ctaid]
        return cta.state["cluster number"]

    # ---- clocks ----
    def clock_of(self, number: int) -> np.ndarray:
        found = self.clock.get(number)
        if found is None:
            found = self.clock[number] = self.nothing.copy()
            found[number - self.base - 1] = 1
        return found

    def known(self, number: int, others: np.ndarray) -> Any:
        """How far a cluster knows others to have come; without a clock it never learned of any."""
        clock = self.clock.get(number)
        return 0 if clock is None else clock[others - self.base - 1]

    def now(self, number: int) -> int:
        clock = self.clock.get(number)
        return 1 if clock is None else int(clock[number - self.base - 1])

    def fence(self, cta: Any) -> None:
        """A fence of gpu scope or wider."""
        if len(self.names) > 1:
            number = self.number_of(cta)
            clock = self.clock_of(number)
            self.published[number] = clock.copy()
            clock[number - self.base - 1] += 1

    def wait(self, cta: Any) -> None:
        """griddepcontrol.wait."""
        self.waited.add(id(cta))

    def synchronise(self, cta: Any, addresses: Any, how: tuple[bool, bool, bool]) -> None:
        """An access by which clusters learn of each other: (reads, writes, releases)."""
        if len(self.names) == 1:
            return
        reads, writes, releases = how
        number = self.number_of(cta)
        clock = self.clock_of(number)
        if releases:
            self.fence(cta)
        published = self.published.get(number)
        for address in np.unique(addresses):
            place = self.places.get(int(address))
            if reads and place is not None:
                np.maximum(clock, place, out=clock)
            if writes and published is not None:
                if place is None:
                    place = self.places[int(address)] = self.nothing.copy()
                np.maximum(place, published, out=place)

    # ---- accesses ----
    @property
    def _alone(self) -> bool:
        """Whether no one else is there: reads need no record then."""
        return len(self.names) == 1 and not self.overlaps

    def lanes(self, cta: Any, addresses: np.ndarray, nbytes: int, changed: Any = None) -> None:
        """Ordinary accesses of `nbytes` each; `changed`: they are stores, and which change a word.

        Addresses were checked to be inside of allocations.
        """
        if nbytes < WORD or (changed is None and self._alone):
            return
        starts = self.allocations.starts
        index = np.searchsorted(starts, addresses, "right") - 1
        first = index[0]
        if (index != first).any():
            for at in np.unique(index):
                some = index == at
                part = None if changed is None else changed[some]
                self.lanes(cta, addresses[some], nbytes, part)
            return
        words = ((addresses - starts[first]) // np.uint64(WORD)).astype(np.int64)
        shadow = self.shadow_of(int(first))
        where = words[:, None] + np.arange(nbytes // WORD)
        if changed is None:
            self._read(cta, shadow, where)
        else:
            self._write(cta, shadow, where[changed])

    def box(self, cta: Any, start: int, shape: Shape, strides: Shape, writes: bool) -> None:
        """Bytes from `start` on, of `shape` and `strides` (the innermost 1), read or written."""
        if not writes and self._alone:
            return
        if start % WORD or shape[-1] % WORD or any(s % WORD for s in strides[:-1]):
            return
        index = int(np.searchsorted(self.allocations.starts, np.uint64(start), "right")) - 1
        where = np.array((start - int(self.allocations.starts[index])) // WORD)
        for extent, stride in zip(shape[:-1], strides[:-1], strict=True):
            where = where[..., None] + np.arange(extent) * (stride // WORD)
        where = where[..., None] + np.arange(shape[-1] // WORD)
        function = self._write if writes else self._read
        function(cta, self.shadow_of(index), where)

    def shadow_of(self, index: int) -> Shadow:
        start = int(self.allocations.starts[index])
        words = -(-(int(self.allocations.ends[index]) - start) // WORD)
        found = self.shadows.get(start)
        if found is None or len(found.writer) < words:
            found = Shadow(*(np.zeros(words, np.int32) for _ in range(3)))
            self.shadows[start] = found
        return found

    def _read(self, cta: Any, shadow: Shadow, where: np.ndarray) -> None:
        me = self.number_of(cta)
        writer = shadow.writer[where]
        self._check_writers(cta, "reads", writer, shadow.written[where])
        reader = shadow.reader[where]
        alone = (np.abs(reader) <= self.base) | (reader == me)
        shadow.reader[where] = np.where(alone, me, -me)

    def _write(self, cta: Any, shadow: Shadow, where: np.ndarray) -> None:
        me = self.number_of(cta)
        self._check_writers(cta, "overwrites", shadow.writer[where], shadow.written[where])
        reader = shadow.reader[where]
        other = (np.abs(reader) > self.base) & (reader != me)
        if other.any():
            numbers = np.abs(reader[other])
            unknown = (self.known(me, numbers) == 0) & (numbers != me)  # never learned of it
            if unknown.any():
                self._report(cta, "overwrites", f"reads by {self.name(int(numbers[unknown][0]))}")
        if self.overlaps and id(cta) not in self.waited:
            before = (np.abs(reader) > self.before) & (np.abs(reader) <= self.base)
            if before.any():
                self._report(cta, "overwrites", "what the launch before reads")
        shadow.writer[where] = me
        shadow.written[where] = self.now(me)

    def _check_writers(self, cta: Any, does: str, writer: np.ndarray, written: np.ndarray) -> None:
        me = self.number_of(cta)
        other = (writer > self.base) & (writer != me)
        if other.any():
            numbers = writer[other]
            known = self.known(me, numbers) >= written[other]
            if not known.all():
                self._report(cta, does, f"what {self.name(int(numbers[~known][0]))} writes")
        if self.overlaps and id(cta) not in self.waited:
            before = (writer > self.before) & (writer <= self.base)
            if before.any():
                self._report(cta, does, "what the launch before writes")

    def name(self, number: int) -> str:
        return f"CTA {self.names[number - self.base - 1]}"

    def _report(self, cta: Any, does: str, what: str) -> None:
        reason = "without griddepcontrol.wait" if "launch" in what else "and nothing orders the two"
        self.findings.report(Race(f"CTA {cta.ctaid} {does} global memory, {what}, {reason}"))

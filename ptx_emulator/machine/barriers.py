"""mbarriers and named barriers."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..findings import BarrierFault

if TYPE_CHECKING:
    from .gang import Gang

MAX_TX = (1 << 20) - 1


@dataclass
class MBarrier:
    """An mbarrier object: a phase is over when no arrival and no byte is outstanding."""

    name: str
    count: int
    pending: int = 0
    tx: int = 0
    phase: int = 0
    waiters: list["Gang"] = field(default_factory=list)
    watch: Any = None  # the race checker, told of arrivals and of phases that end
    maker: int | None = None  # the warp whose init the async proxy may not see yet

    def __post_init__(self) -> None:
        self.pending = self.count

    @property
    def parity(self) -> int:
        """The parity of the phase that is going on."""
        return self.phase & 1

    def arrive(self, number: int = 1, at_once: int = 1) -> None:
        """`number` arrivals; `at_once`: of so many lanes of a warp by one instruction."""
        if self.watch is not None:
            self.watch.arrived(self, number)
        while number > 0:
            step = min(number, self.pending)
            if step == 0:
                raise BarrierFault(
                    f"{self.name} receives an arrival more than its count of {self.count} in "
                    f"phase {self.phase} while {self.tx} bytes are outstanding"
                )
            self.pending -= step
            number -= step
            if number % at_once and self.pending == 0 == self.tx:
                raise BarrierFault(
                    f"{self.name} with a count of {self.count}: phase {self.phase} ends with "
                    f"{number % at_once} of the {at_once} lanes of a warp that arrive left over"
                )
            self._end_phase()

    def expect(self, nbytes: int) -> None:
        self.tx += nbytes
        if abs(self.tx) > MAX_TX:
            raise BarrierFault(f"{self.name}: tx-count {self.tx} is out of range")

    def check_fenced(self, what: str) -> None:
        """Raise if the async proxy would not see the init."""
        if self.maker is not None:
            raise BarrierFault(
                f"{what} signals the {self.name}, whose init no fence.mbarrier_init (nor "
                f"fence.proxy.async) of warp {self.maker} makes visible to it"
            )

    def complete(self, nbytes: int) -> None:
        self.expect(-nbytes)
        self._end_phase()

    def _end_phase(self) -> None:
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.count
            if self.watch is not None:
                self.watch.phase_over(self)
            waiters, self.waiters = self.waiters, []
            for gang in waiters:
                gang.wake()

    def describe(self) -> str:
        return (
            f"{self.name} is in phase {self.phase} with {self.pending} of {self.count} arrivals "
            f"and {self.tx} bytes outstanding"
        )


@dataclass
class NamedBarrier:
    """bar.sync / bar.arrive number `index` of a CTA."""

    index: int
    expected: int = 0
    arrived: int = 0
    waiting: list["Gang"] = field(default_factory=list)

    def arrive(self, threads: int, expected: int) -> bool:
        """Count `threads`; True when that completes the barrier."""
        if self.arrived and expected != self.expected:
            raise BarrierFault(
                f"bar {self.index} is used for {expected} threads while {self.arrived} of "
                f"{self.expected} have arrived"
            )
        self.expected = expected
        self.arrived += threads
        if self.arrived > expected:
            raise BarrierFault(
                f"bar {self.index} for {expected} threads is reached by {self.arrived}"
            )
        if self.arrived < expected:
            return False
        self.arrived = 0
        waiting, self.waiting = self.waiting, []
        for gang in waiting:
            gang.wake()
        return True

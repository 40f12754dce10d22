"""Says that warps run for ever: nothing that anyone could wait for changes any more."""

from typing import TYPE_CHECKING, Any

from ..findings import Livelock
from .gang import Gang

if TYPE_CHECKING:
    from .machine import Machine

_POLLS = ("ld", "atom", "mbarrier", "nanosleep")


class ProgressWatch:
    """Looks every `interval` blocks whether barriers, memory, copies or warps have changed."""

    def __init__(self, machine: "Machine", interval: int) -> None:
        self.machine = machine
        self.interval = interval
        self.stuck = False
        self.next = interval
        self.blocks = machine.warp_counts.copy()  # as they were at the last look
        self.before: Any = None

    def look(self) -> None:
        """Called now and then; compares with what was seen an interval ago."""
        total = sum(self.machine.block_counts)
        if total < self.next:
            return
        self.next = total + self.interval
        now = self._state()
        self.stuck = now == self.before
        if not self.stuck:
            self.before = now
            self.blocks = self.machine.warp_counts.copy()

    def _state(self) -> Any:
        machine = self.machine
        ctas = {id(gang.cta): gang.cta for gang in machine.gangs}.values()
        return (
            machine.queue.finished,
            machine.memory.stores,
            [(gang.cta.ctaid, gang.ready) for gang in machine.gangs if not gang.ready],
            [cta.smem.stores for cta in ctas],
            [(b.phase, b.pending, b.tx) for cta in ctas for b in cta.mbarriers.values()],
            [b.arrived for cta in ctas for b in cta.named.values()],
        )

    def livelock(self) -> Livelock:
        """Who spins on what, and who waits."""
        lines = []
        for gang in self.machine.gangs:
            if gang.ready:
                lines.append(f"  {gang.name} spins{self._polls(gang)}")
            else:
                line = self.machine.line_of(gang.pc)
                lines.append(f"  {gang.name} before PTX line {line} waits for {gang.reason}")
        return Livelock(f"nothing has changed for {self.interval} blocks:\n" + "\n".join(lines))

    def _polls(self, gang: Gang) -> str:
        """The instructions that a gang's loop looks at something with."""
        counts = self.machine.warp_counts[:, gang.warps] - self.blocks[:, gang.warps]
        found = [
            f"line {instruction.line}: {instruction.text}"
            for block in self.machine.program.flow.blocks
            if counts[block.index].max() > 1
            for instruction in block.code
            if instruction.opcode in _POLLS
        ]
        lines = [self.machine.line_of(int(i)) for i in counts.max(axis=1).nonzero()[0]]
        span = f" between PTX lines {min(lines)} and {max(lines)}" if lines else ""
        return span + (", on " + "; ".join(found[:3]) if found else "")

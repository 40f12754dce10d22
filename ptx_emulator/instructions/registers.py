"""setmaxnreg: warps give registers to their CTA's pool, and take from it when there are enough.

At the launch each warp has what ptxas could use (.maxnreg, or what .reqntid and .minnctapersm leave
it), and the pool is empty. A warp that has ended keeps its registers. Without such a limit ptxas
ignores the instruction, and so it is here.
"""

from dataclasses import dataclass, field
from typing import Any

from ..findings import RegisterFault
from ..machine.gang import Gang
from ..ptx.emit import Emitter
from ..ptx.syntax import Imm, Instruction
from .matrix_load import warps_of
from .registry import instruction

MOST = 256  # of a thread, by what the instruction can say


@dataclass
class Registers:
    """Registers a thread of each warp, and how many times 32 lie in the pool."""

    held: list[int]
    free: int = 0
    waiting: list[Gang] = field(default_factory=list)

    def change(self, warp: int, number: int) -> None:
        self.free += self.held[warp] - number
        self.held[warp] = number


def registers_of(g: Gang) -> Registers:
    state, machine = g.cta.state, g.cta.machine
    if "registers" not in state:
        limit = machine.program.kernel.max_registers
        state["registers"] = Registers([min(limit, MOST)] * machine.num_warps)
    return state["registers"]


@instruction("setmaxnreg")
def setmaxnreg(e: Emitter, ins: Instruction) -> None:
    number = ins.operands[0]
    assert isinstance(number, Imm)
    if not e.program.kernel.max_registers:
        if ins.has("inc"):
            e.leave(str(e.block.targets[0]))
    elif ins.has("inc"):
        where = f"({e.block.index}, {e.block.targets[0]})"
        e.leave(e.call(run_increase, "g", str(number.value), where, e.mask))
    else:
        e.line(e.call(run_decrease, "g", str(number.value), e.mask))


def taking_part(g: Gang, number: int, mask: Any) -> list[int]:
    if number % 8 or not 24 <= number <= MOST:
        raise RegisterFault(f"setmaxnreg to {number}: a multiple of 8 from 24 to {MOST}")
    some = warps_of(g, mask)
    return [int(warp) for warp in (g.warps if some is None else g.warps[some])]


def run_decrease(g: Gang, number: int, mask: Any) -> None:
    pool = registers_of(g)
    for warp in taking_part(g, number, mask):
        if pool.held[warp] < number:
            raise RegisterFault(
                f"setmaxnreg.dec to {number} by warp {warp}, which has {pool.held[warp]}"
            )
        pool.change(warp, number)
    waiting, pool.waiting = pool.waiting, []
    for gang in waiting:
        gang.wake()


def run_increase(g: Gang, number: int, where: tuple[int, int], mask: Any) -> int:
    pool = registers_of(g)
    here, after = where
    for warp in taking_part(g, number, mask):
        if pool.held[warp] > number:
            raise RegisterFault(
                f"setmaxnreg.inc to {number} by warp {warp}, which has {pool.held[warp]}"
            )
        if number - pool.held[warp] > pool.free:
            pool.waiting.append(g)
            return g.block(
                here,
                f"registers: setmaxnreg.inc to {number} by warp {warp}, which has "
                f"{pool.held[warp]}, while {pool.free} a thread are free",
            )
        pool.change(warp, number)
    return after

"""cp.async: copies of 4, 8 or 16 bytes a lane from global to shared memory.

The destination is undefined from the issue until the copy is done, which is when a wait_group or an
mbarrier demands it, or when the schedule says so.
"""

from typing import Any

import numpy as np

from ..check.races import Copy, warps_of, words_of
from ..machine.async_ops import AsyncOp
from ..machine.gang import Gang
from ..machine.memory import DEFINED, IN_FLIGHT
from ..ptx.emit import Emitter
from ..ptx.syntax import Imm, Instruction, Reg
from .mbarrier import grouped, naming, shared_address
from .memory import chosen, lanes_of
from .registry import instruction


@instruction("cp.async")
def cp_async(e: Emitter, ins: Instruction) -> None:
    target, source, size, *rest = ins.operands
    assert isinstance(size, Imm)
    rest = [o for o in rest if not (isinstance(o, Reg) and o.type in ("b64", "u64"))]
    given = e.get(rest[0], "u32") if rest else "None"
    if rest and isinstance(rest[0], Reg) and rest[0].type == "pred":
        ignored = e.get(rest[0], "b1")
        given = e.temp(f"np.where({ignored}, {e.const(0, 'u32')}, {e.const(size.value, 'u32')})")
    where, origin = e.address(target, "u32"), e.address(source, "u64")
    e.line(e.call(issue, "g", where, origin, str(size.value), given, e.mask))


def issue(g: Gang, target: Any, source: Any, size: int, given: Any, mask: Any) -> None:
    """Start one copy a lane; bytes from `given` on are zeros."""
    lanes = lanes_of(g, mask)
    where = chosen(g, np.broadcast_to(target, g.lanes), lanes) - g.cta.shared_base
    origin = chosen(g, np.broadcast_to(source, g.lanes), lanes)
    if len(where) == 0:
        return
    smem, memory = g.cta.smem, g.cta.machine.memory
    smem.check(where, size, size, "cp.async")
    mark = None
    if g.cta.race is not None:
        mark = g.cta.race.issue_write(
            warps_of(g, lanes, len(where)), words_of(where, size), "a cp.async", False
        )
    smem.shadow.reshape(-1, size)[where // size] = IN_FLIGHT
    amount = np.broadcast_to(size if given is None else given, g.lanes)
    amount = amount if lanes is None else amount[lanes]
    watch, whole = g.cta.machine.global_watch, origin[amount >= size]
    if watch is not None and len(whole):
        memory.check(whole, size, size, "cp.async")
        watch.lanes(g.cta, whole, size)

    def run() -> None:
        data = np.zeros((len(where), size), np.uint8)
        full = amount >= size
        if full.any():
            kind = np.dtype(f"V{size}")
            data[full] = memory.gather(origin[full], kind, 1).view(np.uint8).reshape(-1, size)
        for lane in np.flatnonzero(~full & (amount > 0)):
            some = int(amount[lane])
            data[lane, :some] = np.frombuffer(memory.read(int(origin[lane]), some), np.uint8)
        smem.bytes.reshape(-1, size)[where // size] = data
        smem.shadow.reshape(-1, size)[where // size] = DEFINED

    g.copies.append(g.cta.machine.queue.add(AsyncOp("cp.async", run, owner=g.cta, mark=mark)))


@instruction("cp.async.commit_group")
def commit(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_commit, "g"))


def run_commit(g: Gang) -> None:
    g.copy_groups.append(g.copies)
    g.copies = []


@instruction("cp.async.wait_group")
def wait_group(e: Emitter, ins: Instruction) -> None:
    count = ins.operands[0]
    assert isinstance(count, Imm)
    e.line(e.call(run_wait, "g", str(count.value)))


def run_wait(g: Gang, keep: int) -> None:
    finished = g.copy_groups[: len(g.copy_groups) - keep] if keep else g.copy_groups
    g.copy_groups = g.copy_groups[-keep:] if keep else []
    for group in finished:
        g.cta.machine.queue.finish(group)
        if g.cta.race is not None:
            for op in group:
                g.cta.race.waited(op.mark, g.warps)


@instruction("cp.async.wait_all")
def wait_all(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_wait_all, "g"))


def run_wait_all(g: Gang) -> None:
    run_commit(g)
    run_wait(g, 0)


@instruction("cp.async.mbarrier")
def arrive(e: Emitter, ins: Instruction) -> None:
    """An arrival that is made when the lane's copies so far are done."""
    address = shared_address(e, ins.operands[0])
    e.line(e.call(run_arrive, "g", address, str(ins.has("noinc")), e.mask))


def run_arrive(g: Gang, address: Any, noinc: bool, mask: Any) -> None:
    before = (*[op for group in g.copy_groups for op in group], *g.copies)
    for at, lanes in grouped(g, address, mask):
        if not lanes:
            continue
        barrier = g.cta.mbarrier(at)
        if not noinc:
            barrier.pending += lanes
        if g.cta.race is not None:
            g.cta.race.release(barrier, naming(g, address, at, mask), lanes)
        run = _arrival(g, barrier, lanes, _untold(before))
        g.cta.machine.queue.add(AsyncOp("cp.async.mbarrier.arrive", run, before, owner=g.cta))


def _untold(copies: tuple[AsyncOp, ...]) -> list[Copy]:
    """Copies that no earlier arrival tells of; by a later one their place may hold other data."""
    marks = [op.mark for op in copies if op.mark is not None and not op.mark.told]
    for mark in marks:
        mark.told = True
    return marks


def _arrival(g: Gang, barrier: Any, lanes: int, told: list[Copy]) -> Any:
    def run() -> None:
        for mark in told:  # none without a race checker
            barrier.watch.written_for(mark, barrier)
        barrier.arrive(lanes)

    return run

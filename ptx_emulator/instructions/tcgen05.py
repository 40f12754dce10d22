"""tcgen05 for registers and barriers: alloc, dealloc, ld, st, wait, commit and fences.

Loads take effect at once (ptxas orders the registers' uses, so kernels need no wait::ld). Stores
are in flight until wait::st; a product issued before that is a race, and so is a load or a store of
cells that a product in flight writes, or reads.
"""

from typing import Any

import numpy as np

from ..findings import Misaligned, TmemFault, Unmodelled
from ..machine.async_ops import AsyncOp
from ..machine.gang import Gang
from ..machine.tmem import Region, TensorMemory
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction
from .bulk_copy import at_lane, issuing
from .matrix_load import warps_of
from .memory import items_of, store_shared
from .registry import instruction


def tensor_memory(cta: Any) -> TensorMemory:
    """The tensor memory of a CTA."""
    if "tmem" not in cta.state:
        cta.state["tmem"] = TensorMemory(f"CTA {cta.ctaid}")
    return cta.state["tmem"]


def group_of(ins: Instruction) -> int:
    return 2 if ins.has("cta_group::2") else 1


# ---- allocation ----
@instruction("tcgen05.alloc")
def alloc(e: Emitter, ins: Instruction) -> None:
    address, columns = e.address(ins.operands[0], "u32"), e.get(ins.operands[1], "u32")
    where = f"({e.block.index}, {e.block.targets[0]})"
    e.leave(e.call(run_alloc, "g", address, columns, str(group_of(ins)), where, e.mask))


def whole_warps(g: Gang, mask: Any) -> list[int]:
    """Positions of the warps that execute an instruction for whole warps."""
    some = warps_of(g, mask)
    return list(range(len(g.warps))) if some is None else [int(w) for w in some]


def run_alloc(g: Gang, address: Any, columns: Any, group: int, where: Any, mask: Any) -> int:
    warps = whole_warps(g, mask)
    here, after = where
    if not warps:
        return after
    if len(warps) > 1:
        raise Unmodelled("tcgen05.alloc by several warps at once")
    memory, wanted = tensor_memory(g.cta), at_lane(columns, 32 * warps[0])
    first = memory.allocate(wanted, group)
    if first is None:
        memory.waiting.append(g)
        return g.block(here, f"{wanted} columns of tensor memory")
    store_shared(g, np.uint32(at_lane(address, 32 * warps[0])), (np.uint32(first),), None)
    return after


@instruction("tcgen05.dealloc")
def dealloc(e: Emitter, ins: Instruction) -> None:
    address, columns = (e.get(operand, "u32") for operand in ins.operands)
    e.line(e.call(run_dealloc, "g", address, columns, str(group_of(ins)), e.mask))


def run_dealloc(g: Gang, address: Any, columns: Any, group: int, mask: Any) -> None:
    for warp in whole_warps(g, mask):
        first, number = at_lane(address, 32 * warp), at_lane(columns, 32 * warp)
        tensor_memory(g.cta).release(first, number, group)


@instruction("tcgen05.relinquish_alloc_permit")
def relinquish(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_relinquish, "g", e.mask))


def run_relinquish(g: Gang, mask: Any) -> None:
    if whole_warps(g, mask):
        tensor_memory(g.cta).relinquished = True


# ---- ld and st ----
def _plain_shape(e: Emitter, ins: Instruction) -> int:
    """Registers of a 32x32b access: lane i of a warp has row i, one column a register."""
    known = len(ins.mods) == 6 and ins.mods[3] == "32x32b" and ins.mods[4][0] == "x"
    if not known or ins.guard is not None:
        raise Unmodelled(e.text)
    return int(ins.mods[4][1:])


@instruction("tcgen05.ld")
def ld(e: Emitter, ins: Instruction) -> None:
    count, items = _plain_shape(e, ins), items_of(ins.operands[0])
    if len(items) != count:
        raise Unmodelled(e.text)
    address = e.address(ins.operands[1], "u32")
    e.put_each(items, e.call(load, "g", address, str(count), e.mask), "u32")


@instruction("tcgen05.ld.red")
def ld_red(e: Emitter, ins: Instruction) -> None:
    """A load, and the least or greatest of a lane's values. NaN counts for nothing."""
    shape, number, operation = ins.mods[4], ins.mods[5], ins.mods[6:-1]
    known = shape == "32x32b" and ins.type == "f32" and operation in (("max",), ("min",))
    items = items_of(ins.operands[0])
    if not known or ins.guard is not None or len(items) != int(number[1:]):
        raise Unmodelled(e.text)
    address = e.address(ins.operands[2], "u32")
    whole = e.temp(e.call(load, "g", address, str(len(items)), e.mask))
    e.put_each(items, whole, "u32")
    e.put(ins.operands[1], f"np.f{operation[0]}.reduce({whole}.view(D_f32))", "f32")


@instruction("tcgen05.st")
def st(e: Emitter, ins: Instruction) -> None:
    count, items = _plain_shape(e, ins), items_of(ins.operands[1])
    if len(items) != count:
        raise Unmodelled(e.text)
    address = e.address(ins.operands[0], "u32")
    values = ", ".join(e.get(item, "u32") for item in items)
    e.line(e.call(store, "g", address, f"({values},)", e.mask))


def places(g: Gang, address: Any, count: int, mask: Any) -> list[tuple[int, slice, Region]]:
    """(position of the warp, its lanes in the gang, region of tensor memory) of each warp."""
    found = []
    table = np.broadcast_to(address, g.lanes)
    for position in whole_warps(g, mask):
        span = slice(32 * position, 32 * position + 32)
        if (table[span] != table[span.start]).any():
            raise TmemFault("a tcgen05 access whose address differs between lanes of a warp")
        at, quarter = int(table[span.start]), 32 * int(g.warps[position] % 4)
        if at >> 16 != quarter:
            raise TmemFault(
                f"{g.name}: warp {int(g.warps[position])} may access lanes {quarter} .. "
                f"{quarter + 31}, not from lane {at >> 16} on"
            )
        column = at & 0xFFFF
        found.append((position, span, Region(column, column + count, quarter, quarter + 32)))
    return found


def load(g: Gang, address: Any, count: int, mask: Any) -> np.ndarray:
    memory = tensor_memory(g.cta)
    result = np.zeros((count, g.lanes), np.uint32)
    for _, span, region in places(g, address, count, mask):
        memory.check(region, False, "a tcgen05.ld")
        lanes = slice(region.low, region.high)
        result[:, span] = memory.data[region.first : region.last, lanes]
    return result


def store(g: Gang, address: Any, values: tuple[Any, ...], mask: Any) -> None:
    memory = tensor_memory(g.cta)
    targets = places(g, address, len(values), mask)

    def run() -> None:
        table = np.empty((len(values), g_lanes), np.uint32)
        for index, value in enumerate(values):
            table[index] = value
        for _, span, region in targets:
            memory.data[region.first : region.last, region.low : region.high] = table[:, span]

    g_lanes = g.lanes
    op = AsyncOp("tcgen05.st", run, owner=g.cta)
    for position, _, region in targets:
        memory.check(region, True, "a tcgen05.st")
        memory.fly(op, region, True)
        memory.stores.setdefault(int(g.warps[position]), []).append(op)
    if targets:
        g.cta.machine.queue.add(op)


@instruction("tcgen05.wait::st")
def wait_st(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_wait_st, "g", e.mask))


def run_wait_st(g: Gang, mask: Any) -> None:
    memory = tensor_memory(g.cta)
    for position in whole_warps(g, mask):
        g.cta.machine.queue.finish(memory.stores.pop(int(g.warps[position]), ()))


@instruction("tcgen05.wait::ld")
def wait_ld(e: Emitter, ins: Instruction) -> None:
    """Loads have taken effect when they were issued."""


@instruction("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def fence(e: Emitter, ins: Instruction) -> None:
    """What they order takes effect in order here."""


# ---- commit ----
@instruction("tcgen05.commit")
def commit(e: Emitter, ins: Instruction) -> None:
    multicast = ins.has("multicast::cluster")
    if not ins.has("mbarrier::arrive::one") or ins.type != "b64":
        raise Unmodelled(e.text)
    address = e.address(ins.operands[0], "u32")
    ranks = e.get(ins.operands[1], "u16") if multicast else "None"
    e.line(e.call(run_commit, "g", address, ranks, e.mask))


def run_commit(g: Gang, address: Any, ranks: Any, mask: Any) -> None:
    """Arrive on an mbarrier, or on one in each CTA of a mask, after the pipe's operations."""
    memory, queue = tensor_memory(g.cta), g.cta.machine.queue
    for lane in issuing(g, mask):
        at = at_lane(address, lane)
        if at % 8:
            raise Misaligned(f"tcgen05.commit to an mbarrier at {at:#x}")
        names = [at]
        if ranks is not None:
            named = at_lane(ranks, lane)
            names = [at & 0xFFFFFF | rank << 24 for rank in range(16) if named >> rank & 1]
        barriers = [g.cta.mbarrier(name) for name in names]
        for barrier in barriers:
            barrier.check_fenced("a tcgen05.commit")
        warp = int(g.warps[lane // 32])
        before = (memory.pipes[warp],) if warp in memory.pipes else ()
        memory.pipes[warp] = queue.add(AsyncOp("tcgen05.commit", _arrive(barriers), before))


def _arrive(barriers: list[Any]) -> Any:
    def run() -> None:
        for barrier in barriers:
            barrier.arrive()

    return run

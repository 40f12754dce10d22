"""tcgen05 for registers and barriers: alloc, dealloc, ld, st, wait, commit and fences.

Loads take effect at once: ptxas orders the registers' uses, so kernels need no wait::ld, but where
a session asks for it (check/tcgen05_wait.py), as with fences (check/tmem_fences.py). Stores are in
flight until wait::st; a product issued before that is a race, and so is a load or a store of
cells that a product in flight writes, or reads.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..check.tmem_fences import fences_of
from ..check.tmem_races import LOAD, STORE, TmemRaces, clocks_of
from ..findings import BarrierFault, Misaligned, Race, TmemFault, Unmodelled
from ..machine.async_ops import AsyncOp
from ..machine.gang import Gang
from ..machine.tmem import Region, TensorMemory
from ..ptx.emit import Emitter
from ..ptx.syntax import Imm, Instruction
from .bulk_copy import at_lane, issuing
from .matrix_load import warps_of
from .memory import items_of, store_shared
from .registry import instruction


def tensor_memory(cta: Any) -> TensorMemory:
    """The tensor memory of a CTA."""
    if "tmem" not in cta.state:
        memory = cta.state["tmem"] = TensorMemory(f"CTA {cta.ctaid}")
        if cta.race is not None:
            memory.races = TmemRaces(clocks_of(cta))
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
    first = memory.promised.pop(0) if memory.promised else _allocate(g, memory, wanted, group)
    if first is None:
        memory.waiting.append(g)
        return g.block(here, f"{wanted} columns of tensor memory")
    store_shared(g, np.uint32(at_lane(address, 32 * warps[0])), (np.uint32(first),), None)
    return after


def _allocate(g: Gang, memory: TensorMemory, wanted: int, group: int) -> int | None:
    """Columns for this CTA; a pair's are allocated in both of its CTAs at once."""
    first = memory.allocate(wanted, group)
    if first is not None and group == 2 and len(g.cta.peers) > 1:
        other = tensor_memory(g.cta.peers[g.cta.rank ^ 1])
        promised = other.allocate(wanted, group)
        other.promised += [] if promised is None else [promised]
    return first


@instruction("tcgen05.dealloc")
def dealloc(e: Emitter, ins: Instruction) -> None:
    address, columns = (e.get(operand, "u32") for operand in ins.operands)
    e.line(e.call(run_dealloc, "g", address, columns, str(group_of(ins)), e.mask))


def run_dealloc(g: Gang, address: Any, columns: Any, group: int, mask: Any) -> None:
    for warp in whole_warps(g, mask):
        first, number = at_lane(address, 32 * warp), at_lane(columns, 32 * warp)
        agent = g.cta.agent(int(g.warps[warp]))
        tensor_memory(g.cta).release(first, number, group, agent)


@instruction("tcgen05.relinquish_alloc_permit")
def relinquish(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_relinquish, "g", e.mask))


def run_relinquish(g: Gang, mask: Any) -> None:
    if whole_warps(g, mask):
        tensor_memory(g.cta).relinquished = True


# ---- ld and st ----
@dataclass(frozen=True, eq=False)
class Access:
    """Which cell, from the address on, each register of each lane is: (registers, 32) arrays."""

    rows: np.ndarray
    columns: np.ndarray
    height: int  # rows: 16 or 32
    spans: tuple[tuple[int, int], ...]  # of columns
    plain: bool = False


@functools.cache
def access(shape: str, count: int, split: int) -> Access:
    """The cells of `count` registers in one of the PTX manual's data movement shapes."""
    r, lane = np.arange(count)[:, None], np.arange(32)[None, :]
    rows: Any = lane // 4
    if shape == "32x32b":
        return Access(lane + 0 * r, r + 0 * lane, 32, ((0, count),), True)
    if shape == "16x32bx2":
        spans = ((0, count), (split, split + count))
        return Access(lane % 16 + 0 * r, r + split * (lane // 16), 16, spans)
    if shape == "16x64b":
        rows, columns = rows + 8 * (lane % 2), lane // 2 % 2 + 2 * r
    elif shape == "16x128b":
        rows, columns = rows + 8 * (r % 2), lane % 4 + 4 * (r // 2)
    else:  # 16x256b: an accumulator of mma.sync for each 8 columns
        rows, columns = rows + 8 * (r // 2 % 2), r % 2 + 2 * (lane % 4) + 8 * (r // 4)
    return Access(rows + 0 * r, columns, 16, ((0, int(columns.max()) + 1),))


_REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}


def _access_of(e: Emitter, ins: Instruction, items: int, more: tuple[Any, ...]) -> str:
    """The name of an ld's or st's Access; `more` are its operands behind address and values."""
    shape = ins.mods[3] if len(ins.mods) > 3 else ""
    known = len(ins.mods) == 6 and shape in _REGISTERS and ins.mods[4][0] == "x"
    if not known or ins.guard is not None:
        raise Unmodelled(e.text)
    split = 0
    if shape == "16x32bx2":
        offset = more[0] if more else None
        if not isinstance(offset, Imm):
            raise Unmodelled(e.text)
        split = offset.value
    if items != _REGISTERS[shape] * int(ins.mods[4][1:]):
        raise Unmodelled(e.text)
    return e.name_of(access(shape, items, split), "cells")


@instruction("tcgen05.ld")
def ld(e: Emitter, ins: Instruction) -> None:
    items = items_of(ins.operands[0])
    cells = _access_of(e, ins, len(items), ins.operands[2:])
    address = e.address(ins.operands[1], "u32")
    _ask_for_a_wait(e, ins)
    e.put_each(items, e.call(load, "g", address, cells, e.mask), "u32")


def _ask_for_a_wait(e: Emitter, ins: Instruction) -> None:
    if ins.line in e.program.unawaited:
        e.line(e.call(report_unawaited, "g", repr(e.program.unawaited[ins.line])))


def report_unawaited(g: Gang, register: str) -> None:
    if g.cta.machine.findings.fences:
        g.cta.machine.findings.report(
            Race(f"{register}, which a tcgen05.ld fills, is used before a tcgen05.wait::ld")
        )


@instruction("tcgen05.ld.red")
def ld_red(e: Emitter, ins: Instruction) -> None:
    """A load, and the least or greatest of a lane's values. NaN counts for nothing."""
    shape, number, operation = ins.mods[4], ins.mods[5], ins.mods[6:-1]
    known = shape == "32x32b" and ins.type == "f32" and operation in (("max",), ("min",))
    items = items_of(ins.operands[0])
    if not known or ins.guard is not None or len(items) != int(number[1:]):
        raise Unmodelled(e.text)
    address = e.address(ins.operands[2], "u32")
    cells = e.name_of(access(shape, len(items), 0), "cells")
    _ask_for_a_wait(e, ins)
    whole = e.temp(e.call(load, "g", address, cells, e.mask))
    e.put_each(items, whole, "u32")
    e.put(ins.operands[1], f"np.f{operation[0]}.reduce({whole}.view(D_f32))", "f32")


@instruction("tcgen05.st")
def st(e: Emitter, ins: Instruction) -> None:
    split = ins.has("16x32bx2")  # [address], offset, values
    items = items_of(ins.operands[2 if split else 1])
    cells = _access_of(e, ins, len(items), ins.operands[1:])
    address = e.address(ins.operands[0], "u32")
    values = ", ".join(e.get(item, "u32") for item in items)
    e.line(e.call(store, "g", address, f"({values},)", cells, e.mask))


@dataclass(frozen=True)
class Place:
    """Where a warp's access lies: its position, its lanes in the gang, the first cell."""

    position: int
    span: slice
    column: int
    low: int
    regions: list[Region]


def places(g: Gang, address: Any, cells: Access, mask: Any) -> list[Place]:
    """The place of each warp."""
    found = []
    table = np.broadcast_to(address, g.lanes)
    for position in whole_warps(g, mask):
        span = slice(32 * position, 32 * position + 32)
        if (table[span] != table[span.start]).any():
            raise TmemFault("a tcgen05 access whose address differs between lanes of a warp")
        at, quarter = int(table[span.start]), 32 * int(g.warps[position] % 4)
        if at >> 16 not in (quarter, quarter + 32 - cells.height):
            raise TmemFault(
                f"{g.name}: warp {int(g.warps[position])} may access lanes {quarter} .. "
                f"{quarter + 31}, not {cells.height} from lane {at >> 16} on"
            )
        column, low = at & 0xFFFF, at >> 16
        regions = [Region(column + a, column + b, low, low + cells.height) for a, b in cells.spans]
        found.append(Place(position, span, column, low, regions))
    return found


def _order(g: Gang, place: Place, region: Region, writes: bool) -> None:
    """Look for what orders an access behind those of others, the fences included."""
    what, warp = f"a tcgen05.{'st' if writes else 'ld'}", int(g.warps[place.position])
    races, watch = tensor_memory(g.cta).races, fences_of(g.cta)
    if watch is not None:
        watch.check((g.cta.rank, warp), g.cta.rank, region, writes, what)
    if races is not None:
        kind = STORE if writes else LOAD
        races.access(kind, g.cta.agent(warp), region, writes, what)
    if watch is not None:
        watch.log((g.cta.rank, warp), g.cta.rank, region, writes)


def load(g: Gang, address: Any, cells: Access, mask: Any) -> np.ndarray:
    memory, count = tensor_memory(g.cta), len(cells.rows)
    result = np.zeros((count, g.lanes), np.uint32)
    for place in places(g, address, cells, mask):
        for region in place.regions:
            memory.check(region, False, "a tcgen05.ld")
            _order(g, place, region, False)
        if cells.plain:
            columns = slice(place.column, place.column + count)
            result[:, place.span] = memory.data[columns, place.low : place.low + 32]
        else:
            index = place.column + cells.columns, place.low + cells.rows
            result[:, place.span] = memory.data[index]
    return result


def store(g: Gang, address: Any, values: tuple[Any, ...], cells: Access, mask: Any) -> None:
    memory = tensor_memory(g.cta)
    targets = places(g, address, cells, mask)

    def run() -> None:
        table = np.empty((len(values), g_lanes), np.uint32)
        for index, value in enumerate(values):
            table[index] = value
        for place in targets:
            if cells.plain:
                columns = slice(place.column, place.column + len(values))
                memory.data[columns, place.low : place.low + 32] = table[:, place.span]
            else:
                where = place.column + cells.columns, place.low + cells.rows
                memory.data[where] = table[:, place.span]

    g_lanes = g.lanes
    op = AsyncOp("tcgen05.st", run, owner=g.cta)
    for place in targets:
        for region in place.regions:
            memory.check(region, True, "a tcgen05.st")
            _order(g, place, region, True)
            memory.fly(op, region, True)
        memory.stores.setdefault(int(g.warps[place.position]), []).append(op)
    if targets:
        g.cta.machine.queue.add(op)


@instruction("tcgen05.wait::st")
def wait_st(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_wait_st, "g", e.mask))


def run_wait_st(g: Gang, mask: Any) -> None:
    memory = tensor_memory(g.cta)
    for position in whole_warps(g, mask):
        warp = int(g.warps[position])
        g.cta.machine.queue.finish(memory.stores.pop(warp, ()))
        if memory.races is not None:
            memory.races.clocks.waited(STORE, g.cta.agent(warp))


@instruction("tcgen05.wait::ld")
def wait_ld(e: Emitter, ins: Instruction) -> None:
    """Loads have taken effect when they were issued; sessions may ask for the wait."""
    e.line(e.call(run_wait_ld, "g", e.mask))


def run_wait_ld(g: Gang, mask: Any) -> None:
    races = tensor_memory(g.cta).races
    if races is not None:
        for position in whole_warps(g, mask):
            races.clocks.waited(LOAD, g.cta.agent(int(g.warps[position])))


@instruction("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def fence(e: Emitter, ins: Instruction) -> None:
    """What they order takes effect in order here; sessions may look for them."""
    e.line(e.call(run_fence, "g", str(ins.has("fence::before_thread_sync")), e.mask))


def run_fence(g: Gang, before: bool, mask: Any) -> None:
    watch = fences_of(g.cta)
    if watch is not None:
        for position in whole_warps(g, mask):
            watch.fence((g.cta.rank, int(g.warps[position])), before)
            if g.cta.race is not None:
                clocks_of(g.cta).fence(g.cta.agent(int(g.warps[position])), before)


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
        homes = [g.cta.locate(name)[0] for name in names]
        barriers = [g.cta.mbarrier(name) for name in names]
        for barrier in barriers:
            barrier.check_fenced("a tcgen05.commit")
        warp = int(g.warps[lane // 32])
        before = (memory.pipes[warp],) if warp in memory.pipes else ()
        run = _arrive(list(zip(homes, barriers, strict=True)), g.cta, warp)
        memory.pipes[warp] = queue.add(AsyncOp("tcgen05.commit", run, before))


def _arrive(targets: list[tuple[Any, Any]], cta: Any, warp: int) -> Any:
    race, watch = cta.race, fences_of(cta)
    known = None if race is None else race.depart(warp)
    memory = tensor_memory(cta)
    if memory.races is not None:
        memory.races.clocks.committed(cta.agent(warp), known)
    reading = memory.reading.pop(warp, [])

    def run() -> None:
        if watch is not None:
            watch.fence((cta.rank, warp), True)
        for home, barrier in targets:
            if watch is not None and home.ended and home is not cta:
                cta.machine.findings.report(
                    BarrierFault(f"a tcgen05.commit arrives at the {barrier.name}, which has ended")
                )
            if race is not None and known is not None:
                race.products_arrive(barrier, known, reading)
            barrier.arrive()

    return run

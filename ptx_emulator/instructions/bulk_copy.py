"""cp.async.bulk with and without tensor maps: loads that complete on an mbarrier, stores and
reductions that complete in bulk groups.

A load's destination is undefined from the issue on; a store reads its source when a wait for the
read demands it at the latest. Both finish as late as the program allows, or when the schedule says.
"""

from typing import Any

import numpy as np

from ..check.races import WORD, Copy
from ..findings import Misaligned, Unmodelled
from ..launch.tensormap import TensorMap, decode
from ..machine import tma
from ..machine.async_ops import AsyncOp
from ..machine.barriers import MBarrier
from ..machine.gang import Gang
from ..machine.memory import DEFINED, IN_FLIGHT, PARAM_BASE, SharedMemory
from ..ptx.emit import Emitter
from ..ptx.syntax import Address, Imm, Instruction
from .memory import lanes_of
from .registry import instruction


def issuing(g: Gang, mask: Any) -> np.ndarray:
    """Lanes that issue the operation: usually one."""
    lanes = lanes_of(g, mask)
    return np.arange(g.lanes) if lanes is None else lanes


def count(g: Gang, lane: int, nbytes: int) -> None:
    """Add to what the warp of a lane let TMA move."""
    g.cta.machine.traffic["tma"][g.warps[lane // 32]] += nbytes


def at_lane(value: Any, lane: int) -> int:
    return int(value[lane]) if isinstance(value, np.ndarray) and value.ndim else int(value)


def tensor_map(g: Gang, address: int) -> TensorMap:
    """The map at a generic address, in parameter or global memory."""
    if address >> 56 == PARAM_BASE >> 56:
        start = address - PARAM_BASE
        return decode(g.cta.machine.params[start : start + 64].tobytes())
    return decode(g.cta.machine.memory.read(address, 64))


@instruction("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor")
def tensor_copy(e: Emitter, ins: Instruction) -> None:
    if ins.has("im2col", "tile::gather4", "tile::scatter4") or any(
        m.startswith("im2col") for m in ins.mods
    ):
        raise Unmodelled(e.text)
    first = ins.operands[0]
    assert isinstance(first, Address)
    if first.coords:
        _emit_store(e, ins, first)
    else:
        _emit_load(e, ins)


def _coords(e: Emitter, operand: Address) -> str:
    return "(" + "".join(e.get(c, "s32") + ", " for c in operand.coords) + ")"


def _emit_load(e: Emitter, ins: Instruction) -> None:
    target, source, barrier, *rest = ins.operands
    assert isinstance(source, Address)
    multicast = e.get(rest[0], "u16") if ins.has("multicast::cluster") else "None"
    names = (
        e.address(target, "u32"),
        e.address(Address(source.base, source.offset), "u64"),
        _coords(e, source),
        e.address(barrier, "u32"),
    )
    pair = str(ins.has("cta_group::2"))
    e.line(e.call(issue_load, "g", f"({', '.join(names)})", multicast, pair, e.mask))


def _emit_store(e: Emitter, ins: Instruction, target: Address) -> None:
    operation = "'add'" if "reduce" in ins.mods else "None"
    if ins.opcode == "cp" and "reduce" in ins.mods and not ins.has("add"):
        raise Unmodelled(e.text)
    names = (
        e.address(Address(target.base, target.offset), "u64"),
        _coords(e, target),
        e.address(ins.operands[1], "u32"),
    )
    e.line(e.call(issue_store, "g", f"({', '.join(names)})", operation, e.mask))


def issue_load(g: Gang, operands: tuple[Any, ...], multicast: Any, pair: bool, mask: Any) -> None:
    """Tiled load into this CTA, or into each CTA of a multicast mask."""
    target, source, coords, barrier = operands
    for lane in issuing(g, mask):
        tensor = tensor_map(g, at_lane(source, lane))
        at = tuple(at_lane(c, lane) for c in coords)
        tma.check_map(tensor, at)
        note_box(g, tensor, at, False)
        cta, offset = g.cta.locate(at_lane(target, lane))
        home, bar_offset = g.cta.locate(at_lane(barrier, lane))
        if multicast is None:
            places = [(cta, home)]
        else:
            ranks = [r for r in range(16) if at_lane(multicast, lane) >> r & 1]
            peers = [g.cta.peers[r] for r in ranks]
            places = [
                (p, g.cta.peers[p.rank & ~1] if pair and home.rank % 2 == 0 else p) for p in peers
            ]
        for place, owner in places:
            if pair and multicast is None:
                owner = home
            tma.check_destination(place.smem, offset, tensor.footprint)
            units = tma.units_of(tensor, offset)
            place.smem.shadow.reshape(-1, 16)[units] = IN_FLIGHT
            signal = owner.mbarrier((owner.rank << 24) | bar_offset)
            signal.check_fenced("a TMA load")
            run = _load(g, (tensor, at), (place.smem, offset), signal)
            op = AsyncOp("TMA load", run, owner=place)
            count(g, int(lane), tensor.box_bytes)
            op.mark = note_load(g, int(lane), units, place)
            g.cta.machine.queue.add(told(op, g, signal))


def note_box(g: Gang, tensor: TensorMap, at: tuple[int, ...], writes: bool) -> None:
    """Tell who watches global memory of a box that is read or written."""
    watch = g.cta.machine.global_watch
    found = tma.extent(tensor, at) if watch is not None else None
    if watch is not None and found is not None:
        watch.box(g.cta, *found, writes)


def note_bytes(g: Gang, start: int, nbytes: int, writes: bool) -> None:
    watch = g.cta.machine.global_watch
    if watch is not None:
        watch.box(g.cta, start, (nbytes,), (1,), writes)


def words_of(units: np.ndarray) -> np.ndarray:
    """The words, as the race checker counts, of 16-byte units."""
    return (units[:, None] * (16 // WORD) + np.arange(16 // WORD)).ravel()


def note_load(g: Gang, lane: int, units: np.ndarray, cta: Any) -> Copy | None:
    """Tell the race checker that a lane lets TMA write 16-byte units of a CTA's memory."""
    if g.cta.race is None:
        return None
    warps = g.warps[lane // 32 : lane // 32 + 1]
    words = words_of(units)[None] + g.cta.words_to(cta)
    return g.cta.race.issue_write(warps, words, "a TMA load", True)


def note_store(g: Gang, lane: int, units: np.ndarray) -> Copy | None:
    """Tell the race checker that a lane lets TMA read 16-byte units of shared memory."""
    if g.cta.race is None:
        return None
    warp = int(g.warps[lane // 32])
    return g.cta.race.issue_read(warp, words_of(units), "a TMA store")


def told(op: AsyncOp, g: Gang, signal: MBarrier) -> AsyncOp:
    """The load with word to the race checker before its barrier counts it."""
    race, run = g.cta.race, op.run
    if race is None:
        return op

    def told() -> None:
        race.written_for(op.mark, signal)
        run()

    op.run = told
    return op


def _load(g: Gang, source: tuple[Any, Any], target: tuple[Any, int], signal: MBarrier) -> Any:
    tensor, at = source
    smem, offset = target
    memory = g.cta.machine.memory

    def run() -> None:
        tma.put_box(smem, tensor, offset, tma.read_box(memory, tensor, at))
        signal.complete(tensor.box_bytes)

    return run


def issue_store(g: Gang, operands: tuple[Any, ...], operation: str | None, mask: Any) -> None:
    """Tiled store, or reduction, from this CTA's shared memory."""
    target, coords, source = operands
    memory = g.cta.machine.memory
    counted: set[tuple[Any, ...]] = set()
    for lane in issuing(g, mask):
        tensor = tensor_map(g, at_lane(target, lane))
        at = tuple(at_lane(c, lane) for c in coords)
        tma.check_map(tensor, at)
        cta, offset = g.cta.locate(at_lane(source, lane))
        tma.check_destination(cta.smem, offset, tensor.footprint)
        op = AsyncOp("TMA store", _nothing, owner=g.cta)
        if (lane // 32, offset, at) not in counted:  # a warp's store is issued once
            counted.add((lane // 32, offset, at))
            count(g, int(lane), tensor.box_bytes)
        op.mark = note_store(g, int(lane), tma.units_of(tensor, offset))
        if operation is None:  # reductions are atomic
            note_box(g, tensor, at, True)
        _bind_store(op, (memory, cta.smem), (tensor, at, offset), operation)
        g.bulk.append(g.cta.machine.queue.add(op))


def _nothing() -> None:
    """Replaced when an operation is bound to its data."""


def _bind_store(op: AsyncOp, memories: Any, what: Any, operation: str | None) -> None:
    memory, smem = memories
    tensor, at, offset = what
    held: list[np.ndarray] = []

    def read() -> None:
        smem.gather(tma.units_of(tensor, offset) * 16, np.dtype("V16"), 1)
        held.append(tma.take_box(smem, tensor, offset).copy())

    def run() -> None:
        box = held[0]
        if operation == "add":
            box = add_elements(tma.read_box(memory, tensor, at), box, tensor.element)
        tma.write_box(memory, tensor, at, box)

    op.read, op.run = read, run


def _check_defined(smem: SharedMemory, offset: int, nbytes: int) -> None:
    smem.gather(np.arange(offset, offset + nbytes, 16), np.dtype("V16"), 1)


def add_elements(old: np.ndarray, new: np.ndarray, element: str) -> np.ndarray:
    """Element-wise sum of two byte arrays that hold `element`s."""
    kinds = {"f32": np.float32, "u32": np.uint32, "s32": np.int32, "f16": np.float16}
    if element not in kinds:
        raise Unmodelled(f"a bulk reduction of {element}")
    total = old.view(kinds[element]) + new.view(kinds[element])
    return np.ascontiguousarray(total).view(np.uint8)


# ---- without a tensor map ----
@instruction("cp.async.bulk", "cp.reduce.async.bulk")
def flat_copy(e: Emitter, ins: Instruction) -> None:
    target, source, size, *rest = ins.operands
    if ins.has("multicast::cluster") or ins.has("cp_mask"):
        raise Unmodelled(e.text)
    to_global = ins.mods[ins.mods.index("bulk") + 1].startswith("global")
    nbytes = e.get(size, "u32")
    if to_global:
        operation = repr(ins.type) if "reduce" in ins.mods else "None"
        if "reduce" in ins.mods and not ins.has("add"):
            raise Unmodelled(e.text)
        names = f"({e.address(target, 'u64')}, {e.address(source, 'u32')}, {nbytes})"
        e.line(e.call(issue_flat_store, "g", names, operation, e.mask))
        return
    if "reduce" in ins.mods:
        raise Unmodelled(e.text)
    from_global = ins.has("global")
    origin = e.address(source, "u64" if from_global else "u32")
    names = f"({e.address(target, 'u32')}, {origin}, {nbytes}, {e.address(rest[0], 'u32')})"
    e.line(e.call(issue_flat_load, "g", names, str(from_global), e.mask))


def issue_flat_load(g: Gang, operands: tuple[Any, ...], from_global: bool, mask: Any) -> None:
    for lane in issuing(g, mask):
        target, source, nbytes, barrier = (at_lane(o, lane) for o in operands)
        if nbytes % 16 or target % 16 or source % 16:
            raise Misaligned("cp.async.bulk: addresses and size must be multiples of 16 bytes")
        if from_global:
            g.cta.machine.memory.check(np.array([source], np.uint64), nbytes, 16, "cp.async.bulk")
            note_bytes(g, source, nbytes, False)
        cta, offset = g.cta.locate(target)
        cta.smem.check(np.array([offset]), nbytes, 1, "cp.async.bulk")
        cta.smem.shadow[offset : offset + nbytes] = IN_FLIGHT
        run = _flat_load(g, (cta.smem, offset), (source, nbytes, from_global), barrier)
        op = AsyncOp("bulk load", run, owner=cta)
        count(g, int(lane), nbytes)
        op.mark = note_load(g, int(lane), np.arange(offset // 16, (offset + nbytes) // 16), cta)
        g.cta.machine.queue.add(told(op, g, g.cta.mbarrier(barrier)))


def _flat_load(g: Gang, target: Any, source: Any, barrier: int) -> Any:
    smem, offset = target
    address, nbytes, from_global = source
    signal = g.cta.mbarrier(barrier)
    signal.check_fenced("a bulk load")

    def run() -> None:
        if from_global:
            data = np.frombuffer(g.cta.machine.memory.read(address, nbytes), np.uint8)
        else:
            origin, at = g.cta.locate(address)
            _check_defined(origin.smem, at, nbytes)
            data = origin.smem.bytes[at : at + nbytes].copy()
        smem.bytes[offset : offset + nbytes] = data
        smem.shadow[offset : offset + nbytes] = DEFINED
        signal.complete(nbytes)

    return run


def issue_flat_store(g: Gang, operands: tuple[Any, ...], kind: str | None, mask: Any) -> None:
    for lane in issuing(g, mask):
        target, source, nbytes = (at_lane(o, lane) for o in operands)
        if nbytes % 16 or target % 16 or source % 16:
            raise Misaligned("cp.async.bulk: addresses and size must be multiples of 16 bytes")
        cta, offset = g.cta.locate(source & 0xFFFFFFFF)
        cta.smem.check(np.array([offset]), nbytes, 1, "cp.async.bulk")
        op = AsyncOp("bulk store", _nothing, owner=g.cta)
        count(g, int(lane), nbytes)
        op.mark = note_store(g, int(lane), np.arange(offset // 16, (offset + nbytes) // 16))
        if kind is None:
            note_bytes(g, target, nbytes, True)
        _bind_flat_store(op, g, (target, cta.smem, offset, nbytes), kind)
        g.bulk.append(g.cta.machine.queue.add(op))


def _bind_flat_store(op: AsyncOp, g: Gang, what: Any, kind: str | None) -> None:
    target, smem, offset, nbytes = what
    memory = g.cta.machine.memory
    memory.check(np.array([target], np.uint64), nbytes, 16, "cp.async.bulk")
    held: list[np.ndarray] = []

    def read() -> None:
        _check_defined(smem, offset, nbytes)
        held.append(smem.bytes[offset : offset + nbytes].copy())

    def run() -> None:
        part = memory.bytes[target - 4096 : target - 4096 + nbytes]
        part[:] = held[0] if kind is None else add_elements(part, held[0], kind)

    op.read, op.run = read, run


# ---- bulk groups ----
@instruction("cp.async.bulk.commit_group")
def commit(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_commit, "g"))


def run_commit(g: Gang) -> None:
    g.bulk_groups.append(g.bulk)
    g.bulk = []


@instruction("cp.async.bulk.wait_group")
def wait_group(e: Emitter, ins: Instruction) -> None:
    count = ins.operands[0]
    assert isinstance(count, Imm)
    e.line(e.call(run_wait, "g", str(count.value), str(ins.has("read"))))


def run_wait(g: Gang, keep: int, read: bool) -> None:
    finished = g.bulk_groups[: len(g.bulk_groups) - keep] if keep else g.bulk_groups
    for group in finished:
        if g.cta.race is not None:
            for op in group:
                g.cta.race.was_read(op.mark, g.warps)
        if read:
            for op in group:
                g.cta.machine.queue.finish_read(op)
        else:
            g.cta.machine.queue.finish(group)
    if not read:
        g.bulk_groups = g.bulk_groups[-keep:] if keep else []

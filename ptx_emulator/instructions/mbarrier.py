"""mbarrier objects: init, arrivals, transaction counts, tests and waits."""

from typing import Any

import numpy as np

from ..check.races import active_warps
from ..findings import Unmodelled
from ..machine.gang import Gang
from ..machine.memory import SHARED_BASE, UNWRITTEN
from ..ptx.emit import Emitter
from ..ptx.syntax import Address, Instruction
from .memory import lanes_of
from .registry import instruction


def shared_address(e: Emitter, operand: Any) -> str:
    """A barrier's address as a shared one, whether given as shared or as generic."""
    assert isinstance(operand, Address)
    assert e.instruction is not None
    if any(mod.startswith("shared") for mod in e.instruction.mods):
        return e.address(operand, "u32")
    return e.temp(f"({e.address(operand, 'u64')} - {e.const(SHARED_BASE, 'u64')}).astype(D_u32)")


def grouped(g: Gang, address: Any, mask: Any) -> list[tuple[int, int]]:
    """(address, number of active lanes that name it)."""
    lanes = lanes_of(g, mask)
    if not (isinstance(address, np.ndarray) and address.ndim):
        return [(int(address), g.lanes if lanes is None else len(lanes))]
    some = address if lanes is None else address[lanes]
    if len(some) and (some == some[0]).all():
        return [(int(some[0]), len(some))]
    names, counts = np.unique(some, return_counts=True)
    return [(int(n), int(c)) for n, c in zip(names, counts, strict=True)]


def naming(g: Gang, address: Any, at: int, mask: Any) -> np.ndarray:
    """The warps with an active lane whose address is `at`."""
    lanes = lanes_of(g, mask)
    if isinstance(address, np.ndarray) and address.ndim:
        lanes = np.arange(g.lanes) if lanes is None else lanes
        lanes = lanes[address[lanes] == at]
    return active_warps(g, lanes)


def uniform(g: Gang, value: Any, mask: Any, what: str) -> int:
    """The one value of all active lanes."""
    if not (isinstance(value, np.ndarray) and value.ndim):
        return int(value)
    lanes = lanes_of(g, mask)
    some = value if lanes is None else value[lanes]
    if len(some) == 0:
        return 0
    if (some != some[0]).any():
        raise Unmodelled(f"{what} differs between lanes of one gang")
    return int(some[0])


@instruction("mbarrier.init")
def init(e: Emitter, ins: Instruction) -> None:
    address, count = shared_address(e, ins.operands[0]), e.get(ins.operands[1], "u32")
    e.line(e.call(run_init, "g", address, count, e.mask))


def run_init(g: Gang, address: Any, count: Any, mask: Any) -> None:
    for at, lanes in grouped(g, address, mask):
        if lanes:
            g.cta.init_mbarrier(at, uniform(g, count, mask, "an mbarrier's count"))
            barrier = g.cta.mbarrier(at)
            maker = int(naming(g, address, at, mask)[0])
            barrier.maker = maker
            g.cta.unfenced.append(barrier)
            if g.cta.race is not None:
                g.cta.race.initialised(barrier, maker)


@instruction("mbarrier.inval")
def inval(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_inval, "g", shared_address(e, ins.operands[0]), e.mask))


def run_inval(g: Gang, address: Any, mask: Any) -> None:
    for at, lanes in grouped(g, address, mask):
        if lanes:
            g.cta.mbarrier(at)
            cta, offset = g.cta.locate(at)
            del cta.mbarriers[offset]
            cta.smem.shadow[offset : offset + 8] = UNWRITTEN


@instruction("mbarrier.arrive", "mbarrier.arrive_drop")
def arrive(e: Emitter, ins: Instruction) -> None:
    operands = list(ins.operands)
    if ins.opcode == "mbarrier" and ins.has("arrive_drop"):
        raise Unmodelled(e.text)
    target = None if isinstance(operands[0], Address) else operands.pop(0)
    address = shared_address(e, operands.pop(0))
    second = (
        e.get(operands[0], "u32") if operands else e.const(0 if ins.has("expect_tx") else 1, "u32")
    )
    function = run_arrive_expect if ins.has("expect_tx") else run_arrive
    if target is None:
        e.line(e.call(function, "g", address, second, e.mask))
    else:
        e.put(target, e.call(function, "g", address, second, e.mask), "u64")


def run_arrive(g: Gang, address: Any, count: Any, mask: Any) -> Any:
    """Arrive; the state returned is the phase that was going on."""
    state = np.uint64(0)
    for at, lanes in grouped(g, address, mask):
        if lanes:
            barrier = g.cta.mbarrier(at)
            state = np.uint64(barrier.phase)
            number = lanes * uniform(g, count, mask, "an arrival's count")
            warps = naming(g, address, at, mask)
            at_once = 32 if lanes == 32 * len(warps) else 1
            turns = [warps]
            if number > barrier.pending and lanes == at_once * len(warps):
                # One after the other: who comes behind the end of a phase is not waited for in it.
                turns = list(warps[:, None])
            for some in turns:
                if g.cta.race is not None:
                    g.cta.race.release(barrier, some, number // len(turns))
                barrier.arrive(number // len(turns), at_once)
    return state


def run_arrive_expect(g: Gang, address: Any, nbytes: Any, mask: Any) -> Any:
    state = np.uint64(0)
    for at, lanes in grouped(g, address, mask):
        if lanes:
            barrier = g.cta.mbarrier(at)
            state = np.uint64(barrier.phase)
            total = nbytes if not isinstance(nbytes, np.ndarray) else nbytes[lanes_of(g, mask)]
            barrier.expect(int(np.sum(total)) if np.ndim(total) else int(total) * lanes)
            if g.cta.race is not None:
                g.cta.race.release(barrier, naming(g, address, at, mask), lanes)
            barrier.arrive(lanes)
    return state


@instruction("mbarrier.expect_tx", "mbarrier.complete_tx")
def transaction(e: Emitter, ins: Instruction) -> None:
    address, nbytes = shared_address(e, ins.operands[0]), e.get(ins.operands[1], "u32")
    sign = "1" if ins.has("expect_tx") else "-1"
    e.line(e.call(run_transaction, "g", address, nbytes, sign, e.mask))


def run_transaction(g: Gang, address: Any, nbytes: Any, sign: int, mask: Any) -> None:
    for at, lanes in grouped(g, address, mask):
        if not lanes:
            continue
        barrier = g.cta.mbarrier(at)
        amount = lanes * uniform(g, nbytes, mask, "a transaction's size")
        if sign > 0:
            barrier.expect(amount)
        else:
            barrier.complete(amount)


@instruction("mbarrier.try_wait", "mbarrier.test_wait")
def wait(e: Emitter, ins: Instruction) -> None:
    target, where, state = ins.operands[:3]
    address = shared_address(e, where)
    by_parity = ins.has("parity")
    wanted = e.get(state, "u32" if by_parity else "u64")
    e.put(target, e.call(run_wait, "g", address, wanted, str(by_parity), e.mask), "b1")


def run_wait(g: Gang, address: Any, wanted: Any, by_parity: bool, mask: Any) -> Any:
    """Whether the phase is over, a lane; barriers whose phase is not go to g.awaited."""
    g.awaited.clear()
    lanes = lanes_of(g, mask)
    if lanes is not None and len(lanes) == 0:
        return np.False_
    where = np.unique(address if lanes is None or not np.ndim(address) else address[lanes])
    if len(where) == 1 and not np.ndim(wanted):
        return np.bool_(_over(g, int(where[0]), int(wanted), by_parity, lanes))
    addresses = np.broadcast_to(address, g.lanes)
    values = np.broadcast_to(wanted, g.lanes)
    result = np.zeros(g.lanes, np.bool_)
    active = np.arange(g.lanes) if lanes is None else lanes
    pairs = np.stack([addresses[active].astype(np.int64), values[active].astype(np.int64)])
    for at, value in np.unique(pairs, axis=1).T:
        asking = active[(pairs[0] == at) & (pairs[1] == value)]
        result[asking] = _over(g, int(at), int(value), by_parity, asking)
    return result


def _over(g: Gang, at: int, wanted: int, by_parity: bool, lanes: np.ndarray | None) -> bool:
    barrier = g.cta.mbarrier(at)
    over = barrier.parity != wanted & 1 if by_parity else barrier.phase != wanted
    if not over:
        g.awaited.append((barrier, wanted))
    elif g.cta.race is not None:
        g.cta.race.acquire(barrier, active_warps(g, lanes))
    return over


@instruction("mbarrier.pending_count")
def pending_count(e: Emitter, ins: Instruction) -> None:
    raise Unmodelled(e.text)

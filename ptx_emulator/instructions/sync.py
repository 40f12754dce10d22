"""Named barriers, cluster barriers, fences, register pools and grid dependencies."""

from typing import Any

import numpy as np

from ..check.races import active_warps
from ..findings import BarrierFault, EmulationError, Unmodelled
from ..machine.barriers import MBarrier, NamedBarrier
from ..machine.gang import Gang
from ..machine.memory import RANK_SHIFT
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction
from .mbarrier import uniform
from .memory import lanes_of
from .registry import instruction
from .warp import by_warp


@instruction("bar", "barrier")
def bar(e: Emitter, ins: Instruction) -> None:
    if ins.has("warp"):
        return
    if ins.has("red"):
        raise Unmodelled(e.text)
    index = e.get(ins.operands[0], "u32")
    count = e.get(ins.operands[1], "u32") if len(ins.operands) > 1 else "None"
    if ins.has("arrive"):
        e.line(e.call(run_arrive, "g", index, count, e.mask))
        return
    here, after = str(e.block.index), str(e.block.targets[0])
    e.leave(e.call(run_sync, "g", index, count, e.mask, here, after))


def threads_of(g: Gang, mask: Any) -> int:
    """Threads that a barrier counts: whole warps."""
    if mask is None:
        return g.lanes
    return 32 * int(np.count_nonzero(by_warp(g, True, mask).any(axis=1)))


def expected_of(g: Gang, count: Any, mask: Any) -> int:
    if count is None:
        return g.cta.machine.num_warps * 32
    number = uniform(g, count, mask, "a barrier's thread count")
    if number % 32 or number == 0:
        raise BarrierFault(f"a barrier for {number} threads: not a multiple of 32")
    return number


def run_arrive(g: Gang, index: Any, count: Any, mask: Any) -> None:
    lanes = lanes_of(g, mask)
    numbers = np.broadcast_to(index, g.lanes)[::32]
    for number in np.unique(numbers):
        part = np.repeat(numbers == number, 32)
        if lanes is not None:
            part = part & np.isin(np.arange(g.lanes), lanes)
        threads = threads_of(g, part)
        if threads:
            _arrive(g, g.cta.named_barrier(int(number)), threads, expected_of(g, count, mask))


def _arrive(
    g: Gang, barrier: NamedBarrier, threads: int, expected: int, waits: bool = False
) -> bool:
    """Count `threads` of the gang; True when that completes the barrier."""
    race, waiting = g.cta.race, list(barrier.waiting)
    if race is not None:
        race.release(barrier, g.warps)
    complete = barrier.arrive(threads, expected)
    if complete and race is not None:
        race.named_over(barrier, [*waiting, g] if waits else waiting)
    return complete


def run_sync(g: Gang, index: Any, count: Any, mask: Any, here: int, after: int) -> int:
    """Arrive and wait. Of a gang whose warps name different barriers, those like the first do.

    The others come again on their own: had all to come again, they would meet and part for ever.
    """
    if np.ndim(index):
        parted = g.part_by(index, here)
        if parted is not None and mask is not None:
            return parted
        index, count = index[0], count[0] if np.ndim(count) else count
    threads = threads_of(g, mask)
    if threads == 0:
        return after
    barrier = g.cta.named_barrier(int(index))
    if _arrive(g, barrier, threads, expected_of(g, count, mask), waits=True):
        return after
    barrier.waiting.append(g)
    return g.block(
        after, f"bar {int(index)} ({barrier.arrived} of {barrier.expected} threads arrived)"
    )


# ---- clusters ----
@instruction("barrier.cluster.arrive")
def cluster_arrive(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_cluster_arrive, "g", e.mask))


def cluster_barrier(g: Gang) -> MBarrier:
    leader = g.cta.peers[0]
    if "cluster" not in leader.state:
        threads = g.cta.machine.num_warps * 32 * len(g.cta.peers)
        name = f"barrier.cluster of CTA {leader.ctaid}"
        leader.state["cluster"] = MBarrier(name, threads, watch=leader.race)
    return leader.state["cluster"]


def run_cluster_arrive(g: Gang, mask: Any) -> None:
    barrier = cluster_barrier(g)
    g.cluster_phase = barrier.phase
    threads = threads_of(g, mask)
    if g.cta.race is not None:
        g.cta.race.release(barrier, active_warps(g, lanes_of(g, mask)), threads)
    barrier.arrive(threads)


@instruction("barrier.cluster.wait")
def cluster_wait(e: Emitter, ins: Instruction) -> None:
    e.leave(e.call(run_cluster_wait, "g", str(e.block.index), str(e.block.targets[0])))


def run_cluster_wait(g: Gang, here: int, after: int) -> int:
    barrier = cluster_barrier(g)
    if barrier.phase != g.cluster_phase:
        if g.cta.race is not None:
            g.cta.race.acquire(barrier, g.warps)
        return after
    g.wait_for([(barrier, g.cluster_phase & 1)])
    return g.block(here, barrier.describe())


@instruction("mapa")
def mapa(e: Emitter, ins: Instruction) -> None:
    """The same offset in the CTA of another rank."""
    target, address, rank = ins.operands
    if not ins.has("shared::cluster"):
        raise Unmodelled(e.text)
    offset = f"({e.get(address, 'u32')} & {e.const((1 << RANK_SHIFT) - 1, 'u32')})"
    shift = e.const(RANK_SHIFT, "u32")
    e.put(target, f"{offset} | ({e.get(rank, 'u32')} << {shift})", "u32")


@instruction("getctarank")
def getctarank(e: Emitter, ins: Instruction) -> None:
    address = e.get(ins.operands[1], "u32")
    e.put(ins.operands[0], f"{address} >> {e.const(RANK_SHIFT, 'u32')}", "u32")


# ---- fences and the rest: what they order is the race checker's business ----
@instruction("fence", "membar")
def fence(e: Emitter, ins: Instruction) -> None:
    """Memory is sequentially consistent here; the race checker follows the proxy fences."""
    proxy = ins.has("proxy") and ins.has("async")
    orders = ins.opcode == "membar" or ins.has("acq_rel", "sc", "release")
    if orders and ins.has("gl", "gpu", "sys"):
        e.line(e.call(run_wide_fence, "g"))
    if proxy or ins.has("mbarrier_init"):
        e.line(e.call(run_fence, "g", str(proxy), e.mask))


def run_wide_fence(g: Gang) -> None:
    if g.cta.machine.global_watch is not None:
        g.cta.machine.global_watch.fence(g.cta)


def run_fence(g: Gang, proxy: bool, mask: Any) -> None:
    """The async proxy sees the barriers that the warps initialised; if `proxy`, all they wrote."""
    warps = active_warps(g, lanes_of(g, mask))
    for barrier in g.cta.unfenced:
        barrier.maker = None if barrier.maker in warps else barrier.maker
    g.cta.unfenced = [barrier for barrier in g.cta.unfenced if barrier.maker is not None]
    if proxy and g.cta.race is not None:
        g.cta.race.fence_proxy(warps)


@instruction("griddepcontrol", "nanosleep", "pmevent")
def no_effect(e: Emitter, ins: Instruction) -> None:
    """Launches run one after the other; check/global_memory.py asks what comes before a wait."""
    if ins.opcode == "griddepcontrol" and ins.has("wait"):
        e.line(e.call(run_grid_wait, "g"))
        e.leave(str(e.block.targets[0]))


def run_grid_wait(g: Gang) -> None:
    if g.cta.machine.global_watch is not None:
        g.cta.machine.global_watch.wait(g.cta)


class Trap(EmulationError):
    kind = "trap"


@instruction("trap", "brkpt")
def trap(e: Emitter, ins: Instruction) -> None:
    e.line(e.call(run_trap, "g", e.mask))


def run_trap(g: Gang, mask: Any) -> None:
    lanes = lanes_of(g, mask)
    if lanes is None or len(lanes):
        raise Trap("the kernel executed trap")

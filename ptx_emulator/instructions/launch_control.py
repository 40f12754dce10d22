"""clusterlaunchcontrol: a running cluster takes over the place of one that has not started.

The response, 16 bytes, is written asynchronously and counted by an mbarrier; its bits are known to
query_cancel only: here the first CTA's x, y, z and whether there was one.
"""

from typing import Any

import numpy as np

from ..findings import LaunchFault, Misaligned, Unmodelled
from ..machine.async_ops import AsyncOp
from ..machine.gang import Gang
from ..machine.memory import DEFINED, IN_FLIGHT
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction, Reg
from .bulk_copy import at_lane, issuing, note_load, told
from .mbarrier import shared_address
from .memory import items_of
from .registry import instruction

NBYTES = 16


@instruction("clusterlaunchcontrol.try_cancel")
def try_cancel(e: Emitter, ins: Instruction) -> None:
    address, barrier = (shared_address(e, operand) for operand in ins.operands)
    everyone = str(ins.has("multicast::cluster::all"))
    e.line(e.call(issue, "g", address, barrier, everyone, e.mask))


def issue(g: Gang, address: Any, barrier: Any, everyone: bool, mask: Any) -> None:
    machine, first = g.cta.machine, g.cta.peers[0]
    for lane in issuing(g, mask):
        target, signal = at_lane(address, lane), at_lane(barrier, lane)
        if target % NBYTES:
            raise Misaligned(f"clusterlaunchcontrol.try_cancel to shared address {target:#x}")
        if first.state.get("grid is used up"):
            raise LaunchFault(f"{g.name} asks for another cluster after there was none left")
        home, offset = g.cta.locate(target)
        owner, at = g.cta.locate(signal)
        places = [(cta, cta) for cta in g.cta.peers] if everyone else [(home, owner)]
        answer: list[np.ndarray] = []
        for cta, counting in places:
            counts = counting.mbarrier((counting.rank << 24) | at)
            counts.check_fenced("clusterlaunchcontrol.try_cancel")
            cta.smem.check(np.array([offset]), NBYTES, NBYTES, "clusterlaunchcontrol.try_cancel")
            cta.smem.shadow[offset : offset + NBYTES] = IN_FLIGHT
            run = _respond(g, answer, (cta.smem, offset), counts)
            op = AsyncOp("clusterlaunchcontrol.try_cancel", run, owner=cta)
            op.mark = note_load(g, int(lane), np.array([offset // NBYTES]), cta)
            machine.queue.add(told(op, g, counts))


def _respond(g: Gang, answer: list[np.ndarray], place: tuple[Any, int], signal: Any) -> Any:
    smem, offset = place

    def run() -> None:
        if not answer:  # all CTAs of the cluster get the same one
            ctaid = g.cta.machine.cancel_cluster()
            g.cta.peers[0].state["grid is used up"] = ctaid is None
            answer.append(np.array([*(ctaid or (0, 0, 0)), ctaid is not None], np.uint32))
        smem.bytes[offset : offset + NBYTES] = answer[0].view(np.uint8)
        smem.shadow[offset : offset + NBYTES] = DEFINED
        signal.complete(NBYTES)

    return run


@instruction("clusterlaunchcontrol.query_cancel")
def query_cancel(e: Emitter, ins: Instruction) -> None:
    target, response = ins.operands
    pair = e.value(response).pair if isinstance(response, Reg) else None
    if pair is None:
        raise Unmodelled(e.text)
    low, high = (e.view(half, "u64") for half in pair)
    shift = e.const(32, "u64")
    parts = [low, f"({low} >> {shift})", high, f"({high} >> {shift})"]
    if ins.has("is_canceled"):
        e.put(target, f"{parts[3]} != {e.const(0, 'u64')}", "b1")
        return
    axis = next((m[-1] for m in ins.mods if m.startswith("get_first_ctaid::")), None)
    if axis is not None:
        e.put(target, f"{parts['xyz'.index(axis)]}.astype(D_u32)", "u32")
        return
    for item, part in zip(items_of(target), parts, strict=True):
        e.put(item, f"{part}.astype(D_u32)", "u32")

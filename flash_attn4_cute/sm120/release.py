"""Giving a slot of a ring back, once what was read from it is in registers.

In PTX, an arrival follows the loads before it. In machine code a load is over when its registers
are needed, and ptxas (13.0 to 13.4) issues the arrival ahead of that. On an H200 such an arrival
overtook `ldmatrix` that stood behind loads from global memory: TMA filled the slot before it was
read, in up to every launch of a shape. So a warp gives a slot back behind its next wait: ptxas
moves no arrival across the branch of a wait, and products in front of it have their operands.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import Int32, Int64

NONE = 0  # no address of a barrier


@cute.jit
def instead(held: Int32, slot: Any) -> Int32:
    """Free the slot that is held, now that `slot` has been waited for; `slot` is held instead."""
    free(held)
    return slot.barrier.toint()


@cute.jit
def free(held: Int32):
    """Arrive for this warp at the empty barrier of the slot that is held, if any."""
    if held != NONE and cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive(cute.make_ptr(Int64, held, cute.AddressSpace.smem))

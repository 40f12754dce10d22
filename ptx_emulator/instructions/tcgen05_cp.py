"""tcgen05.cp: rows of shared memory, laid out as a matrix descriptor says, to tensor memory.

It stands in the pipe of its warp, like a product, and is known to be over by a commit.

    128x256b, 128x128b           row i to lane i
    4x256b                       row i to lane 32 i
    64x128b.warpx2::02_13        row i to lanes i and 64 + i
    64x128b.warpx2::01_23        row i to lanes 64 (i / 32) + i % 32, and 32 further
    32x128b.warpx4               row i to lanes i, 32 + i, 64 + i, 96 + i
"""

from typing import Any

import numpy as np

from ..check.tmem_races import PIPE
from ..findings import TmemFault, Unmodelled
from ..machine.async_ops import AsyncOp
from ..machine.descriptors import MatrixDescriptor, decode, read_units, units
from ..machine.gang import Gang
from ..machine.tmem import Region
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction
from .bulk_copy import at_lane, issuing
from .registry import instruction
from .tcgen05 import group_of, tensor_memory

_HALF = np.arange(64)
_QUARTER = np.arange(32)
# rows -> lanes, one array a replica
_LANES: dict[tuple[str, ...], list[np.ndarray]] = {
    ("128x256b",): [np.arange(128)],
    ("128x128b",): [np.arange(128)],
    ("4x256b",): [32 * np.arange(4)],
    ("64x128b", "warpx2::02_13"): [_HALF, 64 + _HALF],
    ("64x128b", "warpx2::01_23"): [
        64 * (_HALF // 32) + _HALF % 32 + further for further in (0, 32)
    ],
    ("32x128b", "warpx4"): [_QUARTER + 32 * i for i in range(4)],
}


@instruction("tcgen05.cp")
def cp(e: Emitter, ins: Instruction) -> None:
    shape = ins.mods[2:]
    if shape not in _LANES:
        raise Unmodelled(e.text)
    address, descriptor = e.address(ins.operands[0], "u32"), e.get(ins.operands[1], "u64")
    e.line(e.call(issue, "g", address, descriptor, repr(shape), str(group_of(ins)), e.mask))


def issue(g: Gang, address: Any, descriptor: Any, shape: Any, group: int, mask: Any) -> None:
    """Start a copy for each lane that issues one, in each CTA of the group."""
    for lane in issuing(g, mask):
        at, desc = at_lane(address, lane), decode(at_lane(descriptor, lane), True)
        if at >> 16:
            raise TmemFault(f"tcgen05.cp to {at:#x}: the lane must be 0")
        if group == 2 and (g.cta.rank % 2 or len(g.cta.peers) < 2):
            raise TmemFault("tcgen05.cp.cta_group::2 must be issued by the even CTA of a pair")
        ctas = g.cta.peers[g.cta.rank : g.cta.rank + group]
        columns = 8 if shape[0].endswith("256b") else 4
        region = Region(at, at + columns)
        memory, warp = tensor_memory(g.cta), int(g.warps[lane // 32])
        before = (memory.pipes[warp],) if warp in memory.pipes else ()
        op = AsyncOp("tcgen05.cp", _copy(ctas, desc, shape, region), before, owner=g.cta)
        for cta in ctas:
            target = tensor_memory(cta)
            target.in_pipe(region, True, "a tcgen05.cp")
            if target.races is not None:
                target.races.access(PIPE, g.cta.agent(warp), region, True, "a tcgen05.cp")
            target.fly(op, region, True)
        memory.pipes[warp] = g.cta.machine.queue.add(op)


def _copy(ctas: list[Any], desc: MatrixDescriptor, shape: Any, region: Region) -> Any:
    def run() -> None:
        replicas = _LANES[shape]
        across = (region.last - region.first) // 4
        index = units(desc, 0, len(replicas[0]), False, across=across)
        for cta in ctas:
            data = read_units(cta.smem, index, "the source of a tcgen05.cp")
            words = np.ascontiguousarray(data).view(np.uint32).reshape(len(index), -1)
            for lanes in replicas:
                tensor_memory(cta).data[region.first : region.last, lanes] = words.T

    return run

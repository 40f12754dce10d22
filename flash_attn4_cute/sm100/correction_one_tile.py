"""The correction role where a CTA has one Q tile, whose key blocks take turns."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..arguments import ForwardArgs
from .correction import CorrectionRole
from .rings import Cursor
from .tiles import SCORE_SLOTS, WARP_SIZE, WARPS_PER_GROUP


@dataclass(frozen=True)
class CorrectionOneTileRole(CorrectionRole):
    """As CorrectionRole; the factor of block i is in slot i % 2."""

    @cute.jit
    def run(self, args: ForwardArgs):
        rings = self.rings
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % WARPS_PER_GROUP
        thread = warp * WARP_SIZE + cute.arch.lane_idx()
        block = Cursor.start(SCORE_SLOTS)
        # Bit i: the phase of slot i. A Q tile's first block has no factor, and ends none.
        factor_phases = Int32(0)
        o_phase, tile_phase = Int32(0), Int32(0)
        self.give_o(block.slot)
        block = block.next()
        turn = Int32(0)
        while self.queue.has_work(turn):
            work = self.queue.work(args, turn)
            if work.num_blocks > 0:
                for _ in cutlass.range(work.num_blocks - 1, unroll=1):
                    rings.factor.wait_full(block.slot, factor_phases >> block.slot & 1)
                    factor_phases ^= 1 << block.slot
                    # Not implied by the scores: they were issued before the last P V.
                    rings.o.wait_full(0, o_phase)
                    o_phase ^= 1
                    self.rescale(0, block.slot, thread)
                    self.give_o(block.slot)
                    block = block.next()
                total, m = self.take_statistics(0, thread, tile_phase)
                self.finish(args, (work, 0, block.slot, o_phase), thread, total, m)
                o_phase ^= 1
                block = block.next()
                tile_phase ^= 1
            elif work.token < work.seqlen.seqlen_q:
                self.epilogue(work, 0, thread).store_nothing(args)
            turn += 1
        self.end()

"""The correction role: a warpgroup rescales O between its products, and finishes it."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.softmax import LOG2_E
from .epilogue import Epilogue, wait_until_read
from .output import OutputStore
from .rings import Rings, opaque
from .softmax import Statistics
from .tiles import WARP_SIZE, WARPS_PER_GROUP, TileConfig
from .tmem import (
    TmemMap,
    TmemRow,
    fence_after_sync,
    fence_before_sync,
    wait_loads,
    wait_stores,
)
from .work import Work, WorkQueue

CHUNK = 16  # columns of O that are rescaled at a time


@dataclass(frozen=True)
class CorrectionRole:
    """Consumes the statistics and O, writes O and LSE to global memory."""

    cfg: Constexpr[TileConfig]
    score: Constexpr[Any]
    tmem: Constexpr[TmemMap]
    statistics: Statistics
    output: OutputStore | None
    sO: cute.Tensor  # where each warp stages its own 32 rows
    rings: Rings
    queue: WorkQueue

    @cute.jit
    def run(self, args: ForwardArgs):
        rings = self.rings
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % WARPS_PER_GROUP
        thread = warp * WARP_SIZE + cute.arch.lane_idx()
        # Bit i: the phase of Q tile i.
        factor_phases, o_phases, tile_phase = Int32(0), Int32(0), Int32(0)
        for tile in cutlass.range_constexpr(self.cfg.q_tiles):
            self.give_o(tile)
        turn = Int32(0)
        while self.queue.has_work(turn):
            work = self.queue.work(args, turn)
            if const_expr(self.output is None or not self.output.ends_with_memory):
                # Else the places of the row in tensor memory are worked out before the loop, and
                # held: with all that lanes need to store rows, float16 d 128 spilled 8 bytes.
                thread = opaque(thread)
            if work.num_blocks > 0:
                for i in cutlass.range(1, work.num_blocks, unroll=1):
                    for tile in cutlass.range_constexpr(self.cfg.q_tiles):
                        if i > work.first_block(tile):
                            # The last P V is done: this block's scores were issued behind it, or
                            # the softmax has waited for it.
                            rings.factor.wait_full(tile, factor_phases >> tile & 1)
                            factor_phases ^= 1 << tile
                            if const_expr(self.cfg.p_apart):
                                o_phases ^= 1 << tile
                            self.rescale(tile, tile, thread)
                            self.give_o(tile)
                for tile in cutlass.range_constexpr(self.cfg.q_tiles):
                    total, m = self.take_statistics(tile, thread, tile_phase)
                    at = (work, tile, tile, o_phases >> tile & 1)
                    self.finish(args, at, thread, total, m)
                    o_phases ^= 1 << tile
                tile_phase ^= 1
            elif work.token < work.seqlen.seqlen_q:
                for tile in cutlass.range_constexpr(self.cfg.q_tiles):
                    self.epilogue(work, tile, thread).store_nothing(args)
            turn += 1
        self.end()

    @cute.jit
    def give_o(self, slot):
        """The next P V of a slot may touch O: it has been rescaled, or read to the end."""
        fence_before_sync()
        self.rings.p.arrive_full("correction", slot)

    @cute.jit
    def end(self):
        """The CTA's memory must outlive the stores that read it."""
        if const_expr(self.output is not None):
            wait_until_read(cute.arch.lane_idx())

    @cute.jit
    def take_statistics(self, tile: Constexpr[int], thread: Int32, phase: Int32):
        """The sum and the maximum of this thread's row, once the softmax is done with the tile."""
        self.rings.final.wait_full(tile, phase)
        total = self.statistics.sSum[thread, tile]
        m = self.statistics.sMax[thread, tile]
        self.rings.final.arrive_empty("correction", tile)
        return total, m

    @cute.jit
    def rescale(self, tile: Constexpr[int], slot, thread: Int32):
        """O <- O * factor, if any row of the warp asks for it; the last P V is done."""
        factor = self.statistics.sFactor[thread, slot]
        if cute.arch.vote_any_sync(factor != 1.0):
            fence_after_sync()
            for j in cutlass.range_constexpr(self.cfg.head_dim_v // CHUNK):
                row = TmemRow(self.tmem.o[tile] + j * CHUNK, CHUNK, thread)
                rO = cute.make_rmem_tensor(CHUNK, Float32)
                row.load(rO, CHUNK)
                wait_loads()
                for i in cutlass.range_constexpr(0, CHUNK, 2):
                    rO[i], rO[i + 1] = cute.arch.mul_packed_f32x2(
                        (rO[i], rO[i + 1]), (factor, factor)
                    )
                row.store(rO, CHUNK)
            wait_stores()

    @cute.jit
    def finish(self, args: ForwardArgs, at: tuple, thread, total, m):
        """Store the log-sum-exp, and O divided by l; a row that saw no key gets what
        `Epilogue.store_nothing` stores.

        `at` is the work, its Q tile, the slot of P whose products come next, and the phase in which
        O is whole: all but O is done by then. Once O has been read the products may come, while it
        is still on its way to memory.
        A sink, a logit without a value, takes part as in OnlineSoftmax.finish; if keys are split,
        the merge adds it.
        """
        work, tile, slot, o_phase = at
        epilogue = self.epilogue(work, tile, thread)
        empty = total == 0.0
        m_log2 = m * args.softmax_scale * LOG2_E
        factor, sink, nothing = Float32(1.0), epilogue.sink(args), -Float32.inf
        if const_expr(sink is not None):
            nothing, sink_log2 = sink, sink * LOG2_E
            m_old = m_log2
            m_log2 = cute.arch.fmax(m_old, sink_log2)
            factor = cute.math.exp2(m_old - m_log2, fastmath=True)
            total = total * factor + cute.math.exp2(sink_log2 - m_log2, fastmath=True)
        # ln l + m * scale, with scale = c ln 2
        lse = (cute.math.log2(total, fastmath=True) + m_log2) * (1.0 / LOG2_E)
        epilogue.store_lse(args, nothing if empty else lse)
        if const_expr(self.score.dropout):
            factor = factor * args.score.keep_scale
        inverse = 0.0 if empty else factor * cute.arch.rcp_approx(total)
        self.rings.o.wait_full(tile, o_phase)
        fence_after_sync()
        epilogue.store_o(args, self.tmem.o[tile], inverse, lambda: self.give_o(slot))

    def epilogue(self, work: Work, tile: int, thread: Int32) -> Epilogue:
        return Epilogue(self.cfg, self.output, self.sO, work, tile, thread)

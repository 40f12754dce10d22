"""The softmax role: a warpgroup turns the scores of one Q tile into P, a row a thread.

For each row, with c = softmax_scale * log2(e), a reference m and the scores s_j seen so far,

    l = sum_j 2^((s_j - m) c)        O = sum_j 2^((s_j - m) c) v_j

m follows the maximum only when it lags by more than 2^8 (FlashAttention-4, section 3.1): then l is
multiplied with the factor 2^((m_old - m) c) here, and O by the correction role.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.dropout import Dropout
from ..common.mask import BandMask
from ..common.score import ScoreSteps
from ..common.softmax import LOG2_E, RESCALE_THRESHOLD
from .arithmetic import (
    add_to_sums,
    exp2_row,
    row_max,
    scale_and_shift,
    start_sums,
    total_of,
)
from .mma import HEAD_STEPS
from .products import STEP
from .rings import Rings
from .tiles import BLOCK_N, WARP_SIZE, WARPS_PER_GROUP, TileConfig
from .tmem import (
    TmemMap,
    TmemRow,
    fence_after_sync,
    fence_before_sync,
    wait_loads,
    wait_stores,
)
from .work import WorkQueue

CHUNK = 32  # columns of P that are stored at a time
GROUP = 4  # columns that are worked on at a time
LAG = 4  # groups by which sums and rounding follow the exponentials
LOAD_WIDTH = 32  # columns of S an instruction
MASK_WIDTH = 32  # columns of S that are masked at a time


@dataclass(frozen=True)
class Statistics:
    """What the softmax tells the correction about each row, (128, slots) each."""

    sFactor: cute.Tensor
    sSum: cute.Tensor
    sMax: cute.Tensor


@dataclass(frozen=True)
class SoftmaxRole:
    """Consumes S, produces P and the statistics of its rows."""

    cfg: Constexpr[TileConfig]
    dtype: Constexpr[type[cutlass.Numeric]]
    score: Constexpr[Any]
    tmem: Constexpr[TmemMap]
    statistics: Statistics
    rings: Rings
    queue: WorkQueue

    @cute.jit
    def run(self, args: ForwardArgs):
        rings, statistics, rule = self.rings, self.statistics, self.queue.rule
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        tile = warp // WARPS_PER_GROUP
        # The slot of S and P: the tile's own, or that of the even or the odd key blocks.
        slot = tile
        warp_row = warp % WARPS_PER_GROUP * WARP_SIZE
        thread = warp_row + cute.arch.lane_idx()
        scale_log2 = args.softmax_scale * LOG2_E
        s_phase, final_phase = Int32(0), Int32(0)
        turn = Int32(0)
        while self.queue.has_work(turn):
            work = self.queue.work(args, turn)
            if work.num_blocks > 0:
                full_lo, full_hi = work.mask.full_blocks(
                    work.token_of(tile, warp_row),
                    work.token_of(tile, warp_row + WARP_SIZE - 1) + 1,
                    self.cfg.block_n,
                )
                own, heads = work.tile_of(thread), self.queue.num_heads
                # With block lists, mask_mod decides in some blocks only, and `blocks` asks it.
                mask_mod = None if rule.block_sparse else rule.mask_mod
                steps = ScoreSteps.of(self.score, mask_mod, args, own, work.seqlen)
                dropout = Dropout.of(self.score.dropout, args, own, heads, thread)
                token = work.token_of(tile, thread)
                m, total = -Float32.inf, Float32(0.0)
                first = work.first_block(tile)
                for i in cutlass.range(first, work.num_blocks, unroll=1):
                    n_block = work.block(i)
                    rS = cute.make_rmem_tensor(BLOCK_N, Float32)
                    rings.s.wait_full(slot, s_phase)
                    fence_after_sync()
                    corner = (token, n_block * BLOCK_N)
                    tStS = TmemRow(self.tmem.s_at(slot), BLOCK_N, thread)
                    masked = n_block < full_lo or n_block >= full_hi
                    if const_expr(steps.any or rule.block_sparse):
                        self.load_scores(rS, tStS, (work, work.last - i), steps, corner, masked)
                        self.free_scores(slot)
                        m_new = row_max(rS, m)
                    else:
                        if masked:
                            mask_in_place(tStS, work.mask, corner)
                        if const_expr(self.cfg.max_on_load):
                            largest = tStS.load_with_max(rS, LOAD_WIDTH)
                        else:
                            tStS.load(rS, LOAD_WIDTH)
                            largest = rS
                        wait_loads()
                        self.free_scores(slot)
                        m_new = row_max(largest, m)
                    # -inf - -inf is NaN and compares false: a row without keys keeps m = -inf.
                    behind = (m_new - m) * scale_log2 > RESCALE_THRESHOLD
                    lag = (m - m_new) * scale_log2 if behind else 0.0
                    factor = cute.math.exp2(lag, fastmath=True)
                    m = m_new if behind else m
                    if const_expr(self.cfg.p_apart):
                        # P V of the block before: the first one finds it done.
                        rings.o.wait_full(slot, s_phase ^ 1)
                        fence_after_sync()
                    if i > first:
                        statistics.sFactor[thread, slot] = factor
                        # The correction may touch O: the products before these scores are done.
                        fence_before_sync()
                        rings.factor.arrive_full("softmax", slot)
                    # 2^((s - m) c) with s = m = -inf must be 0, not NaN.
                    shift = 0.0 if m == -Float32.inf else m * scale_log2
                    total = self.store_p(
                        rS, (slot, thread), (scale_log2, shift), total * factor, (dropout, corner)
                    )
                    if const_expr(self.cfg.q_tiles == 1):
                        s_phase ^= slot
                        slot ^= 1
                    else:
                        s_phase ^= 1
                rings.final.wait_empty(tile, final_phase)
                statistics.sSum[thread, tile] = total
                statistics.sMax[thread, tile] = m
                rings.final.arrive_full("softmax", tile)
                final_phase ^= 1
            turn += 1

    @cute.jit
    def free_scores(self, slot: Int32):
        """S is in registers: where P goes elsewhere, the next scores may come."""
        if const_expr(self.cfg.p_apart):
            fence_before_sync()
            self.rings.s.arrive_empty("softmax", slot)

    @cute.jit
    def load_scores(
        self, rS: cute.Tensor, tStS: TmemRow, at: tuple, steps: ScoreSteps, corner: tuple, masked
    ):
        """S as the steps and the masks make it; `at` is the work and a position in its blocks."""
        rS_mn, places = row_view(rS), cute.make_identity_tensor((1, BLOCK_N))
        tStS.load(rS, LOAD_WIDTH)
        wait_loads()
        if const_expr(steps.any):
            steps.apply(rS_mn, places, corner[0], corner[1])
        if const_expr(self.queue.rule.block_sparse):
            at[0].blocks.apply_to_row(at[1], rS, corner[0], corner[1])
        if masked:
            at[0].mask.apply(rS_mn, places, corner[0], corner[1])

    @cute.jit
    def store_p(
        self, rS: cute.Tensor, at: tuple, exponent: tuple, start: Float32, kept: tuple
    ) -> Float32:
        """P = 2^rS to tensor memory, of which the tensor core may start on the first part early.

        Returns `start` plus the row sum, of the exponentials before they are rounded.
        """
        slot, thread = at
        (scale_log2, shift), (dropout, corner) = exponent, kept
        sums = start_sums(start)
        groups = cute.logical_divide(rS, cute.make_layout(GROUP))
        rP = cute.make_rmem_tensor(BLOCK_N, self.dtype)
        rounded = cute.logical_divide(rP, cute.make_layout(GROUP))
        # Sums and rounding follow some columns behind, so that the exponential unit never waits.
        for j in cutlass.range_constexpr(BLOCK_N // GROUP + LAG):
            if const_expr(j < BLOCK_N // GROUP):
                scale_and_shift(groups[None, j], scale_log2, shift)
                exp2_row(groups[None, j], j * GROUP // 2, self.cfg.emulated_pairs)
            i = j - LAG
            if const_expr(i >= 0):
                row = groups[None, i]
                sums = add_to_sums(sums, row, i * GROUP // 2)
                if const_expr(dropout.present):
                    dropout.apply_to_row(row, corner[0], corner[1] + i * GROUP)
                rounded[None, i].store(row.load().to(self.dtype))
                if const_expr((i + 1) * GROUP % CHUNK == 0):
                    self.store_chunk(rP, (slot, thread), (i + 1) * GROUP)
        return total_of(sums)

    @cute.jit
    def store_chunk(self, rP: cute.Tensor, at: tuple, end: Constexpr[int]):
        """The columns of P in front of `end` to tensor memory, and whoever waits for them."""
        slot, thread = at
        width = CHUNK // 2
        first = end // 2 - width
        packed = cute.recast_tensor(rP, Float32)
        chunk = cute.make_tensor(packed.iterator + first, cute.make_layout(width))
        TmemRow(self.tmem.p_at(slot) + first, width, thread).store(chunk, width)
        if const_expr(end == HEAD_STEPS * STEP):
            wait_stores()
            fence_before_sync()
            self.rings.p.arrive_full("softmax", slot)
        if const_expr(end == BLOCK_N):
            wait_stores()
            fence_before_sync()
            self.rings.p_tail.arrive_full("softmax", slot)


@cute.jit
def mask_in_place(tStS: TmemRow, mask: BandMask, corner: tuple):
    """Mask a row of S where it is, in tensor memory.

    If the row stayed in registers, the way around the mask and the one through it would have to
    agree on them: ptxas copies all 128 of each unmasked block. Columns that all rows of the warp
    see are left alone, and those that none sees are not read.
    """
    first, end = mask.first_key(corner[0]) - corner[1], mask.end_key(corner[0]) - corner[1]
    for column in cutlass.range_constexpr(0, BLOCK_N, MASK_WIDTH):
        seen = end >= column + MASK_WIDTH and first <= column
        if not cute.arch.vote_all_sync(seen):
            part = TmemRow(tStS.first + column, MASK_WIDTH, tStS.thread)
            rS = cute.make_rmem_tensor(MASK_WIDTH, Float32)
            rS.fill(-Float32.inf)
            if cute.arch.vote_any_sync(end > column and first < column + MASK_WIDTH):
                part.load(rS, MASK_WIDTH)
                wait_loads()
                places = cute.make_identity_tensor((1, MASK_WIDTH))
                mask.apply(row_view(rS), places, corner[0], corner[1] + column)
            part.store(rS, MASK_WIDTH)
    wait_stores()


def row_view(row: cute.Tensor) -> cute.Tensor:
    """One thread's row as (rows, columns)."""
    return cute.make_tensor(row.iterator, cute.make_layout((1, cute.size(row))))

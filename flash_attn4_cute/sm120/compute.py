"""The compute role: one warp owns 32 (or 16) query rows and takes them from Q K^T to O.

No compute warp waits for another: they meet only at the ring of K and V blocks. Two warps share an
SM sub-partition, and drift apart until one runs its softmax while the other keeps the tensor core
busy.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.descale import of_tile, scale_and_factor
from ..common.dropout import Dropout
from ..common.fragments import rows_and_columns
from ..common.key_blocks import KeyBlocks
from ..common.mask import BandMask
from ..common.scheduler import TileScheduler
from ..common.score import ScoreSteps
from ..common.seqlen import SeqlenInfo
from ..common.softmax import OnlineSoftmax
from ..tiles import WARP_SIZE, TileConfig
from .products import WarpMma
from .query import QueryRows
from .release import NONE, free, instead

CLEAR_ELEMENTS = 8  # 16 bytes a store


@cute.jit
def reread(lane: Int32) -> Int32:
    """`lane`, in a form that the compiler cannot carry out of a loop or a branch.

    What is computed from it afterwards, such as every address of the epilogue, then takes no
    register while the key loop runs (d 128, H200: 424 instead of 403 TFLOP/s, and no spill).
    """
    return cute.arch.shuffle_sync(lane, lane)


@cute.jit
def clear_rows(sV: cute.Tensor, rows: Int32, lane: Int32):
    """Zero the rows >= `rows` of a block of V (block_n, d): 0 * NaN would reach the output.

    Every warp that reads the block clears it for itself before it reads; all of them write the same
    zeros, so none has to wait for another.
    """
    per_row = cute.size(sV, mode=[1]) // CLEAR_ELEMENTS
    zeros = cute.make_rmem_tensor(CLEAR_ELEMENTS, sV.element_type)
    zeros.fill(0.0)
    for i in cutlass.range(lane, (cute.size(sV, mode=[0]) - rows) * per_row, WARP_SIZE, unroll=1):
        target = cute.local_tile(sV, (1, CLEAR_ELEMENTS), (rows + i // per_row, i % per_row))
        cute.autovec_copy(
            zeros, cute.make_tensor(target.iterator, cute.make_layout(CLEAR_ELEMENTS))
        )
    # As for the epilogue: the slot's next writer is a TMA copy.
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_warp()


@dataclass(frozen=True)
class ComputeRole:
    """Consumes Q and the ring of K and V blocks, writes O and LSE."""

    cfg: Constexpr[TileConfig]
    rule: Constexpr[Any]
    score: Constexpr[Any]
    dtype: Constexpr[type[cutlass.Numeric]]
    guard_v: Constexpr[bool]  # rows past seqlen_k may hold anything: TMA did not zero them
    sQ: cute.Tensor  # (rows_per_warp, d), this warp's
    sKV: cute.Tensor
    sVt: cute.Tensor
    kv_ring: Any
    scheduler: TileScheduler
    products: Constexpr[type[WarpMma]] = WarpMma

    @cute.jit
    def run(self, args: ForwardArgs):
        kv_ring = self.kv_ring
        turn = Int32(0)
        index = self.scheduler.index(turn)
        if index < self.scheduler.num_tiles():
            queries = QueryRows(self.cfg, self.sQ)
            queries.clear(args, cute.arch.lane_idx())
            queries.fetch(args, self.scheduler.tile(index), cute.arch.lane_idx())
        while index < self.scheduler.num_tiles():
            turn += 1
            following = self.scheduler.index(turn)
            kv_ring = self.compute_tile(args, index, following, kv_ring)
            index = following

    @cute.jit
    def compute_tile(self, args: ForwardArgs, index: Int32, following: Int32, kv_ring: Any):
        """One tile from Q to O and LSE; returns the ring as it leaves it."""
        cfg = self.cfg
        lane = cute.arch.lane_idx()
        warp_rows = cute.arch.make_warp_uniform(cute.arch.warp_idx()) * cfg.rows_per_warp
        mma = self.products(cfg, self.dtype, lane)
        acc_S = mma.accumulator(cfg.block_n)
        acc_O = mma.accumulator(cfg.head_dim_v)
        acc_S_mn, acc_O_mn = rows_and_columns(acc_S), rows_and_columns(acc_O)
        queries = QueryRows(cfg, self.sQ)
        work = self.scheduler.tile(index)
        seqlen = SeqlenInfo.of(args, work.batch)
        tile_row = work.m_block * cfg.block_m
        if tile_row < seqlen.seqlen_q:
            mask = BandMask.of(self.rule, args.window_left, args.window_right, seqlen)
            lo, hi = mask.blocks(
                tile_row, cutlass.min(tile_row + cfg.block_m, seqlen.seqlen_q), cfg.block_n
            )
            row = tile_row + warp_rows
            # What this warp's own rows need of [lo, hi); the rest it only passes on.
            warp_lo, warp_hi = mask.blocks(row, row + cfg.rows_per_warp, cfg.block_n)
            full_lo, full_hi = mask.full_blocks(row, row + cfg.rows_per_warp, cfg.block_n)
            blocks = KeyBlocks.of(self.rule, args, work, seqlen)
            lo, hi = blocks.share(args, work, *blocks.limits(lo, hi))
            warp_lo, warp_hi = blocks.limits(cutlass.max(warp_lo, lo), cutlass.min(warp_hi, hi))
            if const_expr(self.rule.block_sparse and args.mWorkspace is not None):
                warp_lo, warp_hi = lo, hi
            if row >= seqlen.seqlen_q or warp_lo >= warp_hi:
                warp_lo, warp_hi = hi, hi
            # With block lists, mask_mod decides in some blocks only, and `blocks` asks it.
            mask_mod = None if self.rule.block_sparse else self.rule.mask_mod
            steps = ScoreSteps.of(self.score, mask_mod, args, work, seqlen)
            heads = self.scheduler.num_heads.divisor
            dropout = Dropout.of(self.score.dropout, args, work, heads, lane)
            scale, factor = scale_and_factor(args, self.score.scaled, of_tile(args, work))
            softmax = OnlineSoftmax.start(scale, cute.size(acc_S_mn, mode=[0]))
            acc_O.fill(0.0)
            queries.wait()
            mma.prepare(queries)
            tSrQ = mma.query_fragment(self.sQ)
            if const_expr(cfg.q_in_registers):
                mma.hold_queries(tSrQ, self.sQ, warp_lo < warp_hi)
            for _ in cutlass.range(2 * (hi - warp_hi), unroll=1):
                kv_ring.wait_and_advance().release()
            held = Int32(NONE)
            for i in cutlass.range(warp_hi - warp_lo, unroll=1):
                n_block = blocks.at(warp_hi - 1 - i)
                slot = kv_ring.wait_and_advance()
                held = instead(held, slot)
                mma.scores(acc_S, tSrQ, self.sQ, self.sKV[None, None, slot.index])
                if const_expr(factor is not None):
                    acc_S.store(acc_S.load() * factor)
                if const_expr(steps.any):
                    places = mma.score_coordinates(reread(lane))
                    steps.apply(acc_S_mn, places, row, n_block * cfg.block_n)
                if const_expr(self.rule.block_sparse):
                    listed = mma.score_coordinates(reread(lane))
                    first_key = n_block * cfg.block_n
                    blocks.apply(warp_hi - 1 - i, acc_S_mn, listed, row, first_key)
                if n_block < full_lo or n_block >= full_hi:
                    coord = mma.score_coordinates(reread(lane))
                    mask.apply(acc_S_mn, coord, row, n_block * cfg.block_n)
                softmax.update(acc_S_mn, acc_O_mn)
                slot = kv_ring.wait_and_advance()
                held = instead(held, slot)
                sVt = self.sVt[None, None, slot.index]
                rows = seqlen.seqlen_k - n_block * cfg.block_n
                # Two questions: one is answered at trace time, one at run time.
                if const_expr(self.guard_v):  # noqa: SIM102
                    if rows < cfg.block_n:
                        clear_rows(self.sKV[None, None, slot.index], rows, lane)
                corner = (row, n_block * cfg.block_n)
                mma.accumulate(acc_O, acc_S, softmax, sVt, dropout, corner)
            free(held)
            for _ in cutlass.range(2 * (warp_lo - lo), unroll=1):
                kv_ring.wait_and_advance().release()
            # Nobody else reads these rows: the next tile's arrive while this one's are stored.
            cute.arch.sync_warp()
            if following < self.scheduler.num_tiles():
                queries.fetch(args, self.scheduler.tile(following), reread(lane))
            epilogue = mma.epilogue(cfg, self.dtype, reread(lane))
            epilogue.run(args, work, row, softmax, acc_O)
        elif following < self.scheduler.num_tiles():
            queries.fetch(args, self.scheduler.tile(following), lane)
        return kv_ring

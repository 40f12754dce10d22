"""The compute role: one warp owns 32 (or 16) query rows and takes them from Q K^T to O.

No compute warp waits for another: they meet only at the ring of K and V blocks. Two warps share an
SM sub-partition, and drift apart until one runs its softmax while the other keeps the tensor core
busy.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp

from ..arguments import ForwardArgs
from ..common.descale import scale_and_factor
from ..common.dropout import Dropout
from ..common.fragments import as_operand_a, rows_and_columns, tile_of
from ..common.key_blocks import KeyBlocks
from ..common.mask import BandMask
from ..common.scheduler import TileScheduler
from ..common.score import ScoreSteps
from ..common.seqlen import SeqlenInfo
from ..common.softmax import OnlineSoftmax
from ..tiles import WARP_SIZE, TileConfig
from .epilogue import Epilogue
from .query import QueryRows

CLEAR_ELEMENTS = 8  # 16 bytes a store


@dataclass(frozen=True)
class WarpMma:
    """The two matrix products of one warp, with operands fetched by `ldmatrix` just in time."""

    cfg: Constexpr[TileConfig]
    dtype: Constexpr[type[cutlass.Numeric]]
    lane: Int32

    epilogue = Epilogue  # what stores O in the order of columns that falls out

    def prepare(self, queries: QueryRows):
        """Bring the rows that have been fetched into the order of K's columns: they are."""

    def tiled_mma(self) -> cute.TiledMma:
        op = warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16))
        return cute.make_tiled_mma(op, (1, 1, 1), permutation_mnk=(16, 16, 16))

    def accumulator(self, columns: int) -> cute.Tensor:
        shape = self.tiled_mma().partition_shape_C((self.cfg.rows_per_warp, columns))
        return cute.make_rmem_tensor(shape, Float32)

    def score_coordinates(self, lane: Int32) -> cute.Tensor:
        """(row, column) inside the block of every score that the lane holds, as (rows, columns)."""
        cS = cute.make_identity_tensor((self.cfg.rows_per_warp, self.cfg.block_n))
        return rows_and_columns(self.tiled_mma().get_slice(lane).partition_C(cS))

    def query_fragment(self, sQ: cute.Tensor) -> cute.Tensor:
        """Registers for the A operand Q (rows, d), all k16 steps of it."""
        thr_mma = self.tiled_mma().get_slice(self.lane)
        return thr_mma.make_fragment_A(thr_mma.partition_A(sQ))

    @cute.jit
    def load_queries(self, tSrQ: cute.Tensor, sQ: cute.Tensor, step: Constexpr[int]):
        """Bring one k16 step of Q into its registers."""
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype)
        copy_Q = cute.make_tiled_copy_A(atom, self.tiled_mma())
        tSsQ = copy_Q.get_slice(self.lane).partition_S(sQ)
        rQ = copy_Q.retile(tSrQ)
        cute.copy(copy_Q, tSsQ[None, None, step], rQ[None, None, step])

    @cute.jit
    def hold_queries(self, tSrQ: cute.Tensor, sQ: cute.Tensor, has_keys: Boolean):
        """Bring all of Q into its registers, if the warp has any keys."""
        if has_keys:
            for k in cutlass.range_constexpr(cute.size(tSrQ, mode=[2])):
                self.load_queries(tSrQ, sQ, k)

    @cute.jit
    def scores(self, acc_S: cute.Tensor, tSrQ: cute.Tensor, sQ: cute.Tensor, sK: cute.Tensor):
        """acc_S = Q K^T, Q (rows, d) and K (block_n, d) both with d contiguous."""
        tiled_mma = self.tiled_mma()
        thr_mma = tiled_mma.get_slice(self.lane)
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype)
        copy_K = cute.make_tiled_copy_B(atom, tiled_mma)
        tSsK = copy_K.get_slice(self.lane).partition_S(sK)
        tSrK = thr_mma.make_fragment_B(thr_mma.partition_B(sK))
        rK = copy_K.retile(tSrK)
        # One ldmatrix.x4 brings a pair of n8 tiles of K. Each is issued one product ahead of its
        # use, or the tensor core would wait for it every time.
        pairs_K = cute.logical_divide(tSrK, (None, 2, None))
        pairs_S = cute.logical_divide(acc_S, (None, None, 2))
        acc_S.fill(0.0)
        fetch_Q = not self.cfg.q_in_registers
        num_pairs, num_steps = cute.size(rK, mode=[1]), cute.size(tSrQ, mode=[2])
        if const_expr(fetch_Q):
            self.load_queries(tSrQ, sQ, 0)
        cute.copy(copy_K, tSsK[None, 0, 0], rK[None, 0, 0])
        for unit in cutlass.range_constexpr(num_pairs * num_steps):
            k, j = unit // num_pairs, unit % num_pairs
            next_k, next_j = (unit + 1) // num_pairs, (unit + 1) % num_pairs
            if const_expr(next_k < num_steps):
                if const_expr(next_j == 0 and fetch_Q):
                    self.load_queries(tSrQ, sQ, next_k)
                cute.copy(copy_K, tSsK[None, next_j, next_k], rK[None, next_j, next_k])
            acc = pairs_S[None, None, (None, j)]
            cute.gemm(tiled_mma, acc, tSrQ[None, None, k], pairs_K[None, (None, j), k], acc)

    @cute.jit
    def accumulate(
        self,
        acc_O: cute.Tensor,
        acc_S: cute.Tensor,
        softmax: OnlineSoftmax,
        sVt: cute.Tensor,
        dropout: Dropout,
        corner: tuple,
    ):
        """acc_O += P V, P = exponentials of acc_S, V^T (d_v, block_n) read by `ldmatrix.trans`.

        `corner` is the (row, key) of P's first element, for dropout. The exponentials of one k16
        step are issued among the products of the step before it, a tile at a time, so that the two
        units work at the same time.
        """
        tiled_mma = self.tiled_mma()
        thr_mma = tiled_mma.get_slice(self.lane)
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(True, 4), self.dtype)
        copy_V = cute.make_tiled_copy_B(atom, tiled_mma)
        tOsV = copy_V.get_slice(self.lane).partition_S(sVt)
        tOrV = thr_mma.make_fragment_B(thr_mma.partition_B(sVt))
        rV = copy_V.retile(tOrV)
        pairs_V = cute.logical_divide(tOrV, (None, 2, None))
        pairs_O = cute.logical_divide(acc_O, (None, None, 2))
        rP = cute.make_fragment_like(acc_S, self.dtype)
        steps_P = cute.logical_divide(rP, (None, None, 2))
        num_pairs, num_steps = cute.size(rV, mode=[1]), cute.size(tOrV, mode=[2])
        # The m16n8 tiles of one k16 step of P.
        tiles = [(m, n) for n in range(2) for m in range(cute.size(acc_S, mode=[1]))]
        cute.copy(copy_V, tOsV[None, 0, 0], rV[None, 0, 0])
        for m, n in tiles:
            self.probabilities(rP, acc_S, (m, n), softmax, dropout, corner)
        for k in cutlass.range_constexpr(num_steps):
            tOrP = as_operand_a(steps_P[None, None, (None, k)])[None, None, 0]
            for j in cutlass.range_constexpr(num_pairs):
                if const_expr(k * num_pairs + j + 1 < num_steps * num_pairs):
                    next_k, next_j = (k, j + 1) if j + 1 < num_pairs else (k + 1, 0)
                    cute.copy(copy_V, tOsV[None, next_j, next_k], rV[None, next_j, next_k])
                acc = pairs_O[None, None, (None, j)]
                cute.gemm(tiled_mma, acc, tOrP, pairs_V[None, (None, j), k], acc)
                for i in cutlass.range_constexpr(len(tiles)):
                    if const_expr(k + 1 < num_steps and i * num_pairs // len(tiles) == j):
                        at = (tiles[i][0], tiles[i][1] + 2 * (k + 1))
                        self.probabilities(rP, acc_S, at, softmax, dropout, corner)

    @cute.jit
    def probabilities(
        self,
        rP: cute.Tensor,
        acc_S: cute.Tensor,
        at: tuple,
        softmax: OnlineSoftmax,
        dropout: Dropout,
        corner: tuple,
    ):
        """P of one m16n8 tile, the one `at` (m, n)."""
        m, n = at
        tile_S = tile_of(acc_S, m, n)
        softmax.exponentials(rows_and_columns(tile_S), 2 * m)
        if const_expr(dropout.present):
            dropout.apply(rows_and_columns(tile_S), corner[0] + 16 * m, corner[1] + 8 * n)
        tile_of(rP, m, n).store(tile_S.load().to(self.dtype))


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
            scale, factor = scale_and_factor(args, self.score.scaled, work)
            softmax = OnlineSoftmax.start(scale, cute.size(acc_S_mn, mode=[0]))
            acc_O.fill(0.0)
            queries.wait()
            mma.prepare(queries)
            tSrQ = mma.query_fragment(self.sQ)
            if const_expr(cfg.q_in_registers):
                mma.hold_queries(tSrQ, self.sQ, warp_lo < warp_hi)
            for _ in cutlass.range(2 * (hi - warp_hi), unroll=1):
                kv_ring.wait_and_advance().release()
            for i in cutlass.range(warp_hi - warp_lo, unroll=1):
                n_block = blocks.at(warp_hi - 1 - i)
                slot = kv_ring.wait_and_advance()
                mma.scores(acc_S, tSrQ, self.sQ, self.sKV[None, None, slot.index])
                slot.release()
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
                sVt = self.sVt[None, None, slot.index]
                rows = seqlen.seqlen_k - n_block * cfg.block_n
                # Two questions: one is answered at trace time, one at run time.
                if const_expr(self.guard_v):  # noqa: SIM102
                    if rows < cfg.block_n:
                        clear_rows(self.sKV[None, None, slot.index], rows, lane)
                corner = (row, n_block * cfg.block_n)
                mma.accumulate(acc_O, acc_S, softmax, sVt, dropout, corner)
                slot.release()
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

"""The compute role of the decode kernel: a warp takes its own keys of every block.

Warp w of W holds all rows of the tile and owns keys [w, w + 1) * block_n / W of each block. It
keeps a softmax of its own over them, so warps meet only at the ring and, once, to merge results.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ..common.fragments import as_operand_a, rows_and_columns
from ..common.scheduler import WorkTile
from ..common.score import ScoreSteps
from ..common.softmax import OnlineSoftmax
from ..decode_arguments import DecodeArgs
from ..decode_tiles import M_ATOM, DecodeConfig
from .compute import clear_rows
from .decode_work import DecodeWork
from .products import MmaSync
from .release import NONE, instead

STEPS_AHEAD = 8  # k16 steps of K that are fetched before their product
ROWS_APART = 8  # a thread of mma.m16n8 holds rows that lie so far apart


@dataclass(frozen=True)
class SliceMma(MmaSync):
    """The two matrix products of one warp over its slice of keys; Q stays in registers."""

    def accumulator(self, columns: int) -> cute.Tensor:
        shape = self.tiled_mma().partition_shape_C((self.cfg.rows, columns))
        return cute.make_rmem_tensor(shape, Float32)

    def query(self) -> cute.Tensor:
        shape = self.tiled_mma().partition_shape_A((self.cfg.rows, self.cfg.head_dim))
        return cute.make_rmem_tensor(shape, self.dtype)

    def query_pair(self, k: int, side: int):
        """Which pair of columns of Q stands at `side` of k16 step k."""
        return 8 * k + self.lane % 4 + 4 * side

    def score_coordinates(self) -> cute.Tensor:
        """(row, column) inside the slice of every score of the lane, as (rows, columns)."""
        cS = cute.make_identity_tensor((self.cfg.rows, self.cfg.keys_per_warp))
        return rows_and_columns(self.tiled_mma().get_slice(self.lane).partition_C(cS))

    @cute.jit
    def load_query(self, tSrQ: cute.Tensor, args: DecodeArgs, work: DecodeWork):
        """Fill the A operand ((2, 2, 2), m, k) from global memory; rows that do not exist are 0."""
        if const_expr(cute.rank(args.mQ) == 4):
            mQ = args.mQ[work.batch, None, None, None]
        else:
            mQ = args.mQ
        tSrQ.fill(0.0)
        for m in cutlass.range_constexpr(cute.size(tSrQ, mode=[1])):
            for half in cutlass.range_constexpr(2):
                local = self.lane // 4 + ROWS_APART * half + M_ATOM * m
                if local < work.num_rows:
                    row = work.row + local
                    token = work.seqlen.offset_q + row // work.group
                    head = work.kv_head * work.group + row % work.group
                    gQ = mQ[token, head, None]
                    for k in cutlass.range_constexpr(cute.size(tSrQ, mode=[2])):
                        for side in cutlass.range_constexpr(2):
                            if const_expr(16 * k + 8 * side < cute.size(gQ)):
                                source = cute.local_tile(gQ, (2,), (self.query_pair(k, side),))
                                cute.autovec_copy(source, tSrQ[(None, half, side), m, k])

    @cute.jit
    def scores(self, acc_S: cute.Tensor, tSrQ: cute.Tensor, sK: cute.Tensor):
        """acc_S = Q K^T for K (keys, d) with d contiguous."""
        tiled_mma = self.tiled_mma()
        copy_K, tSsK, rK, tSrK = self.operand_b(sK, False)
        acc_S.fill(0.0)
        num_steps = cute.size(tSrQ, mode=[2])
        for k in cutlass.range_constexpr(min(STEPS_AHEAD, num_steps)):
            cute.copy(copy_K, tSsK[None, None, k], rK[None, None, k])
        for k in cutlass.range_constexpr(num_steps):
            if const_expr(k + STEPS_AHEAD < num_steps):
                ahead = k + STEPS_AHEAD
                cute.copy(copy_K, tSsK[None, None, ahead], rK[None, None, ahead])
            cute.gemm(tiled_mma, acc_S, tSrQ[None, None, k], tSrK[None, None, k], acc_S)

    @cute.jit
    def accumulate(self, acc_O: cute.Tensor, acc_P: cute.Tensor, sVt: cute.Tensor):
        """acc_O += P V with V^T (d, keys) read by `ldmatrix.trans`."""
        tiled_mma = self.tiled_mma()
        copy_V, tOsV, rV, tOrV = self.operand_b(sVt, True)
        rP = cute.make_fragment_like(acc_P, self.dtype)
        rP.store(acc_P.load().to(self.dtype))
        tOrP = as_operand_a(rP)
        cute.copy(copy_V, tOsV, rV)
        for k in cutlass.range_constexpr(cute.size(tOrP, mode=[2])):
            cute.gemm(tiled_mma, acc_O, tOrP[None, None, k], tOrV[None, None, k], acc_O)


@dataclass(frozen=True)
class RowBounds:
    """Which keys [first, end) each row of this thread sees; rows never change in a launch."""

    first: cute.Tensor
    end: cute.Tensor

    @staticmethod
    @cute.jit
    def of(num_rows: Constexpr[int], work: DecodeWork, lane: Int32) -> "RowBounds":
        first = cute.make_rmem_tensor(num_rows, Int32)
        end = cute.make_rmem_tensor(num_rows, Int32)
        for r in cutlass.range_constexpr(num_rows):
            token = (work.row + lane // 4 + ROWS_APART * r) // work.group
            first[r] = work.mask.first_key(token)
            end[r] = work.mask.end_key(token)
        return RowBounds(first, end)

    @cute.jit
    def apply(self, acc_S_mn: cute.Tensor, key: Int32, lane: Int32):
        """Set to -inf the scores that the mask hides; the thread's slice begins at `key`."""
        key += 2 * (lane % 4)
        for r in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
                column = key + c % 2 + 8 * (c // 2)
                hidden = column >= self.end[r] or column < self.first[r]
                acc_S_mn[r, c] = -Float32.inf if hidden else acc_S_mn[r, c]


@dataclass(frozen=True)
class RowSteps:
    """The steps from dot products to scores, row by row: rows differ in token and head."""

    steps: tuple[ScoreSteps, ...]
    tokens: tuple[Int32, ...]

    @staticmethod
    def of(
        rules: tuple, num_rows: int, args: DecodeArgs, work: DecodeWork, lane: Int32
    ) -> "RowSteps":
        """`rules` is (ScoreRule, mask_mod)."""
        steps, tokens = [], []
        for r in range(num_rows):
            row = work.row + lane // 4 + ROWS_APART * r
            head = work.kv_head * work.group + row % work.group
            place = WorkTile(Int32(0), head, work.batch)
            steps.append(ScoreSteps.of(*rules, args, place, work.seqlen))
            tokens.append(row // work.group)
        return RowSteps(tuple(steps), tuple(tokens))

    @property
    def any(self) -> bool:
        """Whether there is anything to do before the band mask."""
        return self.steps[0].any

    @cute.jit
    def apply(self, acc_S_mn: cute.Tensor, coord_mn: cute.Tensor, key: Int32):
        """Turn the thread's dot products into scores; the warp's slice begins at `key`."""
        for r in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[0])):
            shape = (1, cute.size(acc_S_mn, mode=[1]))
            acc_row = cute.local_tile(acc_S_mn, shape, (r, 0))
            coord_row = cute.local_tile(coord_mn, shape, (r, 0))
            self.steps[r].apply(acc_row, coord_row, self.tokens[r] - coord_mn[r, 0][0], key)


@dataclass(frozen=True)
class DecodeComputeRole:
    """Consumes the ring; leaves this warp's O, maxima and sums unmerged in registers.

    `mma` makes the products. `factor` multiplies dot products before the steps, or is None.
    """

    cfg: Constexpr[DecodeConfig]
    rule: Constexpr[Any]
    score: Constexpr[Any]
    dtype: Constexpr[type[cutlass.Numeric]]
    guard_v: Constexpr[bool]  # rows past seqlen_k may hold anything: TMA did not zero them
    mma: SliceMma
    factor: Any
    sKV: cute.Tensor
    kv_ring: Any
    work: DecodeWork

    @cute.jit
    def run(self, args: DecodeArgs, acc_O: cute.Tensor, softmax: OnlineSoftmax):
        """Accumulate over this CTA's blocks; then every slot of the ring has been read."""
        cfg, work, kv_ring = self.cfg, self.work, self.kv_ring
        lane = cute.arch.lane_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        mma = self.mma
        acc_S = mma.accumulator(cfg.keys_per_warp)
        acc_S_mn, acc_O_mn = rows_and_columns(acc_S), rows_and_columns(acc_O)
        tSrQ = mma.query()
        mma.load_query(tSrQ, args, work)
        num_rows = cute.size(acc_S_mn, mode=[0])
        bounds = RowBounds.of(num_rows, work, lane)
        steps = RowSteps.of((self.score, self.rule.mask_mod), num_rows, args, work, lane)
        acc_O.fill(0.0)
        held = Int32(NONE)
        for i in cutlass.range(work.hi - work.lo, unroll=1):
            block = work.hi - 1 - i
            key = block * cfg.block_n + warp_index * cfg.keys_per_warp
            slot = kv_ring.wait_and_advance()
            held = instead(held, slot)
            mma.scores(acc_S, tSrQ, self.slice(slot.index, warp_index))
            if const_expr(self.factor is not None):
                acc_S.store(acc_S.load() * self.factor)
            if const_expr(steps.any):
                steps.apply(acc_S_mn, mma.score_coordinates(), key)
            if block < work.full_lo or block >= work.full_hi:
                bounds.apply(acc_S_mn, key, lane)
            softmax.update(acc_S_mn, acc_O_mn)
            softmax.exponentials(acc_S_mn)
            slot = kv_ring.wait_and_advance()
            held = instead(held, slot)
            sV = self.slice(slot.index, warp_index)
            rows = cutlass.max(work.seqlen.seqlen_k - key, 0)
            # Two questions: one is answered at trace time, one at run time.
            if const_expr(self.guard_v):  # noqa: SIM102
                if rows < cfg.keys_per_warp:
                    clear_rows(sV, rows, lane)
            sVt = cute.make_tensor(sV.iterator, cute.select(sV.layout, mode=[1, 0]))
            mma.accumulate(acc_O, acc_S, sVt)
        # The last slot stays held: nothing is loaded any more.

    @cute.jit
    def slice(self, slot: Int32, warp_index: Int32) -> cute.Tensor:
        """This warp's keys of one slot, (keys, d)."""
        shape = (self.cfg.keys_per_warp, self.cfg.kv_columns)
        return cute.local_tile(self.sKV[None, None, slot], shape, (warp_index, 0))

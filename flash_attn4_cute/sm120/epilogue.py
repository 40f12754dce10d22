"""The epilogue of the mma.sync family: a warp normalises its rows and stores O and LSE."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.fragments import rows_and_columns
from ..common.scheduler import WorkTile
from ..common.seqlen import SeqlenInfo
from ..common.softmax import OnlineSoftmax
from ..tiles import WARP_SIZE, TileConfig

STORE_ELEMENTS = 8  # 16 bytes a lane: whole 32-byte sectors, whatever the head dimension


@dataclass(frozen=True)
class Epilogue:
    """Stages a warp's O rows in `sO` (32, d), memory of its own, to store 16 bytes a lane."""

    cfg: Constexpr[TileConfig]
    dtype: Constexpr[type[cutlass.Numeric]]
    sO: cute.Tensor
    lane: Int32

    @cute.jit
    def run(
        self,
        args: ForwardArgs,
        work: WorkTile,
        row: Int32,
        softmax: OnlineSoftmax,
        acc_O: cute.Tensor,
    ):
        seqlen = SeqlenInfo.of(args, work.batch)
        num_rows = seqlen.seqlen_q - row
        lse = cute.make_rmem_tensor(cute.size(softmax.row_max), Float32)
        softmax.finish(rows_and_columns(acc_O), lse)
        self._store_lse(args, work, seqlen.offset_q + row, num_rows, lse)
        self._stage(acc_O)
        if const_expr(cute.rank(args.mO) == 4):
            mO = args.mO[work.batch, None, work.head, None]
        else:
            mO = args.mO[None, work.head, None]
        self._store_rows(mO, seqlen.offset_q + row, num_rows)

    @cute.jit
    def _store_lse(
        self, args: ForwardArgs, work: WorkTile, row: Int32, num_rows: Int32, lse: cute.Tensor
    ):
        if const_expr(args.mLSE is not None):
            if const_expr(cute.rank(args.mLSE) == 3):
                mLSE = args.mLSE[work.batch, work.head, None]
            else:
                mLSE = args.mLSE[work.head, None]
            if self.lane % 4 == 0:
                for r in cutlass.range_constexpr(cute.size(lse)):
                    local = self.lane // 4 + 8 * r
                    if local < num_rows:
                        mLSE[row + local] = lse[r]

    @cute.jit
    def _stage(self, acc_O: cute.Tensor):
        """Write O, converted, to shared memory in the accumulator's own pairs of columns."""
        rO = cute.make_fragment_like(acc_O, self.dtype)
        rO.store(acc_O.load().to(self.dtype))
        cute.arch.sync_warp()
        for m in cutlass.range_constexpr(cute.size(rO, mode=[1])):
            for half in cutlass.range_constexpr(2):
                row = self.lane // 4 + 8 * half + 16 * m
                for n in cutlass.range_constexpr(cute.size(rO, mode=[2])):
                    target = cute.local_tile(self.sO, (1, 2), (row, self.lane % 4 + 4 * n))
                    _copy_vector(rO[(None, half), m, n], target, 2)
        cute.arch.sync_warp()

    @cute.jit
    def _store_rows(self, mO: cute.Tensor, row: Int32, num_rows: Int32):
        """Copy the staged rows that exist to rows `row`, `row` + 1, ... of mO (rows, d)."""
        per_row = self.cfg.head_dim // STORE_ELEMENTS
        for i in cutlass.range_constexpr(self.cfg.rows_per_warp * per_row // WARP_SIZE):
            chunk = i * WARP_SIZE + self.lane
            local, column = chunk // per_row, chunk % per_row
            if local < num_rows:
                source = cute.local_tile(self.sO, (1, STORE_ELEMENTS), (local, column))
                target = cute.local_tile(mO, (1, STORE_ELEMENTS), (row + local, column))
                _copy_vector(source, target, STORE_ELEMENTS)


def _copy_vector(source: cute.Tensor, target: cute.Tensor, elements: int):
    """Copy `elements` contiguous values with one instruction."""
    layout = cute.make_layout(elements)
    cute.autovec_copy(
        cute.make_tensor(source.iterator, layout), cute.make_tensor(target.iterator, layout)
    )

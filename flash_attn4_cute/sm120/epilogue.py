"""The epilogue of the mma.sync family: a warp normalises its rows and stores O and LSE."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.fragments import rows_and_columns
from ..common.scheduler import WorkTile
from ..common.seqlen import SeqlenInfo
from ..common.softmax import OnlineSoftmax
from ..tiles import TileConfig

QUAD = 4  # lanes that share a row of an accumulator, and 32-bit words of one 16-byte store


@dataclass(frozen=True)
class Epilogue:
    """Stores a warp's O rows 16 bytes a lane, without shared memory.

    A lane of a quad holds two neighbouring columns of each n8 tile. The quad transposes four tiles
    at a time, after which each lane holds all eight columns of one of them: 64 bytes a quad.
    """

    cfg: Constexpr[TileConfig]
    dtype: Constexpr[type[cutlass.Numeric]]
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
        lse = cute.make_rmem_tensor(cute.size(softmax.row_max), cutlass.Float32)
        sink = keep_scale = None
        if const_expr(args.score is not None and args.score.mSink is not None):
            sink = args.score.mSink[work.head].to(cutlass.Float32)
        if const_expr(args.score is not None and args.score.mDropoutState is not None):
            keep_scale = args.score.keep_scale
        softmax.finish(rows_and_columns(acc_O), lse, sink, keep_scale)
        self._store_lse(args, work, seqlen.offset_q + row, num_rows, lse)
        if const_expr(cute.rank(args.mO) == 4):
            mO = args.mO[work.batch, None, work.head, None]
        else:
            mO = args.mO[None, work.head, None]
        self._store_rows(mO, seqlen.offset_q + row, num_rows, acc_O)

    @cute.jit
    def _store_lse(
        self, args: ForwardArgs, work: WorkTile, row: Int32, num_rows: Int32, lse: cute.Tensor
    ):
        if const_expr(args.mLSE is not None):
            if const_expr(cute.rank(args.mLSE) == 3):
                mLSE = args.mLSE[work.batch, work.head, None]
            else:
                mLSE = args.mLSE[work.head, None]
            if self.lane % QUAD == 0:
                for r in cutlass.range_constexpr(cute.size(lse)):
                    local = self.lane // QUAD + 8 * r
                    if local < num_rows:
                        mLSE[row + local] = lse[r]

    @cute.jit
    def _store_rows(self, mO: cute.Tensor, row: Int32, num_rows: Int32, acc_O: cute.Tensor):
        """Copy the rows and columns that exist to rows `row`, `row` + 1, ... of mO (rows, d_v)."""
        rO = cute.make_fragment_like(acc_O, self.dtype)
        rO.store(acc_O.load().to(self.dtype))
        words = cute.recast_tensor(rO, Int32)  # ((1, 2), m, n): one word a row and n8 tile
        member = self.lane % QUAD
        num_chunks = cute.size(mO, mode=[1]) // 8
        chunk = cute.make_rmem_tensor(QUAD, Int32)
        for m in cutlass.range_constexpr(cute.size(words, mode=[1])):
            for half in cutlass.range_constexpr(2):
                local = self.lane // QUAD + 8 * half + 16 * m
                for n in cutlass.range_constexpr(0, cute.size(words, mode=[2]), QUAD):
                    for j in cutlass.range_constexpr(QUAD):
                        chunk[j] = words[(0, half), m, n + j]
                    transpose_quad(chunk, member)
                    if local < num_rows and n + member < num_chunks:
                        target = cute.local_tile(mO, (1, 8), (row + local, n + member))
                        vector = cute.make_tensor(target.iterator, cute.make_layout(8))
                        cute.autovec_copy(cute.recast_tensor(chunk, self.dtype), vector)


@cute.jit
def transpose_quad(words: cute.Tensor, member: Int32):
    """Transpose the 4 x 4 matrix of which each lane of a quad holds a row of four words."""
    for bit in cutlass.range_constexpr(2):
        step = 1 << bit
        upper = (member & step) != 0
        for j in cutlass.range_constexpr(QUAD):
            if const_expr(j & step == 0):
                # The upper lane gives its word j for the lower lane's word j + step.
                gives = words[j] if upper else words[j + step]
                gets = cute.arch.shuffle_sync_bfly(gives, offset=step)
                words[j] = gets if upper else words[j]
                words[j + step] = words[j + step] if upper else gets

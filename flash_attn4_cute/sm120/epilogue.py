"""The epilogue of the mma.sync family: a warp normalises its rows and stores O and LSE."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.descale import with_v_descale
from ..common.fragments import rows_and_columns
from ..common.scheduler import WorkTile
from ..common.seqlen import SeqlenInfo
from ..common.softmax import OnlineSoftmax
from ..tiles import TileConfig

QUAD = 4  # lanes that share a row of an accumulator
PAIR = 2  # lanes that exchange words, and 32-bit words of one 8-byte store


@dataclass(frozen=True)
class Epilogue:
    """Stores a warp's O rows 8 bytes a lane, without shared memory.

    A lane of a quad holds two neighbouring columns of each n8 tile. Pairs of lanes exchange one
    word of every two tiles, after which the even lane holds four columns of the first tile and the
    odd lane four of the second: a quad stores whole sectors of 32 bytes.
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
        is_split = args.mWorkspace is not None
        # Where keys are split, the merge adds the sink.
        if const_expr(args.score is not None and args.score.mSink is not None and not is_split):
            sink = args.score.mSink[work.head].to(cutlass.Float32)
        if const_expr(args.score is not None and args.score.mDropoutState is not None):
            keep_scale = args.score.keep_scale
        keep_scale = with_v_descale(args, work, keep_scale)
        softmax.finish(rows_and_columns(acc_O), lse, sink, keep_scale)
        self._store_lse(args, work, seqlen.offset_q + row, num_rows, lse)
        mO = self._own(args, args.mO, work)
        if const_expr(cute.rank(mO) == 4):
            mO = mO[work.batch, None, work.head, None]
        else:
            mO = mO[None, work.head, None]
        if const_expr(is_split):
            self._store_partial_rows(mO, seqlen.offset_q + row, num_rows, acc_O)
        else:
            self._store_rows(mO, seqlen.offset_q + row, num_rows, acc_O)

    def _own(self, args: ForwardArgs, mX: cute.Tensor, work: WorkTile) -> cute.Tensor:
        """mX of this split of the keys."""
        if args.mWorkspace is None:
            return mX
        return cute.slice_(mX, (work.split, *([None] * (cute.rank(mX) - 1))))

    @cute.jit
    def _store_lse(
        self, args: ForwardArgs, work: WorkTile, row: Int32, num_rows: Int32, lse: cute.Tensor
    ):
        if const_expr(args.mLSE is not None):
            mLSE = self._own(args, args.mLSE, work)
            if const_expr(cute.rank(mLSE) == 3):
                mLSE = mLSE[work.batch, work.head, None]
            else:
                mLSE = mLSE[work.head, None]
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
        odd = self.lane % PAIR
        # In units of four columns: the even lanes of a quad take two of them of one n8 tile, the
        # odd lanes two of the next.
        column = self.lane % QUAD // PAIR + PAIR * odd
        num_columns = cute.size(mO, mode=[1]) // (2 * PAIR)
        tiles_n = cute.size(words, mode=[2])
        row_words = cute.make_rmem_tensor(tiles_n, Int32)
        for m in cutlass.range_constexpr(cute.size(words, mode=[1])):
            for half in cutlass.range_constexpr(2):
                for n in cutlass.range_constexpr(0, tiles_n, PAIR):
                    first, second = words[(0, half), m, n], words[(0, half), m, n + 1]
                    gets = cute.arch.shuffle_sync_bfly(second if odd == 0 else first, offset=1)
                    row_words[n] = first if odd == 0 else gets
                    row_words[n + 1] = gets if odd == 0 else second
                local = self.lane // QUAD + 8 * half + 16 * m
                if local < num_rows:
                    gO = mO[row + local, None]
                    for n in cutlass.range_constexpr(0, tiles_n, PAIR):
                        if column + PAIR * n < num_columns:
                            target = cute.local_tile(gO, (2 * PAIR,), (column + PAIR * n,))
                            source = cute.make_tensor(
                                row_words.iterator + n, cute.make_layout(PAIR)
                            )
                            cute.autovec_copy(cute.recast_tensor(source, self.dtype), target)

    @cute.jit
    def _store_partial_rows(self, mO: cute.Tensor, row: Int32, num_rows: Int32, acc_O: cute.Tensor):
        """The same in float32, where a quad's columns of an n8 tile are a whole sector."""
        num_columns = cute.size(mO, mode=[1]) // PAIR
        for m in cutlass.range_constexpr(cute.size(acc_O, mode=[1])):
            for half in cutlass.range_constexpr(2):
                local = self.lane // QUAD + 8 * half + 16 * m
                if local < num_rows:
                    gO = mO[row + local, None]
                    for n in cutlass.range_constexpr(cute.size(acc_O, mode=[2])):
                        column = self.lane % QUAD + QUAD * n
                        if column < num_columns:
                            target = cute.local_tile(gO, (PAIR,), (column,))
                            cute.autovec_copy(acc_O[(None, half), m, n], target)

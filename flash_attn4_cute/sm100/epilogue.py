"""The epilogue of the tcgen05 family: each warp stores its 32 rows of O, and their LSE."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ..arguments import ForwardArgs
from .tiles import STAGED_COLUMNS, WARP_SIZE, TileConfig
from .tmem import TmemRow, wait_loads
from .work import Work

STORE_ELEMENTS = 8  # 16 bytes a lane
CHUNK = 16  # columns of O in registers at a time: one MMA step, so that they divide every depth


@dataclass(frozen=True)
class Epilogue:
    """For the 128 rows from `row` on, of which thread `thread` has one.

    A warp stages its rows in `sO` (128, STAGED_COLUMNS), some columns at a time, to store 16 bytes
    a lane along each row. It shares the memory with no other warp.
    """

    cfg: Constexpr[TileConfig]
    dtype: Constexpr[type[cutlass.Numeric]]
    sO: cute.Tensor
    work: Work
    row: Int32
    thread: Int32

    @cute.jit
    def store_o(self, args: ForwardArgs, first_column: Constexpr[int], inverse: Float32):
        """Store O * inverse, O in tensor memory from `first_column` on."""
        for start in cutlass.range_constexpr(0, self.cfg.head_dim_v, STAGED_COLUMNS):
            cute.arch.sync_warp()
            for column in cutlass.range_constexpr(start, self.staged_end(start), CHUNK):
                rO = cute.make_rmem_tensor(CHUNK, Float32)
                TmemRow(first_column + column, CHUNK, self.thread).load(rO, CHUNK)
                wait_loads()
                for i in cutlass.range_constexpr(0, CHUNK, 2):
                    rO[i], rO[i + 1] = cute.arch.mul_packed_f32x2(
                        (rO[i], rO[i + 1]), (inverse, inverse)
                    )
                rounded = cute.make_rmem_tensor(CHUNK, self.dtype)
                rounded.store(rO.load().to(self.dtype))
                self.stage(rounded, column - start)
            cute.arch.sync_warp()
            self.store_staged(args, start)

    @cute.jit
    def store_nothing(self, args: ForwardArgs):
        """What rows that see no key get: O = 0, LSE = -inf. Rare: it takes no registers."""
        self.store_lse(args, -Float32.inf)
        zeros = cute.make_rmem_tensor(STORE_ELEMENTS, self.dtype)
        zeros.fill(0.0)
        row = self.row + self.thread
        if row < self.work.seqlen.seqlen_q:
            mO = cute.domain_offset((self.work.seqlen.offset_q + row, 0), self.rows_of_o(args))
            for i in cutlass.range(cute.size(mO, mode=[1]) // STORE_ELEMENTS, unroll=1):
                _copy_vector(zeros, cute.local_tile(mO, (1, STORE_ELEMENTS), (0, i)))

    def rows_of_o(self, args: ForwardArgs) -> cute.Tensor:
        """O of this head, and of this sequence unless they are packed, as (rows, d)."""
        tile = self.work.tile
        if cute.rank(args.mO) == 4:
            return args.mO[tile.batch, None, tile.head, None]
        return args.mO[None, tile.head, None]

    def staged_end(self, start: int) -> int:
        return min(start + STAGED_COLUMNS, self.cfg.head_dim_v)

    def stage(self, values: cute.Tensor, column: int):
        """Write CHUNK columns of this thread's row to shared memory."""
        for i in range(CHUNK // STORE_ELEMENTS):
            place = (self.thread, column // STORE_ELEMENTS + i)
            target = cute.local_tile(self.sO, (1, STORE_ELEMENTS), place)
            source = cute.make_tensor(values.iterator + i * STORE_ELEMENTS, STORE_ELEMENTS)
            _copy_vector(source, target)

    @cute.jit
    def store_staged(self, args: ForwardArgs, start: Constexpr[int]):
        """Copy the staged columns of the rows that exist to O, columns `start` and following."""
        seqlen, mO = self.work.seqlen, self.rows_of_o(args)
        lane = cute.arch.lane_idx()
        warp_row = self.thread - lane
        num_rows = seqlen.seqlen_q - self.row - warp_row
        per_row = (self.staged_end(start) - start) // STORE_ELEMENTS
        num_columns = cute.size(mO, mode=[1]) // STORE_ELEMENTS - start // STORE_ELEMENTS
        # Unrolled whole, the addresses of all rows would not fit the registers.
        for i in cutlass.range(per_row, unroll=2):
            chunk = i * WARP_SIZE + lane
            local, column = chunk // per_row, chunk % per_row
            if local < num_rows and column < num_columns:
                source = cute.local_tile(self.sO, (1, STORE_ELEMENTS), (warp_row + local, column))
                row = seqlen.offset_q + self.row + warp_row + local
                place = (row, start // STORE_ELEMENTS + column)
                _copy_vector(source, cute.local_tile(mO, (1, STORE_ELEMENTS), place))

    @cute.jit
    def store_lse(self, args: ForwardArgs, lse: Float32):
        """Store the log-sum-exp of this thread's row, if the row exists and anybody wants it."""
        if const_expr(args.mLSE is not None):
            seqlen, tile = self.work.seqlen, self.work.tile
            if const_expr(cute.rank(args.mLSE) == 3):
                mLSE = args.mLSE[tile.batch, tile.head, None]
            else:
                mLSE = args.mLSE[tile.head, None]
            row = self.row + self.thread
            if row < seqlen.seqlen_q:
                mLSE[seqlen.offset_q + row] = lse


def _copy_vector(source: cute.Tensor, target: cute.Tensor):
    """Copy 16 contiguous bytes with one instruction."""
    layout = cute.make_layout(STORE_ELEMENTS)
    cute.autovec_copy(
        cute.make_tensor(source.iterator, layout), cute.make_tensor(target.iterator, layout)
    )

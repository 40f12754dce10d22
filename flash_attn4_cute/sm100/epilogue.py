"""The epilogue of the tcgen05 family: each warp stores its 32 rows of O, and their LSE."""

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ..arguments import ForwardArgs
from .output import OutputStore
from .tiles import STAGED_BYTES, WARP_SIZE, TileConfig
from .tmem import TmemRow, wait_loads
from .work import Work

STORE_BITS = 128  # of one store of a lane
CHUNK = 16  # columns of O in registers at a time: one MMA step, so that they divide every depth


@dataclass(frozen=True)
class Epilogue:
    """For the 128 rows of Q tile `tile`, of which thread `thread` has one.

    A warp stages its rows in `sO` (128, columns), some columns at a time, from where TMA or the
    lanes store them, 16 bytes a lane along each row. It shares the memory with no other warp. If
    keys are split, O and LSE are float32 with the splits in front.
    """

    cfg: Constexpr[TileConfig]
    output: OutputStore | None  # None: the lanes store every row
    sO: cute.Tensor
    work: Work
    tile: Constexpr[int]
    thread: Int32

    @property
    def elements(self) -> int:
        """Values of one store."""
        return STORE_BITS // self.sO.element_type.width

    @property
    def staged_columns(self) -> int:
        return STAGED_BYTES * 8 // self.sO.element_type.width

    @cute.jit
    def store_o(
        self,
        args: ForwardArgs,
        first_column: Constexpr[int],
        inverse: Float32,
        when_read: Constexpr[Callable[[], None]],
    ):
        """Store O * inverse, O in tensor memory from `first_column` on.

        What does not fit the staging memory is held in registers, two columns each: all of O is
        read before the first stores begin, and the products of the next tile may go on.
        """
        lane = cute.arch.lane_idx()
        warp_row = self.thread - lane
        kind, columns = self.sO.element_type, self.cfg.head_dim_v
        first = self.first_held()
        held = cute.make_rmem_tensor(max(columns - first, CHUNK), kind)
        for start in cutlass.range_constexpr(0, columns, self.staged_columns):
            if const_expr(self.output is not None):
                wait_until_read(lane)
            cute.arch.sync_warp()
            end = self.staged_end(start)
            if const_expr(start >= first):
                for column in cutlass.range_constexpr(start, end, CHUNK):
                    self.stage(_part(held, column - first), column - start)
            else:
                last = columns if end == first else end
                rO = self.load(first_column + start)
                for column in cutlass.range_constexpr(start, last, CHUNK):
                    wait_loads()
                    # The next columns are on their way while these are rounded.
                    following = rO
                    if const_expr(column + CHUNK < last):
                        following = self.load(first_column + column + CHUNK)
                    rounded = self.rounded(rO, inverse)
                    if const_expr(column < end):
                        self.stage(rounded, column - start)
                    else:
                        _part(held, column - first).store(rounded.load())
                    rO = following
                if const_expr(last == columns):
                    when_read()
            if const_expr(self.output is None):
                cute.arch.sync_warp()
                self.store_staged(args, start)
            else:
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                if self.output.takes(self.work, self.tile, warp_row):
                    if lane == 0:
                        chunk = start // self.staged_columns
                        self.output.store(self.work, (self.tile, warp_row), chunk, self.sO)
                else:
                    self.store_staged(args, start)

    def first_held(self) -> int:
        """The first column of O that is held in registers, all that follow are; d_v: none is.

        Only where TMA stores everything: rows that lanes store take registers of their own.
        """
        columns = self.cfg.head_dim_v
        whole = self.output is not None and self.output.ends_with_memory
        return min(self.staged_columns, columns) if whole else columns

    def load(self, column: int) -> cute.Tensor:
        """CHUNK columns of this thread's row of O in tensor memory; there after `wait_loads`."""
        rO = cute.make_rmem_tensor(CHUNK, Float32)
        TmemRow(column, CHUNK, self.thread).load(rO, CHUNK)
        return rO

    def rounded(self, rO: cute.Tensor, inverse: Float32) -> cute.Tensor:
        """O * inverse as it is stored."""
        for i in range(0, CHUNK, 2):
            rO[i], rO[i + 1] = cute.arch.mul_packed_f32x2((rO[i], rO[i + 1]), (inverse, inverse))
        found = cute.make_rmem_tensor(CHUNK, self.sO.element_type)
        found.store(rO.load().to(self.sO.element_type))
        return found

    @cute.jit
    def store_nothing(self, args: ForwardArgs):
        """What rows that see no key get: O = 0, LSE = sink or -inf. Rare: it takes no registers.

        The merge of split keys does not read O of a part without keys.
        """
        sink = self.sink(args)
        self.store_lse(args, -Float32.inf if sink is None else sink)
        # Two questions: one is answered at trace time, one at run time.
        if const_expr(args.mWorkspace is None):  # noqa: SIM102
            if self.work.has_row(self.tile, self.thread):
                zeros = cute.make_rmem_tensor(self.elements, self.sO.element_type)
                zeros.fill(0.0)
                row = self.rows_of_o(args)[*self.place(self.thread), None]
                for i in cutlass.range(cute.size(row) // self.elements, unroll=1):
                    target = cute.local_tile(row, (self.elements,), (i,))
                    _copy_vector(zeros, target, self.elements)

    def sink(self, args: ForwardArgs) -> Float32 | None:
        """The sink of this thread's row; None if it does not take part here."""
        if args.score is None or args.score.mSink is None or args.mWorkspace is not None:
            return None
        return args.score.mSink[self.work.head_of(self.thread)].to(Float32)

    def rows_of_o(self, args: ForwardArgs) -> cute.Tensor:
        """O of this split, and of this sequence unless they are packed, as (tokens, heads, d)."""
        return self.own(args, args.mO, 4)

    def own(self, args: ForwardArgs, mX: cute.Tensor, dense_rank: int) -> cute.Tensor:
        """mX of this split and sequence; `dense_rank` is that of mX with sequences, no splits."""
        if args.mWorkspace is not None:
            mX = cute.slice_(mX, (self.work.tile.split, *([None] * (cute.rank(mX) - 1))))
        if cute.rank(mX) == dense_rank:
            mX = cute.slice_(mX, (self.work.tile.batch, *([None] * (dense_rank - 1))))
        return mX

    def place(self, row: Int32) -> tuple[Int32, Int32]:
        """(token in memory, head) of a row."""
        work = self.work
        return work.seqlen.offset_q + work.token_of(self.tile, row), work.head_of(row)

    def staged_end(self, start: int) -> int:
        return min(start + self.staged_columns, self.cfg.head_dim_v)

    def stage(self, values: cute.Tensor, column: int):
        """Write CHUNK columns of this thread's row to shared memory."""
        for i in range(CHUNK // self.elements):
            place = (self.thread, column // self.elements + i)
            target = cute.local_tile(self.sO, (1, self.elements), place)
            source = cute.make_tensor(values.iterator + i * self.elements, self.elements)
            _copy_vector(source, target, self.elements)

    @cute.jit
    def store_staged(self, args: ForwardArgs, start: Constexpr[int]):
        """Copy the staged columns of the rows that exist to O, columns `start` and following."""
        mO, elements = self.rows_of_o(args), self.elements
        lane = cute.arch.lane_idx()
        warp_row = self.thread - lane
        per_row = (self.staged_end(start) - start) // elements
        num_columns = cute.size(mO, mode=[2]) // elements - start // elements
        # Unrolled whole, the addresses of all rows would not fit the registers.
        for i in cutlass.range(per_row, unroll=2):
            chunk = i * WARP_SIZE + lane
            row, column = warp_row + chunk // per_row, chunk % per_row
            if self.work.has_row(self.tile, row) and column < num_columns:
                source = cute.local_tile(self.sO, (1, elements), (row, column))
                target = mO[*self.place(row), None]
                place = (start // elements + column,)
                _copy_vector(source, cute.local_tile(target, (elements,), place), elements)

    @cute.jit
    def store_lse(self, args: ForwardArgs, lse: Float32):
        """Store the log-sum-exp of this thread's row, if the row exists and anybody wants it."""
        # Two questions: one is answered at trace time, one at run time.
        if const_expr(args.mLSE is not None):  # noqa: SIM102
            if self.work.has_row(self.tile, self.thread):
                token, head = self.place(self.thread)
                self.own(args, args.mLSE, 3)[head, token] = lse


@cute.jit
def wait_until_read(lane: Int32):
    """Wait until TMA has read what this warp has staged; its first lane has begun the stores."""
    if lane == 0:
        cute.arch.cp_async_bulk_wait_group(0, read=True)


def _part(row: cute.Tensor, first: int) -> cute.Tensor:
    """CHUNK columns of a thread's row."""
    return cute.make_tensor(row.iterator + first, CHUNK)


def _copy_vector(source: cute.Tensor, target: cute.Tensor, elements: int):
    """Copy 16 contiguous bytes with one instruction."""
    layout = cute.make_layout(elements)
    cute.autovec_copy(
        cute.make_tensor(source.iterator, layout), cute.make_tensor(target.iterator, layout)
    )

"""The end of the decode kernel: its warps' results become one, and are stored.

With m_w, l_w and O_w of warp w (see common.softmax) and M = max_w m_w,

    l = sum_w 2^((m_w - M) c) l_w        O = sum_w 2^((m_w - M) c) O_w / l

always summed in the order of the warps, so that a result repeats bit for bit. A sink, a logit
without a value, takes part here, unless keys are split, for then `combine` adds it.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ..common.fragments import rows_and_columns
from ..common.softmax import LOG2_E, OnlineSoftmax
from ..decode_arguments import DecodeArgs
from ..decode_tiles import DecodeConfig
from ..tiles import WARP_SIZE
from .decode_compute import ROWS_APART
from .decode_work import DecodeWork

STORE_ELEMENTS = 4
WARPS_BARRIER = 1  # named barrier of the compute warps; 0 is the CTA's


@dataclass(frozen=True)
class WarpMerge:
    """Merges through `sO` (warps, rows, d) and `sMax`, `sSum` (warps, rows), all float32."""

    cfg: Constexpr[DecodeConfig]
    sO: cute.Tensor
    sMax: cute.Tensor
    sSum: cute.Tensor
    work: DecodeWork

    @cute.jit
    def run(self, args: DecodeArgs, acc_O: cute.Tensor, softmax: OnlineSoftmax):
        thread, _, _ = cute.arch.thread_idx()
        # sO lies where the ring was: no warp may still be reading keys.
        self._meet()
        self._stage(acc_O, softmax)
        self._meet()
        num_rows = cutlass.min(self.work.num_rows, self.cfg.rows)
        scale_log2 = softmax.scale_log2
        self._store_lse(args, thread, num_rows, scale_log2)
        # The combine kernel does not read O of a split without keys.
        if const_expr(args.mWorkspace is None) or self.work.lo < self.work.hi:
            self._store_rows(args, thread, num_rows, scale_log2)

    @cute.jit
    def _meet(self):
        cute.arch.barrier(
            barrier_id=WARPS_BARRIER, number_of_threads=self.cfg.num_compute_warps * WARP_SIZE
        )

    @cute.jit
    def _stage(self, acc_O: cute.Tensor, softmax: OnlineSoftmax):
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        acc_O_mn = rows_and_columns(acc_O)
        for r in cutlass.range_constexpr(cute.size(acc_O_mn, mode=[0])):
            row_sum = softmax.row_sum[r]
            for offset in cutlass.range_constexpr(1, 3):
                row_sum += cute.arch.shuffle_sync_bfly(row_sum, offset=offset)
            row = lane // 4 + ROWS_APART * r
            if lane % 4 == 0:
                self.sMax[warp, row] = softmax.row_max[r]
                self.sSum[warp, row] = row_sum
            # Where each of the thread's columns stands among its neighbours: decode_fp8 splits the
            # even ones from the odd ones.
            order = (0, 2, 1, 3) if self.cfg.kv_bytes == 1 else (0, 1)
            width = len(order)
            for group in cutlass.range_constexpr(cute.size(acc_O_mn, mode=[1]) // width):
                source = cute.make_rmem_tensor(width, Float32)
                for i in cutlass.range_constexpr(width):
                    source[i] = acc_O_mn[r, width * group + order[i]]
                place = (lane % 4 + 4 * group,)
                cute.autovec_copy(
                    source, cute.local_tile(self.sO[warp, row, None], (width,), place)
                )

    @cute.jit
    def _weights(self, args: DecodeArgs, row: Int32, scale_log2: Float32):
        """(weight of each warp's O, M * c, l) of a row; no keys: weights and l are 0."""
        num_warps = self.cfg.num_compute_warps
        weights = cute.make_rmem_tensor(num_warps, Float32)
        largest = -Float32.inf
        for w in cutlass.range_constexpr(num_warps):
            largest = cute.arch.fmax(largest, self.sMax[w, row])
        total, m_log2 = Float32(0.0), largest * scale_log2
        sink = self._sink(args, row)
        if const_expr(sink is not None):
            m_log2 = cute.arch.fmax(m_log2, sink * LOG2_E)
        for w in cutlass.range_constexpr(num_warps):
            m = self.sMax[w, row]
            factor = cute.math.exp2(m * scale_log2 - m_log2, fastmath=True)
            # -inf - -inf is NaN
            weights[w] = 0.0 if m == -Float32.inf else factor
            total += weights[w] * self.sSum[w, row]
        if const_expr(sink is not None):
            with_sink = total + cute.math.exp2(sink * LOG2_E - m_log2, fastmath=True)
            total = 0.0 if largest == -Float32.inf else with_sink
        inverse = 0.0 if total == 0.0 else 1.0 / total
        if const_expr(args.mVDescale is not None):
            inverse = inverse * args.mVDescale[self.work.batch, self.work.kv_head]
        for w in cutlass.range_constexpr(num_warps):
            weights[w] = weights[w] * inverse
        return weights, m_log2, total

    @cute.jit
    def _sink(self, args: DecodeArgs, row: Int32):
        """The sink of a row's head; None if it does not take part here."""
        sink = None
        mSink = None if args.score is None or args.mWorkspace is not None else args.score.mSink
        if const_expr(mSink is not None):
            _, head = self._place(row)
            sink = Float32(mSink[head])
        return sink

    @cute.jit
    def _store_lse(self, args: DecodeArgs, thread: Int32, num_rows: Int32, scale_log2: Float32):
        # Two questions: one is answered at trace time, one at run time.
        if const_expr(args.mLSE is not None):  # noqa: SIM102
            if thread < num_rows:
                _, m_log2, total = self._weights(args, thread, scale_log2)
                lse = (cute.math.log2(total) + m_log2) / LOG2_E
                nothing, sink = -Float32.inf, self._sink(args, thread)
                if const_expr(sink is not None):
                    nothing = sink
                token, head = self._place(thread)
                mLSE = self._own(args, args.mLSE, 3)
                mLSE[head, token] = nothing if total == 0.0 else lse

    @cute.jit
    def _store_rows(self, args: DecodeArgs, thread: Int32, num_rows: Int32, scale_log2: Float32):
        mO = self._own(args, args.mO, 4)
        per_row = cute.size(mO, mode=[2]) // STORE_ELEMENTS
        for i in cutlass.range(
            thread, num_rows * per_row, self.cfg.num_compute_warps * WARP_SIZE, unroll=1
        ):
            row, column = i // per_row, i % per_row
            weights, _, _ = self._weights(args, row, scale_log2)
            value = cute.make_rmem_tensor(STORE_ELEMENTS, Float32)
            value.fill(0.0)
            for w in cutlass.range_constexpr(self.cfg.num_compute_warps):
                part = cute.make_rmem_tensor(STORE_ELEMENTS, Float32)
                source = cute.local_tile(self.sO[w, row, None], (STORE_ELEMENTS,), (column,))
                cute.autovec_copy(source, part)
                value.store(value.load() + part.load() * weights[w])
            token, head = self._place(row)
            out = cute.make_fragment_like(value, mO.element_type)
            out.store(value.load().to(mO.element_type))
            target = cute.local_tile(mO[token, head, None], (STORE_ELEMENTS,), (column,))
            cute.autovec_copy(out, target)

    @cute.jit
    def _place(self, local: Int32):
        """(token, head) of packed row `local` of the tile in memory."""
        work = self.work
        row = work.row + local
        token = work.seqlen.offset_q + row // work.group
        return token, work.kv_head * work.group + row % work.group

    @cute.jit
    def _own(self, args: DecodeArgs, mX: cute.Tensor, dense_rank: Constexpr[int]) -> cute.Tensor:
        """mX of this split and sequence."""
        if const_expr(args.mWorkspace is not None):
            mX = cute.slice_(mX, (self.work.split, *([None] * (cute.rank(mX) - 1))))
        if const_expr(cute.rank(mX) == dense_rank):
            mX = cute.slice_(mX, (self.work.batch, *([None] * (dense_rank - 1))))
        return mX

"""Online softmax over key blocks (Milakov and Gimelshein 2018; FlashAttention-2, section 3.1).

For each row, with c = softmax_scale * log2(e), a reference m and the scores s_j seen so far,

    l = sum_j 2^((s_j - m) c)        O = sum_j 2^((s_j - m) c) v_j

Any m gives the same quotient O / l; the running maximum is the safe choice. As in FlashAttention-4
(section 3.1), m follows the maximum only when it has fallen behind by more than `RESCALE_THRESHOLD`
powers of two, so most blocks leave O untouched. The decision is taken row by row: what a row yields
does not depend on its neighbours in the tile.
"""

import math
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, const_expr

RESCALE_THRESHOLD = 8.0  # log2: exponentials stay below 2^8, well inside fp16
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class OnlineSoftmax:
    """Statistics of the rows that one thread holds, as register tensors of `num_rows` floats."""

    scale_log2: Float32
    row_max: cute.Tensor
    row_sum: cute.Tensor  # of this thread's columns only, until `finish`

    @staticmethod
    def start(softmax_scale: Float32, num_rows: Constexpr[int]) -> "OnlineSoftmax":
        row_max = cute.make_rmem_tensor(num_rows, Float32)
        row_sum = cute.make_rmem_tensor(num_rows, Float32)
        row_max.fill(-Float32.inf)
        row_sum.fill(0.0)
        return OnlineSoftmax(softmax_scale * LOG2_E, row_max, row_sum)

    @cute.jit
    def update(self, acc_S_mn: cute.Tensor, acc_O_mn: cute.Tensor):
        """Let m follow the scores of one block, and rescale l and O where m moved.

        A row's m moves if and only if one of its lanes has seen a score that is too far ahead, so
        lanes compare first, and most blocks need no maximum over the lanes.
        """
        num_rows = cute.size(self.row_max)
        lane_max = self._lane_max(acc_S_mn)
        ahead = False
        for r in cutlass.range_constexpr(num_rows):
            ahead = self._is_ahead(lane_max[r], self.row_max[r]) or ahead
        if cute.arch.vote_any_sync(ahead):
            m_new = quad_max(lane_max)
            for r in cutlass.range_constexpr(num_rows):
                m_old = self.row_max[r]
                m = m_new[r] if self._is_ahead(m_new[r], m_old) else m_old
                # A row that stays has the factor 2^0, exactly 1.
                lag = 0.0 if m == m_old else (m_old - m) * self.scale_log2
                factor = cute.math.exp2(lag, fastmath=True)
                self.row_max[r] = m
                self.row_sum[r] = self.row_sum[r] * factor
                acc_O_mn[r, None] = acc_O_mn[r, None].load() * factor

    @cute.jit
    def _is_ahead(self, score: Float32, m: Float32):
        # -inf - -inf is NaN and compares false: a row without keys so far keeps m = -inf.
        return (score - m) * self.scale_log2 > RESCALE_THRESHOLD

    @cute.jit
    def exponentials(self, acc_S_mn: cute.Tensor, first_row: Constexpr[int] = 0):
        """Turn scores of rows `first_row` and on into p_j = 2^((s_j - m) c); l <- l + sum_j p_j."""
        for r in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[0])):
            # 2^((s - m) c) with s = m = -inf must be 0, not NaN.
            m = self.row_max[first_row + r]
            shift = 0.0 if m == -Float32.inf else m * self.scale_log2
            for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
                p = cute.math.exp2(acc_S_mn[r, c] * self.scale_log2 - shift, fastmath=True)
                acc_S_mn[r, c] = p
                self.row_sum[first_row + r] = self.row_sum[first_row + r] + p

    @cute.jit
    def finish(
        self, acc_O_mn: cute.Tensor, lse: cute.Tensor, sink: Any = None, keep_scale: Any = None
    ):
        """Divide O by l and write the log-sum-exp of each row; no keys: O = 0, LSE = -inf.

        `sink`, a logit without a value, is what LSE is without keys. It takes part in l:

            l <- l + 2^(sink_log2 - m c), both taken relative to the larger of m c and sink_log2

        `keep_scale` multiplies O alone, for what dropout has kept.
        """
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            row_sum = self.row_sum[r]
            for offset in cutlass.range_constexpr(1, 3):
                row_sum += cute.arch.shuffle_sync_bfly(row_sum, offset=offset)
            empty = row_sum == 0.0
            m_log2 = self.row_max[r] * self.scale_log2
            factor, nothing = Float32(1.0), -Float32.inf
            if const_expr(sink is not None):
                nothing, sink_log2 = sink, sink * LOG2_E
                m_old = m_log2
                m_log2 = cute.arch.fmax(m_old, sink_log2)
                factor = cute.math.exp2(m_old - m_log2, fastmath=True)
                row_sum = row_sum * factor + cute.math.exp2(sink_log2 - m_log2, fastmath=True)
            if const_expr(keep_scale is not None):
                factor = factor * keep_scale
            inverse = 0.0 if empty else factor * cute.arch.rcp_approx(row_sum)
            acc_O_mn[r, None] = acc_O_mn[r, None].load() * inverse
            # ln l + m * scale, with scale = c ln 2
            lse[r] = nothing if empty else (cute.math.log2(row_sum) + m_log2) / LOG2_E

    @cute.jit
    def _lane_max(self, acc_S_mn: cute.Tensor) -> cute.Tensor:
        """The larger of m and this lane's scores, row by row.

        Column by column, so that the rows' chains of dependent maxima overlap.
        """
        lane_max = cute.make_fragment_like(self.row_max)
        lane_max.store(self.row_max.load())
        for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
            for r in cutlass.range_constexpr(cute.size(lane_max)):
                lane_max[r] = cute.arch.fmax(lane_max[r], acc_S_mn[r, c])
        return lane_max


@cute.jit
def quad_max(lane_max: cute.Tensor) -> cute.Tensor:
    """The largest value, row by row, of the four lanes that share the rows."""
    row_max = cute.make_fragment_like(lane_max)
    row_max.store(lane_max.load())
    for offset in cutlass.range_constexpr(1, 3):
        for r in cutlass.range_constexpr(cute.size(row_max)):
            other = cute.arch.shuffle_sync_bfly(row_max[r], offset=offset)
            row_max[r] = cute.arch.fmax(row_max[r], other)
    return row_max

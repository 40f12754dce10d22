"""The band mask: which keys a query row may see, and which key blocks that leaves.

Positions are aligned at the bottom right: row i of seqlen_q sees key j of seqlen_k iff

    i + seqlen_k - seqlen_q - left  <=  j  <=  i + seqlen_k - seqlen_q + right

Which bounds exist is known at compile time, their values at run time, so one kernel serves every
window size. The bound j < seqlen_k always holds.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from .seqlen import SeqlenInfo


@dataclass(frozen=True)
class BandMask:
    """A band with a left bound, a right bound, both or neither, over one pair of sequences."""

    has_left: Constexpr[bool]
    has_right: Constexpr[bool]
    left: Int32
    right: Int32
    seqlen_k: Int32
    diagonal: Int32  # seqlen_k - seqlen_q: the key that the mask centres on for row 0

    @staticmethod
    def of(rule, left: Int32, right: Int32, seqlen: SeqlenInfo) -> "BandMask":
        """`rule` tells which bounds exist: anything with `has_left` and `has_right`."""
        return BandMask(
            rule.has_left,
            rule.has_right,
            left,
            right,
            seqlen.seqlen_k,
            seqlen.seqlen_k - seqlen.seqlen_q,
        )

    @cute.jit
    def first_key(self, row: Int32) -> Int32:
        """Smallest key that `row` sees."""
        key = Int32(0)
        if const_expr(self.has_left):
            key = cutlass.max(row + self.diagonal - self.left, 0)
        return key

    @cute.jit
    def end_key(self, row: Int32) -> Int32:
        """One past the largest key that `row` sees; may lie below `first_key`, or below 0."""
        key = self.seqlen_k
        if const_expr(self.has_right):
            key = cutlass.min(row + self.diagonal + self.right + 1, self.seqlen_k)
        return key

    @cute.jit
    def blocks(self, row: Int32, end_row: Int32, block_n: Constexpr[int]):
        """Key blocks [lo, hi) that the rows [row, end_row) need; lo == hi if they see no key."""
        hi = cute.ceil_div(cutlass.max(self.end_key(end_row - 1), 0), block_n)
        lo = cutlass.min(self.first_key(row) // block_n, hi)
        return lo, hi

    @cute.jit
    def full_blocks(self, row: Int32, end_row: Int32, block_n: Constexpr[int]):
        """Key blocks [lo, hi) within `blocks` that every row of [row, end_row) sees whole."""
        hi = cutlass.max(self.end_key(row), 0) // block_n
        lo = Int32(0)
        if const_expr(self.has_left):
            lo = cute.ceil_div(self.first_key(end_row - 1), block_n)
        return lo, hi

    @cute.jit
    def apply(self, acc_mn: cute.Tensor, coord_mn: cute.Tensor, row: Int32, key: Int32):
        """Set to -inf the scores that the mask hides.

        `acc_mn` and `coord_mn` are (rows, columns) views of one thread's scores and of their
        (row, column) coordinates inside a tile whose corner is (`row`, `key`).
        """
        for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
            first = self.first_key(row + coord_mn[r, 0][0]) - key - coord_mn[0, 0][1]
            end = self.end_key(row + coord_mn[r, 0][0]) - key - coord_mn[0, 0][1]
            for c in cutlass.range_constexpr(cute.size(acc_mn, mode=[1])):
                # Relative to this thread's first column, every column is a compile-time constant.
                column = coord_mn[0, c][1] - coord_mn[0, 0][1]
                hidden = column >= end
                if const_expr(self.has_left):
                    hidden = hidden or column < first
                acc_mn[r, c] = -Float32.inf if hidden else acc_mn[r, c]

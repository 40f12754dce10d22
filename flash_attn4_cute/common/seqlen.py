"""Where the rows of one sequence begin and how many of them count."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ..arguments import ForwardArgs


@dataclass(frozen=True)
class SeqlenInfo:
    """Offsets (rows, 0 unless packed) and lengths (rows) of sequence `batch`."""

    offset_q: Int32
    offset_k: Int32
    seqlen_q: Int32
    seqlen_k: Int32

    @staticmethod
    @cute.jit
    def of(args: ForwardArgs, batch: Int32) -> "SeqlenInfo":
        offset_q, seqlen_q = extent(args.mQ, args.mCuSeqlensQ, args.mSeqUsedQ, batch)
        offset_k, seqlen_k = extent(args.mK, args.mCuSeqlensK, args.mSeqUsedK, batch)
        mPageTable = getattr(args, "mPageTable", None)
        if const_expr(mPageTable is not None and args.mSeqUsedK is None):
            seqlen_k = Int32(cute.size(mPageTable, mode=[1]) * cute.size(args.mK, mode=[1]))
        return SeqlenInfo(offset_q, offset_k, seqlen_q, seqlen_k)


@cute.jit
def extent(mX: cute.Tensor, mCuSeqlens, mSeqUsed, batch: Int32):
    """(first row, number of rows) of sequence `batch` in mX."""
    offset = Int32(0)
    if const_expr(mCuSeqlens is not None):
        offset = mCuSeqlens[batch]
        seqlen = mCuSeqlens[batch + 1] - offset
    else:
        seqlen = Int32(cute.size(mX, mode=[1]))
    if const_expr(mSeqUsed is not None):
        # A padded row of a captured graph carries -1: it has no keys.
        seqlen = cutlass.max(mSeqUsed[batch], 0)
    return offset, seqlen

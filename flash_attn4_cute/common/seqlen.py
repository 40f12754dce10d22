"""Where the rows of one sequence begin and how many of them count."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ..arguments import ForwardArgs


@dataclass(frozen=True)
class SeqlenInfo:
    """Offsets and lengths, in rows, of one sequence, and its row `batch_k` of dense K and V.

    Offsets are 0 in dense tensors, but for left padding of the keys.
    """

    offset_q: Int32
    offset_k: Int32
    seqlen_q: Int32
    seqlen_k: Int32
    batch_k: Int32

    @staticmethod
    @cute.jit
    def of(args: ForwardArgs, batch: Int32) -> "SeqlenInfo":
        offset_q, seqlen_q = extent(args.mQ, args.mCuSeqlensQ, args.mSeqUsedQ, batch)
        offset_k, seqlen_k = extent(args.mK, args.mCuSeqlensK, args.mSeqUsedK, batch)
        mPageTable = getattr(args, "mPageTable", None)
        if const_expr(mPageTable is not None and args.mSeqUsedK is None):
            seqlen_k = Int32(cute.size(mPageTable, mode=[1]) * cute.size(args.mK, mode=[1]))
        batch_k, mKvRow, mLeftPad = (
            batch,
            getattr(args, "mKvRow", None),
            getattr(args, "mLeftPad", None),
        )
        if const_expr(mKvRow is not None):
            batch_k = mKvRow[batch]
        if const_expr(mLeftPad is not None):
            offset_k = mLeftPad[batch]
            seqlen_k = cutlass.max(seqlen_k - offset_k, 0)
        return SeqlenInfo(offset_q, offset_k, seqlen_q, seqlen_k, batch_k)


@cute.jit
def sequence_of(mCuSeqlens: cute.Tensor, token: Int32):
    """(sequence, number in it) of a token of packed sequences; (-1, .) for one that none holds."""
    # The last sequence that starts at or before the token; empty ones start where the next does.
    # Invariant: mCuSeqlens[low] <= token < mCuSeqlens[high].
    low, high = Int32(0), Int32(cute.size(mCuSeqlens)) - 1
    batch, index = Int32(-1), token
    if token < mCuSeqlens[high]:
        while high - low > 1:
            middle = (low + high) // 2
            if mCuSeqlens[middle] <= token:
                low = middle
            else:
                high = middle
        batch, index = low, token - mCuSeqlens[low]
    return batch, index


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

"""Bundles of tensors and scalars that travel into the decode and combine kernels.

Named tuples for the reason given in `arguments`.
"""

from typing import Any, NamedTuple

from .arguments import Float32, Int32, ScoreArgs, Tensor


class DecodeArgs(NamedTuple):
    """Run-time arguments of one decode launch.

    `mQ`, `mO` (b, sq, h, d) or (total_q, h, d); `mK`, `mV` (b, sk, h_k, d), (total_k, h_k, d) or
    (pages, page_size, h_k, d); `mLSE` (b, h, sq) or (h, total_q). With `mWorkspace`, float32 of
    `num_splits` times as many values as mO and mLSE have, keys are split.
    K and V of e4m3 come as d / 2 elements of Q's type, `mKDescale` and `mVDescale` (b, h_k) float32
    are their factors. The others are ForwardArgs'.
    """

    mQ: Tensor
    mK: Tensor
    mV: Tensor
    mO: Tensor
    mLSE: Tensor | None
    mWorkspace: Tensor | None
    mCuSeqlensQ: Tensor | None
    mCuSeqlensK: Tensor | None
    mSeqUsedQ: Tensor | None
    mSeqUsedK: Tensor | None
    mPageTable: Tensor | None
    mKvRow: Tensor | None
    mLeftPad: Tensor | None
    mKDescale: Tensor | None
    mVDescale: Tensor | None
    softmax_scale: Float32
    window_left: Int32
    window_right: Int32
    max_seqlen_q: Int32
    num_splits: Int32
    score: ScoreArgs | None


class CombineArgs(NamedTuple):
    """Run-time arguments of one merge of partial results.

    `mOPartial` (parts, b, sq, h, d) or (parts, total_q, h, d), `mLSEPartial` (parts, b, h, sq) or
    (parts, h, total_q), float32; `mO` and `mLSE` without the parts. Two parts may come as a pair of
    tensors of the same strides. A part whose LSE is not finite
    is not read. `mSink` (h,), a logit without a value, takes part in every row. With
    `mCuSeqlensQ` or `mSeqUsedQ`, only rows that belong to a sequence are written.
    """

    mOPartial: Any
    mLSEPartial: Any
    mO: Tensor
    mLSE: Tensor | None
    mCuSeqlensQ: Tensor | None
    mSeqUsedQ: Tensor | None
    mSink: Tensor | None
    max_seqlen_q: Int32

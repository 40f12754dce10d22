"""Bundles of tensors and scalars that travel into the kernels.

Named tuples rather than dataclasses: quack-kernels, which vLLM, SGLang and upstream bring along,
replaces a function of CuTe DSL by one that cannot take a dataclass across the host boundary.
"""

from typing import Any, NamedTuple, TypeAlias

# Fields hold CuTe DSL's values while a kernel is traced, PyTorch's tensors and Python's numbers at
# a launch. Names only: importing CuTe DSL takes seconds, and launching does without it.
Tensor: TypeAlias = Any
Float32: TypeAlias = Any
Int32: TypeAlias = Any
Uint32: TypeAlias = Any

# A scale of 0 makes every visible key count the same; 0 * -inf would not hide the others.
SMALLEST_SCALE = 1e-30
UNBOUNDED = 2**31 - 1  # CTAs: as many as there are tiles


class ScoreArgs(NamedTuple):
    """The numbers of the steps of a ScoreRule; those of an absent step are not read.

    `mAlibi` (b, h) float32; `mSink` (h,); `mDropoutState` (2,) int64, the Philox seed and offset.
    An element is kept if its random word is at least `dropout_threshold`, and then counts
    `keep_scale` times.
    """

    scale: Float32
    softcap: Float32
    mAlibi: Tensor | None
    mSink: Tensor | None
    mDropoutState: Tensor | None
    dropout_threshold: Uint32
    keep_scale: Float32
    aux_tensors: tuple | None


class BlockArgs(NamedTuple):
    """A block-sparse mask: for each tile of queries the key tiles to visit, see block_sparse.py.

    `mCount` (b, h, tiles), `mList` (b, h, tiles, key tiles) int32; `mKinds` (b, h, M, N) uint8 for
    blocks of `rows` queries and `keys` keys.
    """

    mCount: Tensor
    mList: Tensor
    mKinds: Tensor
    rows: Int32
    keys: Int32


class ForwardArgs(NamedTuple):
    """Run-time arguments of one forward launch, in the layouts that PyTorch users pass.

    `mQ`, `mO` (b, sq, h, d) or (total_q, h, d); `mK`, `mV` (b, sk, h_k, d) or (total_k, h_k, d);
    `mLSE` (b, h, sq) or (h, total_q), float32, natural logarithm. `mKvRow` (b,) is the row of dense
    K and V that belongs to each sequence, `mLeftPad` (b,) the first key that counts in it. With
    `mPageTable`, K and V are (pages, page_size, h_k, d). With `mWorkspace`, float32 of `num_splits`
    times as many values as mO and mLSE have, keys are split. CTAs take their tiles from
    `mTileCounter` (1,) int32; it is 0 at the start if there are more tiles than `max_ctas`.
    `softmax_scale` is the factor in the exponentials; `score` is None without steps before them.
    `window_left` and `window_right` are read only where the mask rule has that bound. `max_ctas`
    bounds the grid: fewer CTAs than tiles compute several each.
    K and V of e4m3 come as d / 2 elements of Q's type, `mKDescale` and `mVDescale` (b, h_k) float32
    are their factors.
    """

    mQ: Tensor
    mK: Tensor
    mV: Tensor
    mO: Tensor
    mLSE: Tensor | None
    mCuSeqlensQ: Tensor | None
    mCuSeqlensK: Tensor | None
    mSeqUsedQ: Tensor | None
    mSeqUsedK: Tensor | None
    mKvRow: Tensor | None
    mLeftPad: Tensor | None
    mPageTable: Tensor | None
    mKDescale: Tensor | None
    mVDescale: Tensor | None
    mWorkspace: Tensor | None
    mTileCounter: Tensor | None
    softmax_scale: Float32
    window_left: Int32
    window_right: Int32
    max_seqlen_q: Int32
    max_ctas: Int32
    num_splits: Int32
    score: ScoreArgs | None
    blocks: BlockArgs | None

    @property
    def reads_counter(self) -> bool:
        """Whether the launch counts in `mTileCounter`. On the host."""
        return self.mTileCounter is not None and self.max_ctas != UNBOUNDED


class AppendArgs(NamedTuple):
    """Run-time arguments of one launch that appends to a cache, as PyTorch users pass them.

    `mKNew`, `mVNew` (b, s_new, h_k, d | d_v) or (total_new, h_k, d | d_v); `mK`, `mV`
    (rows, sk, h_k, d | d_v) or (pages, page_size, h_k, d | d_v); `mQ`, `mQRotated` (b, sq, h, d) or
    (total_q, h, d), there only with rotary tables `mCos`, `mSin` (positions, rotary_dim / 2).
    `mK`, `mV` of an fp8 cache are its bytes, `mKDescale`, `mVDescale` (b, h_k) float32 its factors.
    `mSeqUsed` receives the lengths after the update. Query i is rotated to the sequence's
    cache_seqlens + `query_step` * i. `capacity` is the number of tokens a sequence can hold.
    """

    mKNew: Tensor
    mVNew: Tensor
    mK: Tensor
    mV: Tensor
    mQ: Tensor | None
    mQRotated: Tensor | None
    mCos: Tensor | None
    mSin: Tensor | None
    mKDescale: Tensor | None
    mVDescale: Tensor | None
    mCacheSeqlens: Tensor
    mSeqUsed: Tensor
    mCuSeqlensNew: Tensor | None
    mCuSeqlensQ: Tensor | None
    mPageTable: Tensor | None
    mBatchIdx: Tensor | None
    query_step: Int32
    capacity: Int32

"""Stand-ins for the arguments of a launch, from which kernels are traced and compiled."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Uint32

from .append_kv import AppendKv
from .append_plan import AppendKey
from .arguments import AppendArgs, BlockArgs, ForwardArgs, ScoreArgs
from .kernel_keys import ForwardKey
from .problem import Layout
from .rules import PLAIN, ScoreRule
from .sm100.forward import ForwardSm100
from .sm120.forward import ForwardSm120

NUMERIC = {
    torch.float16: cutlass.Float16,
    torch.bfloat16: cutlass.BFloat16,
    torch.float32: Float32,
    torch.int32: Int32,
    torch.int64: cutlass.Int64,
    torch.int16: cutlass.Int16,
    torch.int8: cutlass.Int8,
    torch.uint8: cutlass.Uint8,
}
FORWARD = {"sm100": ForwardSm100, "sm120": ForwardSm120}


def rows(dtype, shape: tuple, present: bool = True) -> cute.Tensor | None:
    """A tensor whose last dimension is contiguous and whose rows are 16-byte aligned."""
    if not present:
        return None
    divisibility = 128 // dtype.width
    strides = (*(cute.sym_int64(divisibility=divisibility) for _ in shape[1:]), 1)
    return cute.runtime.make_fake_tensor(dtype, shape, strides, assumed_align=16)


def vectors(dtype, shape: tuple, vector: int) -> cute.Tensor:
    """A tensor read and written `vector` elements at a time; with 1, it may have any strides."""
    if vector > 1:
        return rows(dtype, shape)
    strides = tuple(cute.sym_int64() for _ in shape)
    return cute.runtime.make_fake_tensor(dtype, shape, strides, assumed_align=dtype.width // 8)


def values(dtype, shape: tuple, present: bool = True) -> cute.Tensor | None:
    """A tensor of 4-byte values whose last dimension is contiguous."""
    if not present:
        return None
    strides = (*(cute.sym_int64() for _ in shape[1:]), 1)
    return cute.runtime.make_fake_tensor(dtype, shape, strides, assumed_align=4)


def trace_forward(key: ForwardKey) -> tuple:
    """The forward kernel for `key`, and a ForwardArgs that stands for its launches'."""
    dtype = NUMERIC[key.dtype]
    batch, heads, heads_kv = cute.sym_int(), cute.sym_int(), cute.sym_int()
    packed_q = key.q_layout is Layout.VARLEN
    d, d_v = cute.sym_int(divisibility=8), key.merged_dim or cute.sym_int(divisibility=8)
    d_of_k, d_of_v = d, d_v
    if key.has_fp8_kv:
        d_of_k = cute.sym_int(divisibility=8)
        d_of_v = key.merged_dim // 2 or cute.sym_int(divisibility=8)
    total_q = cute.sym_int()
    kv_lead = {
        Layout.DENSE: (cute.sym_int() if key.has_kv_batch_idx else batch, cute.sym_int()),
        Layout.VARLEN: (cute.sym_int(),),
        Layout.PAGED: (cute.sym_int(), cute.sym_int(divisibility=key.cfg.box_n or 1)),
    }[key.kv_layout]
    q_lead = (total_q,) if packed_q else (batch, total_q)

    lse_shape = (heads, total_q) if packed_q else (batch, heads, total_q)
    args = ForwardArgs(
        mQ=rows(dtype, (*q_lead, heads, d)),
        mK=rows(dtype, (*kv_lead, heads_kv, d_of_k)),
        mV=rows(dtype, (*kv_lead, heads_kv, d_of_v)),
        mO=rows(dtype, (*q_lead, heads, d_v)),
        mLSE=values(Float32, lse_shape, key.has_lse),
        mCuSeqlensQ=values(Int32, (cute.sym_int(),), packed_q),
        mCuSeqlensK=values(Int32, (cute.sym_int(),), key.kv_layout is Layout.VARLEN),
        mSeqUsedQ=values(Int32, (cute.sym_int(),), key.has_seqused_q),
        mSeqUsedK=values(Int32, (cute.sym_int(),), key.has_seqused_k),
        mKvRow=values(Int32, (cute.sym_int(),), key.has_kv_batch_idx),
        mLeftPad=values(Int32, (cute.sym_int(),), key.has_leftpad),
        mPageTable=values(Int32, (cute.sym_int(), cute.sym_int()), key.kv_layout is Layout.PAGED),
        mKDescale=vectors(Float32, (batch, heads_kv), 1) if key.has_k_descale else None,
        mVDescale=vectors(Float32, (batch, heads_kv), 1) if key.has_v_descale else None,
        mWorkspace=rows(Float32, (cute.sym_int64(),), key.merged_dim > 0),
        mTileCounter=values(Int32, (1,), key.counts_tiles),
        softmax_scale=Float32(1.0),
        window_left=Int32(0),
        window_right=Int32(0),
        max_seqlen_q=Int32(0),
        max_ctas=Int32(0),
        num_splits=Int32(1),
        score=score_args(key.score),
        blocks=block_args() if key.rule.block_sparse else None,
    )
    return FORWARD[key.family](dtype, key.cfg, key.rule, key.score), (args,)


def anything(dtype: torch.dtype, rank: int) -> cute.Tensor:
    """A tensor of any shape and strides, read element by element."""
    shape = tuple(cute.sym_int() for _ in range(rank))
    return vectors(NUMERIC[torch.uint8 if dtype is torch.bool else dtype], shape, 1)


def block_args() -> BlockArgs:
    """A BlockArgs that stands for those of launches."""
    return BlockArgs(
        mCount=anything(torch.int32, 3),
        mList=anything(torch.int32, 4),
        mKinds=anything(torch.uint8, 4),
        rows=Int32(0),
        keys=Int32(0),
    )


def score_args(rule: ScoreRule) -> ScoreArgs | None:
    """A ScoreArgs that stands for those of launches of this rule."""
    if rule == PLAIN:
        return None

    return ScoreArgs(
        scale=Float32(1.0),
        softcap=Float32(1.0),
        mAlibi=anything(torch.float32, 2) if rule.alibi else None,
        mSink=None if rule.sink is None else anything(rule.sink, 1),
        mDropoutState=anything(torch.int64, 1) if rule.dropout else None,
        dropout_threshold=Uint32(0),
        keep_scale=Float32(1.0),
        aux_tensors=tuple(anything(*aux) for aux in rule.aux) or None,
    )


def trace_append(key: AppendKey) -> tuple:
    """The append kernel for `key`, and an AppendArgs that stands for its launches'."""
    dtype, rotates = NUMERIC[key.dtype], key.rotary_dim > 0
    heads, heads_kv = cute.sym_int(), cute.sym_int()

    def tokens(packed: bool, *inner) -> cute.Tensor:
        outer = (cute.sym_int(),) if packed else (cute.sym_int(), cute.sym_int())
        return vectors(dtype, (*outer, *inner), key.vector)

    def cache(head_dim: int) -> cute.Tensor:
        shape = (cute.sym_int(), cute.sym_int(), heads_kv, head_dim)
        return vectors(cutlass.Uint8 if key.fp8 else dtype, shape, key.vector)

    def descale(present: bool) -> cute.Tensor | None:
        return vectors(Float32, (cute.sym_int(), heads_kv), 1) if present else None

    def indices(*shape, present: bool = True) -> cute.Tensor | None:
        return values(Int32, shape, present)

    def table() -> cute.Tensor | None:
        shape = (cute.sym_int(), key.rotary_dim // 2)
        return vectors(dtype, shape, key.vector) if rotates else None

    args = AppendArgs(
        mKNew=tokens(key.packed_new, heads_kv, key.head_dim),
        mVNew=tokens(key.packed_new, heads_kv, key.head_dim_v),
        mK=cache(key.head_dim),
        mV=cache(key.head_dim_v),
        mQ=tokens(key.packed_q, heads, key.head_dim) if rotates else None,
        mQRotated=tokens(key.packed_q, heads, key.head_dim) if rotates else None,
        mCos=table(),
        mSin=table(),
        mKDescale=descale(key.has_k_descale),
        mVDescale=descale(key.has_v_descale),
        mCacheSeqlens=indices(cute.sym_int()),
        mSeqUsed=indices(cute.sym_int()),
        mCuSeqlensNew=indices(cute.sym_int(), present=key.packed_new),
        mCuSeqlensQ=indices(cute.sym_int(), present=key.packed_q),
        mPageTable=indices(cute.sym_int(), cute.sym_int(), present=key.paged),
        mBatchIdx=indices(cute.sym_int(), present=key.has_batch_idx),
        query_step=Int32(0),
        capacity=Int32(0),
    )
    return AppendKv(key), (args,)

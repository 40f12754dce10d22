"""Stand-ins for the arguments of decode launches and merges; see `signature`."""

import cutlass.cute as cute
from cutlass import Float32, Int32

from .combine import CombineKernel
from .combine_plan import CombineKey
from .decode_arguments import CombineArgs, DecodeArgs
from .kernel_keys import DecodeKey
from .problem import Layout
from .signature import NUMERIC, rows, score_args, values, vectors
from .sm120.decode import DecodeSm120

DECODE = {"sm120": DecodeSm120}


def trace_decode(key: DecodeKey) -> tuple:
    """The decode kernel for `key`, and a DecodeArgs that stands for its launches'."""
    dtype, d, d_v = NUMERIC[key.dtype], key.head_dim, key.head_dim_v
    batch, heads, heads_kv = cute.sym_int(), cute.sym_int(), cute.sym_int()
    packed_q = key.q_layout is Layout.VARLEN
    kv_lead = {
        Layout.DENSE: (cute.sym_int() if key.has_kv_batch_idx else batch, cute.sym_int()),
        Layout.VARLEN: (cute.sym_int(),),
        Layout.PAGED: (cute.sym_int(), cute.sym_int(divisibility=key.box_n or 1)),
    }[key.kv_layout]
    q_shape = (cute.sym_int(), heads, d) if packed_q else (batch, cute.sym_int(), heads, d)
    lse_shape = (heads, cute.sym_int()) if packed_q else (batch, heads, cute.sym_int())
    per_sequence, starts = (cute.sym_int(),), (cute.sym_int(),)
    args = DecodeArgs(
        mQ=rows(dtype, q_shape),
        mK=rows(dtype, (*kv_lead, heads_kv, d * key.cfg.kv_bytes // 2)),
        mV=rows(dtype, (*kv_lead, heads_kv, d_v * key.cfg.kv_bytes // 2)),
        mO=rows(dtype, (*q_shape[:-1], d_v)),
        mLSE=values(Float32, lse_shape, key.has_lse),
        mWorkspace=rows(Float32, (cute.sym_int64(),), key.is_split),
        mCuSeqlensQ=values(Int32, starts, packed_q),
        mCuSeqlensK=values(Int32, starts, key.kv_layout is Layout.VARLEN),
        mSeqUsedQ=values(Int32, per_sequence, key.has_seqused_q),
        mSeqUsedK=values(Int32, per_sequence, key.has_seqused_k),
        mPageTable=values(
            Int32, (cute.sym_int(), cute.sym_int()), key.kv_layout is Layout.PAGED
        ),
        mKvRow=values(Int32, per_sequence, key.has_kv_batch_idx),
        mLeftPad=values(Int32, per_sequence, key.has_leftpad),
        mKDescale=vectors(Float32, (batch, heads_kv), 1) if key.has_k_descale else None,
        mVDescale=vectors(Float32, (batch, heads_kv), 1) if key.has_v_descale else None,
        softmax_scale=Float32(1.0),
        window_left=Int32(0),
        window_right=Int32(0),
        max_seqlen_q=Int32(0),
        num_splits=Int32(1),
        score=score_args(key.score),
    )  # fmt: skip
    return DECODE[key.family](dtype, key.cfg, key.rule, key.score, key.box_n), (args,)


def trace_combine(key: CombineKey) -> tuple:
    """The merge for `key`, and a CombineArgs that stands for its launches'."""
    heads, length = cute.sym_int(), cute.sym_int()
    batch = () if key.packed else (cute.sym_int(),)
    shape, lse_shape = (*batch, length, heads, key.head_dim), (*batch, heads, length)

    def parts(dtype, shape: tuple, vector: int):
        if key.stacked:
            return vectors(dtype, (cute.sym_int(), *shape), vector)
        # The layout of the first is that of both.
        return vectors(dtype, shape, vector), vectors(dtype, shape, vector)

    args = CombineArgs(
        mOPartial=parts(NUMERIC[key.dtype], shape, key.vector),
        mLSEPartial=parts(Float32, lse_shape, 1),
        mO=vectors(NUMERIC[key.out_dtype], shape, key.vector),
        mLSE=vectors(Float32, lse_shape, 1),
        mCuSeqlensQ=None,
        mSeqUsedQ=None,
        mSink=None,
        max_seqlen_q=Int32(0),
    )
    return CombineKernel(key.head_dim, key.vector), (args,)

"""Wrong calls, and what their messages must say: exception | beginning | a piece of the way out."""

from __future__ import annotations

import torch

BATCH, HEADS, KV_HEADS, DIM, SQ, SK = 2, 4, 2, 16, 3, 5
SENTINEL = 7.0


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def rand(*shape, dtype=torch.float32):
    return torch.rand(shape).to(dtype)


def dense(**changes):
    """Arguments of flash_attn_func that are right but for `changes`."""
    arguments = {
        "q": rand(BATCH, SQ, HEADS, DIM),
        "k": rand(BATCH, SK, KV_HEADS, DIM),
        "v": rand(BATCH, SK, KV_HEADS, DIM),
        "out": torch.full((BATCH, SQ, HEADS, DIM), SENTINEL),
    }
    return "flash_attn_func", arguments | changes


def varlen(**changes):
    """The same for flash_attn_varlen_func with packed tokens."""
    arguments = {
        "q": rand(6, HEADS, DIM),
        "k": rand(10, KV_HEADS, DIM),
        "v": rand(10, KV_HEADS, DIM),
        "cu_seqlens_q": ints(0, 2, 6),
        "cu_seqlens_k": ints(0, 5, 10),
        "out": torch.full((6, HEADS, DIM), SENTINEL),
    }
    return "flash_attn_varlen_func", arguments | changes


def paged(**changes):
    """The same with pages: 2 sequences of 3 pages of 4 tokens in a cache of 8 pages."""
    arguments = {
        "q": rand(6, HEADS, DIM),
        "k": rand(8, 4, KV_HEADS, DIM),
        "v": rand(8, 4, KV_HEADS, DIM),
        "cu_seqlens_q": ints(0, 2, 6),
        "seqused_k": ints(5, 9),
        "page_table": ints(3, 1, -1, 0, 7, 5).view(2, 3),
        "out": torch.full((6, HEADS, DIM), SENTINEL),
    }
    return "flash_attn_varlen_func", arguments | changes


def cache(**changes):
    """The same for flash_attn_with_kvcache, appending 2 tokens."""
    arguments = {
        "q": rand(BATCH, 2, HEADS, DIM),
        "k_cache": torch.full((3, 8, KV_HEADS, DIM), SENTINEL),
        "v_cache": torch.full((3, 8, KV_HEADS, DIM), SENTINEL),
        "k": rand(BATCH, 2, KV_HEADS, DIM),
        "v": rand(BATCH, 2, KV_HEADS, DIM),
        "cache_seqlens": ints(1, 4),
        "cache_batch_idx": ints(2, 0),
        "out": torch.full((BATCH, 2, HEADS, DIM), SENTINEL),
    }
    return "flash_attn_with_kvcache", arguments | changes


def engine(**changes):
    """The same for _flash_attn_fwd."""
    return "_flash_attn_fwd", dense(**changes)[1]


def combine(**changes):
    """The same for flash_attn_combine, 3 parts."""
    arguments = {
        "out_partial": rand(3, BATCH, SQ, HEADS, DIM),
        "lse_partial": rand(3, BATCH, SQ, HEADS),
        "out": torch.full((BATCH, SQ, HEADS, DIM), SENTINEL),
    }
    return "flash_attn_combine", arguments | changes


def merge(**changes):
    """The same for merge_attention_states."""
    out, lse = rand(BATCH, SQ, HEADS, DIM), rand(BATCH, HEADS, SQ)
    return "merge_attention_states", {
        "out_a": out,
        "lse_a": lse,
        "out_b": out,
        "lse_b": lse,
    } | changes


def metadata(**changes):
    """The same for get_scheduler_metadata."""
    arguments = {
        "batch_size": BATCH,
        "max_seqlen_q": 1,
        "max_seqlen_k": SK,
        "num_heads_q": HEADS,
        "num_heads_kv": KV_HEADS,
        "headdim": DIM,
        "cache_seqlens": ints(5, 5),
    }
    return "get_scheduler_metadata", arguments | changes


def on_meta(t):
    return t.to("meta")


CU_DOWN = ints(0, 7, 6)
ROTARY = {"rotary_cos": rand(16, 4), "rotary_sin": rand(16, 4)}

CASES = {
    # types and dtypes
    "q is no tensor": (dense(q=[1.0]), "TypeError | q=list: must be a torch.Tensor | tensor"),
    "v is no tensor": (
        dense(v=None),
        "TypeError | v=NoneType: must be a torch.Tensor | Pass a tensor",
    ),
    "dtype of q": (
        dense(q=rand(BATCH, SQ, HEADS, DIM, dtype=torch.float64)),
        "TypeError | q.dtype=torch.float64: must be | q.to(torch.bfloat16)",
    ),
    "dtypes differ": (
        dense(k=rand(BATCH, SK, KV_HEADS, DIM, dtype=torch.float16)),
        "TypeError | k.dtype=torch.float16: must be q's dtype, torch.float32 | k.to(q.dtype)",
    ),
    "causal": (dense(causal="yes"), "TypeError | causal='yes': must be True or False | bool"),
    "pack_gqa": (dense(pack_gqa=2), "TypeError | pack_gqa=2: must be | None"),
    "softcap is no number": (dense(softcap="x"), "TypeError | softcap='x': must be | float"),
    "num_splits is no integer": (dense(num_splits=1.5), "TypeError | num_splits=1.5 | int"),
    "score_mod": (dense(score_mod=3), "TypeError | score_mod=3: must be callable | function"),
    "mask_mod": (dense(mask_mod=3), "TypeError | mask_mod=3: must be callable | function"),
    # devices
    "device of k": (
        dense(k=on_meta(rand(BATCH, SK, KV_HEADS, DIM))),
        "ValueError | k.device=meta: must be q's device, cpu | k.to('cpu')",
    ),
    "device of s_aux": (
        dense(s_aux=on_meta(rand(HEADS))),
        "ValueError | s_aux.device=meta: must be q's device, cpu | s_aux.to('cpu')",
    ),
    "device without kernels": (
        dense(**{name: on_meta(t) for name, t in dense()[1].items()}),
        "NotImplementedError | q.device=meta: there are kernels for cpu and cuda tensors"
        " | Move q, k and v",
    ),
    # shapes
    "rank of q": (
        dense(q=rand(SQ, HEADS, DIM)),
        "ValueError | q.shape=(3, 4, 16): must have 4 dimensions | pass cu_seqlens_q",
    ),
    "rank of k": (
        dense(k=rand(SK, KV_HEADS, DIM)),
        "ValueError | k.shape=(5, 2, 16): must have 4 dimensions | cu_seqlens_k",
    ),
    "rank of packed q": (
        varlen(q=rand(1, 6, HEADS, DIM)),
        "ValueError | q.shape=(1, 6, 4, 16): must have 3 dimensions | Drop cu_seqlens_q",
    ),
    "rank of packed k": (
        varlen(k=rand(1, 10, KV_HEADS, DIM)),
        "ValueError | k.shape=(1, 10, 2, 16): must have 3 dimensions | Drop cu_seqlens_k",
    ),
    "rank of pages": (
        paged(k=rand(32, KV_HEADS, DIM)),
        "ValueError | k.shape=(32, 2, 16): must have 4 dimensions (pages, page_size, h_k, d)"
        " | Drop the page_table",
    ),
    "batch": (
        dense(k=rand(3, SK, KV_HEADS, DIM), v=rand(3, SK, KV_HEADS, DIM)),
        "ValueError | batch of k=3: must be q's, 2 | as many key sequences",
    ),
    "batch of cu_seqlens_k": (
        varlen(cu_seqlens_k=ints(0, 10)),
        "ValueError | batch of cu_seqlens_k=1: must be q's, 2 | as many key sequences",
    ),
    "head counts": (
        dense(q=rand(BATCH, SQ, 3, DIM)),
        "ValueError | num_heads=3 for 2 key heads: the query heads must be a positive multiple"
        " | divides q's",
    ),
    "head_dim of k": (
        dense(k=rand(BATCH, SK, KV_HEADS, 8)),
        "ValueError | k.shape[-1]=8: must be q's head_dim, 16 | Only v may",
    ),
    "head_dim 0": (
        dense(q=rand(BATCH, SQ, HEADS, 0), k=rand(BATCH, SK, KV_HEADS, 0)),
        "ValueError | head_dim=0: must be at least 1 | last dimension of 1 or more",
    ),
    "head_dim_v 0": (
        dense(v=rand(BATCH, SK, KV_HEADS, 0)),
        "ValueError | head_dim_v=0: must be at least 1 | last dimension of 1 or more",
    ),
    "tokens of v": (
        dense(v=rand(BATCH, 4, KV_HEADS, DIM)),
        "ValueError | v.shape=(2, 4, 2, 16): must be k's shape (2, 5, 2, 16) except | same tokens",
    ),
    "shape of s_aux": (
        dense(s_aux=rand(KV_HEADS)),
        "ValueError | s_aux.shape=(2,): must be (h,) = (4,) | s_aux",
    ),
    "shape of alibi_slopes": (
        dense(alibi_slopes=rand(3, HEADS)),
        "ValueError | alibi_slopes.shape=(3, 4): must be (h,) = (4,) or (b, h) = (2, 4)"
        " | one slope per query head",
    ),
    "dtype of alibi_slopes": (
        dense(alibi_slopes=rand(HEADS, dtype=torch.float16)),
        "TypeError | alibi_slopes.dtype=torch.float16: must be torch.float32"
        " | alibi_slopes.to(torch.float32)",
    ),
    "shape of out": (
        dense(out=torch.full((BATCH, SQ, HEADS, 8), SENTINEL)),
        "ValueError | out.shape=(2, 3, 4, 8): must be the shape of the result = (2, 3, 4, 16)"
        " | Reshape out",
    ),
    "dtype of out": (
        dense(out=torch.full((BATCH, SQ, HEADS, DIM), SENTINEL, dtype=torch.float16)),
        "TypeError | out.dtype=torch.float16: must be torch.float32 | out.to(torch.float32)",
    ),
    "shape of lse": (
        engine(lse=rand(BATCH, SQ, HEADS)),
        "ValueError | lse.shape=(2, 3, 4): must be the shape of the result = (2, 4, 3)"
        " | Reshape lse",
    ),
    # numbers
    "window below -1": (
        dense(window_size=(-2, 0)),
        "ValueError | window_size=(-2, 0): each side must be >= 0, or None or -1"
        " | for example (1023, 0)",
    ),
    "window is no pair": (dense(window_size=5), "TypeError | window_size=5: must be a pair | left"),
    "window of three": (
        dense(window_size=(1, 2, 3)),
        "TypeError | window_size=(1, 2, 3): must be a pair | left",
    ),
    "window of fractions": (
        dense(window_size=(1.5, 0)),
        "TypeError | window_size=1.5 (float): must be an integer | Pass an int",
    ),
    "softcap below 0": (dense(softcap=-1.0), "ValueError | softcap=-1.0: must be >= 0 | 0.0"),
    "softmax_scale": (
        dense(softmax_scale=float("nan")),
        "ValueError | softmax_scale=nan: must be finite | finite float",
    ),
    "dropout_p": (dense(dropout_p=1.0), "ValueError | dropout_p=1.0: must be in [0, 1) | 0.0"),
    "num_splits": (
        dense(num_splits=-1),
        "ValueError | num_splits=-1: must be in 0 .. 256 | Pass 0",
    ),
    "max_seqlen_q below 0": (
        varlen(max_seqlen_q=-1),
        "ValueError | max_seqlen_q=-1: must be >= 0 | Pass None",
    ),
    "max_seqlen_k too small": (
        varlen(max_seqlen_k=4),
        "ValueError | max_seqlen_k=4: must not be below the longest sequence, 5"
        " | max_seqlen_k=5 or more",
    ),
    "max_seqlen_q between two numbers": (
        varlen(max_seqlen_q=4.5),
        "TypeError | max_seqlen_q=4.5 (float): must be an integer | Pass an int",
    ),
    "max_seqlen_q of several numbers on a device": (
        varlen(max_seqlen_q=on_meta(torch.tensor([4]))),
        "TypeError | max_seqlen_q=tensor on meta: must be a plain integer | int(max_seqlen_q)",
    ),
    # names given twice, arguments that need others
    "both names of the sink": (
        dense(s_aux=rand(HEADS), learnable_sink=rand(HEADS)),
        "ValueError | s_aux, learnable_sink=both given | Pass only s_aux",
    ),
    "both names of the table": (
        paged(block_table=ints(0, 0).view(2, 1)),
        "ValueError | block_table, page_table=both given | Pass only block_table",
    ),
    "aux_tensors alone": (
        dense(aux_tensors=[rand(1)]),
        "ValueError | aux_tensors=1 tensors: only score_mod and mask_mod read them"
        " | drop aux_tensors",
    ),
    # autograd
    "out and autograd": (
        dense(q=rand(BATCH, SQ, HEADS, DIM).requires_grad_()),
        "ValueError | out=tensor of shape (2, 3, 4, 16): a given result cannot be differentiated"
        " | Drop out=",
    ),
    "score_mod and autograd": (
        dense(q=rand(BATCH, SQ, HEADS, DIM).requires_grad_(), score_mod=lambda s, *_: s, out=None),
        "NotImplementedError | score_mod=<function | torch.no_grad()",
    ),
    "gradient of the slopes": (
        dense(
            alibi_slopes=rand(HEADS).requires_grad_(), k=dense()[1]["k"].requires_grad_(), out=None
        ),
        "NotImplementedError | alibi_slopes=a tensor that requires grad | alibi_slopes.detach()",
    ),
    "a learned scale": (
        dense(softmax_scale=torch.tensor(0.3, requires_grad=True), out=None),
        "ValueError | softmax_scale=a tensor that requires grad | softmax_scale.item()",
    ),
    # cumulative lengths
    "rank of cu_seqlens_q": (
        varlen(cu_seqlens_q=ints(0, 2).view(1, 2)),
        "ValueError | cu_seqlens_q.shape=(1, 2): must be (b + 1,) | starts of all sequences",
    ),
    "dtype of cu_seqlens_q": (
        varlen(cu_seqlens_q=ints(0, 2, 6).long()),
        "TypeError | cu_seqlens_q.dtype=torch.int64: must be torch.int32"
        " | cu_seqlens_q.to(torch.int32)",
    ),
    "cu_seqlens_k is a list": (
        varlen(cu_seqlens_k=[0, 5, 10]),
        "TypeError | cu_seqlens_k=list: must be a torch.Tensor | Pass a tensor",
    ),
    "stride of cu_seqlens_q": (
        varlen(cu_seqlens_q=ints(0, 0, 2, 0, 6, 0)[::2]),
        "ValueError | cu_seqlens_q.stride=(2,): must be 1 | cu_seqlens_q.contiguous()",
    ),
    "cu_seqlens_q descends": (
        varlen(cu_seqlens_q=CU_DOWN),
        "ValueError | cu_seqlens_q[2]=6: must not be below cu_seqlens_q[1] = 7 | cumulative sums",
    ),
    "cu_seqlens_k starts late": (
        varlen(cu_seqlens_k=ints(1, 5, 10)),
        "ValueError | cu_seqlens_k[0]=1: must be 0 | Start with a 0",
    ),
    "cu_seqlens_k ends late": (
        varlen(cu_seqlens_k=ints(0, 5, 11)),
        "ValueError | cu_seqlens_k[-1]=11: must not exceed the 10 tokens | cumulative sums",
    ),
    "shape of seqused_k": (
        varlen(seqused_k=ints(1, 2, 3)),
        "ValueError | seqused_k.shape=(3,): must be (b,) = (2,) | seqused_k",
    ),
    "seqused_k too large": (
        varlen(seqused_k=ints(5, 6)),
        "ValueError | seqused_k[1]=6: must not exceed the 5 tokens | within the buffer",
    ),
    "seqused_q too large": (
        varlen(seqused_q=ints(3, 4)),
        "ValueError | seqused_q[0]=3: must not exceed the 2 tokens | within the buffer",
    ),
    # pages
    "rank of the table": (
        paged(page_table=ints(0, 1)),
        "ValueError | page_table.shape=(2,): must be (b, max_pages) | padded with -1",
    ),
    "rows of the table": (
        paged(page_table=ints(0, 1, 2).view(1, 3)),
        "ValueError | page_table.shape=(1, 3): must be (b, max_pages) = (2, 3) | page_table",
    ),
    "dtype of the table": (
        paged(page_table=torch.zeros(2, 3, dtype=torch.int64)),
        "TypeError | page_table.dtype=torch.int64: must be torch.int32"
        " | page_table.to(torch.int32)",
    ),
    "page that is not there": (
        paged(page_table=ints(3, 8, -1, 0, 7, 5).view(2, 3)),
        "ValueError | page_table[0, 1]=8: must be in 0 .. 7 | Allocate the page",
    ),
    "page that is missing": (
        paged(page_table=ints(3, 1, -1, 0, 7, -1).view(2, 3)),
        "ValueError | page_table[1, 2]=-1: must be in 0 .. 7 | shorten the sequence",
    ),
    "more tokens than pages": (
        paged(seqused_k=ints(5, 13)),
        "ValueError | seqused_k[1]=13: must not exceed the 12 tokens | within the buffer",
    ),
    "pages and cache_batch_idx": (
        cache(k=None, v=None, page_table=ints(0, 1).view(2, 1), k_cache=rand(3, 8, KV_HEADS, DIM)),
        "NotImplementedError | cache_batch_idx=a tensor: cannot be combined with page_table"
        " | through the page_table",
    ),
    # the cache
    "k without v": (cache(v=None), "ValueError | v=None: new k and v come together | both"),
    "k without lengths": (
        cache(cache_seqlens=None),
        "ValueError | cache_seqlens=None: must say where | tokens in the cache",
    ),
    "rotary without k": (
        cache(k=None, v=None, **ROTARY),
        "ValueError | k, v=None: rotary_cos and rotary_sin rotate new keys | rotate q before",
    ),
    "shape of cache_seqlens": (
        cache(cache_seqlens=ints(1, 2, 3)),
        "ValueError | cache_seqlens.shape=(3,): must be (b,) = (2,) | cache_seqlens",
    ),
    "dtype of cache_seqlens": (
        cache(cache_seqlens=ints(1, 2).long()),
        "TypeError | cache_seqlens.dtype=torch.int64: must be torch.int32"
        " | cache_seqlens.to(torch.int32)",
    ),
    "cache too small": (
        cache(cache_seqlens=ints(1, 7)),
        "ValueError | cache_seqlens[1]=7: the cache has room for 8 tokens, 2 new ones do not fit"
        " | larger cache",
    ),
    "row of the cache": (
        cache(cache_batch_idx=ints(0, 3)),
        "ValueError | cache_batch_idx[1]=3: must be in 0 .. 2 | rows that exist",
    ),
    "shape of new k": (
        cache(k=rand(BATCH, 2, 1, DIM)),
        "ValueError | k.shape=(2, 2, 1, 16): must be new tokens like the cache's = (2, 2, 2, 16)"
        " | k",
    ),
    "tokens of new v": (
        cache(v=rand(BATCH, 3, KV_HEADS, DIM)),
        "ValueError | v.shape=(2, 3, 2, 16): must be new tokens like the cache's = (2, 2, 2, 16)"
        " | v",
    ),
    "rank of new k": (
        cache(k=rand(4, KV_HEADS, DIM)),
        "ValueError | k.shape=(4, 2, 16): must be (total_new, h_k, d) with cu_seqlens_k_new"
        " | cu_seqlens_k_new",
    ),
    "dtype of new k": (
        cache(k=rand(BATCH, 2, KV_HEADS, DIM, dtype=torch.float16)),
        "TypeError | k.dtype=torch.float16: must be torch.float32 | k.to(torch.float32)",
    ),
    "sin without cos": (
        cache(rotary_sin=ROTARY["rotary_sin"]),
        "ValueError | rotary_cos=None: cos and sin come together | Pass rotary_cos",
    ),
    "rotary too wide": (
        cache(rotary_cos=rand(16, 9), rotary_sin=rand(16, 9)),
        "ValueError | rotary_cos.shape=(16, 9): must be (positions, rotary_dim / 2)"
        " | one row per position",
    ),
    "rotary too short": (
        cache(rotary_cos=rand(5, 4), rotary_sin=rand(5, 4)),
        "ValueError | rotary_cos.shape[0]=5: the call reaches position 5 | at least 6 positions",
    ),
    # serving engines
    "qv": (
        engine(qv=rand(1)),
        "NotImplementedError | qv=Tensor: is not supported | torch.cat([q, qv], -1)",
    ),
    "tile_mn": (
        engine(tile_mn=(64, 64)),
        "NotImplementedError | tile_mn=(64, 64): is not supported | Leave tile_mn out",
    ),
    "foreign metadata": (
        dense(scheduler_metadata=ints(1)),
        "TypeError | scheduler_metadata=Tensor: must come from get_scheduler_metadata | pass None",
    ),
    "metadata without batch": (
        metadata(batch_size=-1),
        "ValueError | batch_size=-1: must be at least 0 | Pass a size",
    ),
    "metadata with odd heads": (
        metadata(num_heads_q=3),
        "ValueError | num_heads_q=3: must be a multiple of num_heads_kv, 2 | heads of q",
    ),
    # merging
    "layout of lse_partial": (
        combine(lse_partial=rand(3, BATCH, HEADS, SQ)),
        "ValueError | lse_partial.shape=(3, 2, 4, 3): must be one value per row, heads last"
        " | lse_partial",
    ),
    "dtype of lse_partial": (
        combine(lse_partial=rand(3, BATCH, SQ, HEADS, dtype=torch.float16)),
        "TypeError | lse_partial.dtype=torch.float16: must be torch.float32"
        " | lse_partial.to(torch.float32)",
    ),
    "rank of out_partial": (
        combine(out_partial=rand(SQ, HEADS, DIM)),
        "ValueError | out_partial.shape=(3, 4, 16): must be (parts,) +  | Stack the results",
    ),
    "no parts": (
        combine(out_partial=rand(0, BATCH, SQ, HEADS, DIM), lse_partial=rand(0, BATCH, SQ, HEADS)),
        "ValueError | out_partial.shape[0]=0: there must be a part | one or more",
    ),
    "out_dtype": (
        combine(out_dtype=torch.int32),
        "TypeError | out_dtype=torch.int32: must be torch.float32 | Pass None",
    ),
    "out of a merge": (
        combine(out=torch.full((BATCH, SQ, HEADS, 8), SENTINEL)),
        "ValueError | out.shape=(2, 3, 4, 8): must be the shape of one part = (2, 3, 4, 16)"
        " | Reshape out",
    ),
    "states that differ": (
        merge(out_b=rand(BATCH, 4, HEADS, DIM), lse_b=rand(BATCH, HEADS, 4)),
        "ValueError | out_b.shape=(2, 4, 4, 16): must be out_a's shape = (2, 3, 4, 16) | out_b",
    ),
    "dtypes of states differ": (
        merge(out_b=rand(BATCH, SQ, HEADS, DIM, dtype=torch.float16)),
        "TypeError | out_b.dtype=torch.float16: must be torch.float32 | out_b.to(torch.float32)",
    ),
}

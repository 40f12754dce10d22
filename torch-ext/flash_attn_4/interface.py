"""The public functions. Each turns its arguments into tensors and options and sends them on.

Conventions of all of them: scores are softmax_scale * q . k; masks are aligned at the bottom right
(with sq queries and sk keys, query i stands on key i + sk - sq), as in FlashAttention >= 2.1; the
log-sum-exp (LSE) is natural-log float32, of shape (b, h, sq) or (h, total_q); rows that see no key
have out = 0 and LSE = -inf, or the sink if there is one. Rows outside every sequence have 0 and
-inf, but for those of tensors that the caller gives to be written: there they are left as they are.
A number counts by its value, whatever its type: 1, 1.0, True, NumPy's 1 and a 0-d CPU tensor of it
are one argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .documentation import documented
from .engine import _flash_attn_fwd as _flash_attn_fwd
from .engine import get_scheduler_metadata as get_scheduler_metadata
from .flash_attn4_cute import repeat_merge
from .flash_attn4_cute.checks import as_int, check_index_tensor, check_is_tensor, refuse
from .flash_attn4_cute.partials import check_combined, check_partial, check_same_rows
from .flash_attn4_cute.problem import OTHERS
from .other_arguments import check_foreign
from .request import Result, Window, ask, key_lengths, one_of
from .states import merged


@documented
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    scheduler_metadata: Any = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_softmax_lse: bool = False,
    **unsupported: Any,
) -> Result:
    """Attention over dense batches.

    Args:
        q: (b, sq, h, d), float32, float16 or bfloat16; any strides.
        k: (b, sk, h_k, d) with h a multiple of h_k.
        v: (b, sk, h_k, d_v).
        {shared}

    Returns:
        out (b, sq, h, d_v) in q's dtype; with return_lse (out, lse), lse (b, h, sq).
        Differentiable in q, k, v and s_aux, through both results.

    {raises}
    """
    if unsupported:
        check_foreign(flash_attn_func, unsupported)
    return_lse = return_lse or return_softmax_lse
    sink = s_aux
    if learnable_sink is not None:
        sink = one_of("s_aux", s_aux, "learnable_sink", learnable_sink)
    asked = (
        causal,
        window_size,
        mask_mod,
        softmax_scale,
        softcap,
        score_mod,
        dropout_p,
        deterministic,
        num_splits,
        pack_gqa,
        None,
        return_lse,
        scheduler_metadata,
    )
    others = None
    if not (out is sink is alibi_slopes is None):
        others = (
            out, None, None, None, None, None, None, None, None, None, None, sink, alibi_slopes,
        )  # fmt: skip
    out, lse = ask(asked, None, (q, k, v), others, aux_tensors)
    return (out, lse) if return_lse else out


@documented
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    page_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    scheduler_metadata: Any = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_softmax_lse: bool = False,
    **unsupported: Any,
) -> Result:
    """Attention over sequences of different lengths, packed, padded or paged.

    Args:
        q: (total_q, h, d) with cu_seqlens_q, else (b, sq, h, d); float32, float16 or bfloat16.
        k, v: (total_k, h_k, d | d_v) with cu_seqlens_k, (pages, page_size, h_k, d | d_v) with a
            page table, else (b, sk, h_k, d | d_v); any strides, any page size; in q's dtype or both
            float8_e4m3fn.
        cu_seqlens_q, cu_seqlens_k: int32 (b + 1,), the starts of the sequences and the end of the
            last one. With a page table, cu_seqlens_k gives the lengths only.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; int, NumPy integer or 0-d tensor.
            None: derived from the shapes, as for a tensor on a GPU, which is not waited for.
        seqused_q, seqused_k: int32 (b,), how many tokens of each sequence count.
        block_table, page_table: int32 (b, max_pages), two names of one argument: the pages of each
            sequence in order. Entries past its end may be anything and are never read.
        k_descale, v_descale: float32 (b, h_k), the factors of k and v of float8_e4m3fn. None: 1.
        {shared}

    Returns:
        out (total_q, h, d_v) or (b, sq, h, d_v) in q's dtype; with return_lse (out, lse), lse
        (h, total_q) or (b, h, sq). Differentiable in q, k, v and s_aux, through both results.

    {raises}
    """
    if unsupported:
        check_foreign(flash_attn_varlen_func, unsupported)
    return_lse = return_lse or return_softmax_lse
    table, sink = block_table, s_aux
    if page_table is not None:
        table = one_of("block_table", block_table, "page_table", page_table)
    if learnable_sink is not None:
        sink = one_of("s_aux", s_aux, "learnable_sink", learnable_sink)
    if table is not None:
        cu_seqlens_k, seqused_k = key_lengths(table, cu_seqlens_k, seqused_k)
    asked = (
        causal,
        window_size,
        mask_mod,
        softmax_scale,
        softcap,
        score_mod,
        dropout_p,
        deterministic,
        num_splits,
        pack_gqa,
        max_seqlen_q,
        return_lse,
        scheduler_metadata,
    )
    others = (
        out, None, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, table, None, None,
        k_descale, v_descale, sink, alibi_slopes,
    )  # fmt: skip
    out, lse = ask(asked, max_seqlen_k, (q, k, v), others, aux_tensors)
    return (out, lse) if return_lse else out


@documented
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    page_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    scheduler_metadata: Any = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_softmax_lse: bool = False,
    **unsupported: Any,
) -> Result:
    """Attention over a cache of keys and values, optionally after appending new ones in place.

    Decoding (one query per sequence) and chunked prefill (several). New token t of sequence i is
    written at position cache_seqlens[i] + t, then the queries see cache and new tokens.

    Args:
        q: (b, sq, h, d), or (total_q, h, d) with cu_seqlens_q.
        k_cache, v_cache: (b_cache, sk, h_k, d | d_v), or (pages, page_size, h_k, d | d_v) with a
            page table, in q's dtype or both float8_e4m3fn; written where k and v are given.
        k, v: new tokens (b, s_new, h_k, d | d_v), or (total_new, h_k, d | d_v) with
            cu_seqlens_k_new, in q's dtype. Together or not at all. With them the call is not
            differentiable: it runs as under torch.no_grad(), as in FlashAttention-3. Tokens for
            which the cache has no room: a ValueError on the CPU; a GPU, which does not wait for the
            lengths, drops them and attends to those that fit.
        cache_seqlens: int or int32 (b,), tokens in the cache before the call; None: all of it.
            Negative: the sequence is padding, nothing is written and its rows of out are 0.
        cache_batch_idx: int32 (b,), the cache row of each sequence; dense caches only.
        cache_leftpad: int32 (b,), the first position that counts; dense caches only.
        block_table, page_table: int32 (b, max_pages), two names of one argument. Entries past the
            end of a sequence, -1 included, are never read.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2) in q's dtype, 0 < rotary_dim <= d. Keys
            are rotated to their positions; queries to cache_seqlens + i if causal or windowed, else
            all to cache_seqlens. Need k and v.
        rotary_interleaved: pairs (0, 1), (2, 3), ... if True, else (0, r/2), (1, r/2 + 1), ...
        k_descale, v_descale: float32 (b, h_k), for fp8 caches: a key is its entry of k_cache times
            k_descale, and a new key is divided by it, limited to +-448 and rounded before it is
            written; v likewise. None: 1.
        cu_seqlens_q: int32 (b + 1,) for packed queries.
        cu_seqlens_k_new: int32 (b + 1,) for packed k and v; without these it has no meaning.
        max_seqlen_q: upper bound of the query lengths; None: derived from the shapes.
        {shared}

    Returns:
        out like q with d_v as its last dimension; with return_lse (out, lse).

    {raises}
    """
    if unsupported:
        check_foreign(flash_attn_with_kvcache, unsupported)
    return_lse = return_lse or return_softmax_lse
    lengths = cache_seqlens
    if lengths is not None and not (isinstance(lengths, Tensor) and lengths.dim()):
        lengths = _equal_lengths(q, lengths, cu_seqlens_q)
    table, sink = block_table, s_aux
    if page_table is not None:
        table = one_of("block_table", block_table, "page_table", page_table)
    if learnable_sink is not None:
        sink = one_of("s_aux", s_aux, "learnable_sink", learnable_sink)
    asked = (
        causal,
        window_size,
        None,
        softmax_scale,
        softcap,
        None,
        0.0,
        False,
        num_splits,
        pack_gqa,
        max_seqlen_q,
        return_lse,
        scheduler_metadata,
    )
    others: tuple = (
        out, None, cu_seqlens_q, None, None, lengths, table, cache_batch_idx, cache_leftpad,
        k_descale, v_descale, sink, alibi_slopes,
    )  # fmt: skip
    interleaved = None
    if not (k is v is rotary_cos is rotary_sin is None):
        others += (k, v, lengths, cu_seqlens_k_new, rotary_cos, rotary_sin)
        interleaved = bool(rotary_interleaved)
    out, lse = ask(asked, None, (q, k_cache, v_cache), others, None, interleaved, _check_cache_call)
    return (out, lse) if return_lse else out


def _equal_lengths(q: Tensor, cache_seqlens: int | Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """cache_seqlens, one number for all sequences, as an int32 tensor (b,)."""
    length = as_int("cache_seqlens", cache_seqlens)
    return torch.full((_batch(q, cu_seqlens_q),), length, dtype=torch.int32, device=q.device)


def _batch(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    check_is_tensor("q", q)
    if cu_seqlens_q is None:
        return q.shape[0]
    check_is_tensor("cu_seqlens_q", cu_seqlens_q)
    return cu_seqlens_q.shape[0] - 1


def _check_cache_call(q: Tensor, others: tuple) -> None:
    """What the arguments that only flash_attn_with_kvcache has must fulfil."""
    cu_seqlens_q, lengths, new = others[2], others[5], others[len(OTHERS) :]
    if lengths is not None:
        batch = _batch(q, cu_seqlens_q)
        check_index_tensor("cache_seqlens", lengths, q.device, (batch,), "(b,)")
    if not new:
        return
    k, v = new[:2]
    if k is None and v is None:
        raise refuse(
            ValueError,
            "k, v",
            None,
            "rotary_cos and rotary_sin rotate new keys and the queries that go with them",
            "Pass k and v, or rotate q before the call",
        )
    if k is None or v is None:
        missing = "v" if v is None else "k"
        raise refuse(ValueError, missing, None, "new k and v come together", "Pass both or neither")
    if lengths is None:
        raise refuse(
            ValueError,
            "cache_seqlens",
            None,
            "must say where the new k and v go",
            "Pass the number of tokens in the cache before the call",
        )


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = True,
    **unsupported: Any,
) -> tuple[Tensor, Tensor | None]:
    """Merge attention results over disjoint sets of keys, exactly, on any device.

    The layout of LSEs is that of this function in FlashAttention-3 and 4, heads last, and not the
    one in which the attention functions return them: `lse.transpose(-1, -2)` leads from one to the
    other without a copy.

    Args:
        out_partial: (parts, b, s, h, d_v) or (parts, total, h, d_v): stacked results.
        lse_partial: float32 (parts, b, s, h) or (parts, total, h), any strides: their LSEs. Parts
            with -inf (or +inf, which FlashAttention-2 writes for rows without keys) are not read.
        out: where to write the result, one of the parts perhaps; None allocates it.
        out_dtype: dtype of the result; None: out_partial's.
        return_lse: False: None in the place of lse.
        unsupported: as in flash_attn_func.

    Returns:
        (out, lse) over all keys, lse float32 (b, s, h) or (total, h). Differentiable in both
        arguments. Method: Rabe and Staats 2021, section 2.

    Raises:
        TypeError, ValueError: naming the argument, its value, the rule and the way out.
        NotImplementedError: more than 512 columns on a GPU.
    """
    if unsupported:
        check_foreign(flash_attn_combine, unsupported)
    outs, lses = (out_partial,), (lse_partial,)
    key, again = repeat_merge.merged_again(outs, lses, out, out_dtype)
    if again is None:
        check_partial(out_partial, lse_partial, ("out_partial", "lse_partial"), stacked=True)
        dtype = out_partial.dtype if out_dtype is None else out_dtype
        check_combined(out, (out_partial, lse_partial), dtype, torch.compiler.is_compiling())
        again = merged(outs, lses, out, dtype, key)
    return again if return_lse else (again[0], None)


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge two attention results over disjoint sets of keys, exactly, on any device.

    Args:
        out_a, out_b: (b, s, h, d_v) or (total, h, d_v).
        lse_a, lse_b: float32 (b, h, s) or (h, total); -inf (or +inf) marks rows without keys.

    Returns:
        (out, lse) as from one call over all keys, out in out_a's dtype, lse float32.
        Differentiable in all arguments. Method: Rabe and Staats 2021, section 2.

    Raises:
        TypeError, ValueError: naming the argument, its value, the rule and the way out.
        NotImplementedError: more than 512 columns on a GPU.
    """
    outs, lses = (out_a, out_b), (lse_a, lse_b)
    key, again = repeat_merge.merged_again(outs, lses, None, None)
    if again is not None:
        return again
    check_partial(out_a, lse_a, ("out_a", "lse_a"), stacked=False)
    check_partial(out_b, lse_b, ("out_b", "lse_b"), stacked=False)
    check_same_rows(out_a, out_b)
    return merged(outs, lses, None, out_a.dtype, key)

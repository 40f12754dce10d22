"""The second question of `flash_attn_with_kvcache`: which new keys and values to write where.

    position of new token t of sequence i in the cache:  cache_seqlens[i] + t

A sequence with a negative `cache_seqlens` is padding of a CUDA graph: nothing is written for it and
its output rows are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from . import checks
from .checks import check_index_tensor, refuse
from .problem import AttentionTensors
from .values import check_cu_seqlens, check_pages, check_rows


@dataclass(frozen=True, slots=True)
class CacheUpdate:
    """New keys and values of one call.

    Shapes:
        k, v: (b, s_new, h_k, d | d_v), or (total_new, h_k, d | d_v) with cu_seqlens_k_new, in q's
            dtype; an fp8 cache gets x / descale, limited to +-448 and rounded to nearest
        cache_seqlens: int32 (b,), tokens in the cache before the call
        cu_seqlens_k_new: int32 (b + 1,)
        rotary_cos, rotary_sin: (positions, rotary_dim / 2) in q's dtype
    """

    k: Tensor
    v: Tensor
    cache_seqlens: Tensor
    cu_seqlens_k_new: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = True


tensors_of = attrgetter(*CacheUpdate.__slots__[:-1])


def names_of_keys(update: CacheUpdate | None) -> tuple[str, str]:
    """What the caller calls the keys and values that are attended to."""
    return ("k", "v") if update is None else ("k_cache", "v_cache")


def check_cache_update(update: CacheUpdate, tensors: AttentionTensors) -> None:
    """The update fits the cache `tensors.k`, `tensors.v` and the queries `tensors.q`.

    Raises:
        TypeError, ValueError: naming the argument, its value, the rule and the way out.
    """
    batch = update.cache_seqlens.shape[0]
    _check_new_tokens(update, tensors, batch)
    _check_rotary(update, tensors.q)
    if tensors.q.device.type == "cpu":
        _check_update_values(update, tensors)


def new_token_counts(update: CacheUpdate) -> Tensor:
    """int32 (b,): how many tokens each sequence brings."""
    if update.cu_seqlens_k_new is not None:
        return update.cu_seqlens_k_new.diff()
    return torch.full_like(update.cache_seqlens, update.k.shape[1])


def _check_new_tokens(update: CacheUpdate, tensors: AttentionTensors, batch: int) -> None:
    cu = update.cu_seqlens_k_new
    packed = cu is not None
    if cu is not None:
        check_index_tensor("cu_seqlens_k_new", cu, tensors.q.device, (batch + 1,), "(b + 1,)")
    for name, new, cache in (("k", update.k, tensors.k), ("v", update.v, tensors.v)):
        checks.check_is_tensor(name, new)
        checks.check_dtype(name, new, (tensors.q.dtype,))
        checks.check_device(name, new, cache.device)
        if new.dim() != (3 if packed else 4):
            raise refuse(
                ValueError,
                f"{name}.shape",
                tuple(new.shape),
                "must be (total_new, h_k, d) with cu_seqlens_k_new, else (b, s_new, h_k, d)",
                "Pass or drop cu_seqlens_k_new accordingly",
            )
        lengths = update.k.shape[:1] if packed else (batch, *update.k.shape[1:2])
        checks.check_shape(name, new, (*lengths, *cache.shape[-2:]), "new tokens like the cache's")


def _check_rotary(update: CacheUpdate, q: Tensor) -> None:
    cos, sin = update.rotary_cos, update.rotary_sin
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise refuse(ValueError, missing, None, "cos and sin come together", f"Pass {missing}")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.check_is_tensor(name, table)
        checks.check_dtype(name, table, (q.dtype,))
        checks.check_device(name, table, q.device)
        if table.dim() != 2 or not 0 < 2 * table.shape[1] <= q.shape[-1]:
            raise refuse(
                ValueError,
                f"{name}.shape",
                tuple(table.shape),
                f"must be (positions, rotary_dim / 2) with 0 < rotary_dim <= {q.shape[-1]}",
                "Pass one row per position",
            )
    checks.check_shape("rotary_sin", sin, tuple(cos.shape), "rotary_cos's shape")


def _check_update_values(update: CacheUpdate, tensors: AttentionTensors) -> None:
    cache, table = tensors.k, tensors.page_table
    if update.cu_seqlens_k_new is not None:
        check_cu_seqlens("cu_seqlens_k_new", update.cu_seqlens_k_new, update.k.shape[0])
    capacity = cache.shape[1] if table is None else table.shape[1] * cache.shape[1]
    counts = new_token_counts(update).tolist()
    starts = update.cache_seqlens.tolist()
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if start >= 0 and start + count > capacity:
            raise refuse(
                ValueError,
                f"cache_seqlens[{i}]",
                start,
                f"the cache has room for {capacity} tokens, {count} new ones do not fit",
                "Pass a larger cache or fewer new tokens",
            )
    ends = lengths_after(update)
    if table is not None:
        check_pages(table, ends, cache)
    check_rows(tensors.kv_batch_idx, cache.shape[0])
    _check_rotary_positions(update, tensors, int(ends.max()) if len(starts) else 0)


def lengths_after(update: CacheUpdate) -> Tensor:
    """int32 (b,): tokens in the cache after the update; 0 for padding sequences."""
    before = update.cache_seqlens
    return torch.where(before < 0, 0, before + new_token_counts(update)).to(torch.int32)


def _check_rotary_positions(update: CacheUpdate, tensors: AttentionTensors, longest: int) -> None:
    if update.rotary_cos is None:
        return
    positions = update.rotary_cos.shape[0]
    queries = tensors.q.shape[1] if tensors.cu_seqlens_q is None else 1
    starts = update.cache_seqlens
    reach = max(longest, int(starts.max()) + queries if starts.numel() else 0)
    if reach > positions:
        raise refuse(
            ValueError,
            "rotary_cos.shape[0]",
            positions,
            f"the call reaches position {reach - 1}",
            f"Pass tables of at least {reach} positions",
        )

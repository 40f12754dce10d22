"""CacheUpdate -> AppendKey -> launch: new keys and values into a cache on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import compiler
from .arguments import AppendArgs
from .cache_update import CacheUpdate
from .checks import FP8
from .device import supported_card
from .problem import AttentionTensors, is_aligned

VECTOR_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendKey:
    """Everything that a compiled append kernel depends on.

    `vector` is how many elements a thread moves at once; with 1 the tensors may have any strides.
    `rotary_dim` is 0 without rotary tables. `fp8` is whether the cache is of float8_e4m3fn.
    """

    variant: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    rotary_dim: int
    interleaved: bool
    vector: int
    packed_new: bool
    packed_q: bool
    paged: bool
    has_batch_idx: bool
    fp8: bool = False
    has_k_descale: bool = False
    has_v_descale: bool = False

    @property
    def family(self) -> str:
        """The kernels' architecture family: one source serves every card."""
        return "sm120"

    def check(self) -> None:
        """Assert what the kernel takes for granted."""
        for extent in (self.head_dim, self.head_dim_v, self.rotary_dim):
            assert extent % self.vector == 0, f"{self} cuts a row into vectors that do not fill it"
        assert self.interleaved or self.rotary_dim // 2 % self.vector == 0, f"{self} splits a half"

    def trace(self) -> tuple:
        """The kernel and stand-ins for its arguments; see compiler.KernelKey."""
        from .signature import trace_append

        return trace_append(self)


def append_key(update: CacheUpdate, tensors: AttentionTensors) -> AppendKey:
    """The kernel that carries out `update` on the cache and the queries of `tensors`."""
    cos = update.rotary_cos
    head_dim, head_dim_v = tensors.k.shape[-1], tensors.v.shape[-1]
    rotary_dim = 0 if cos is None else 2 * cos.shape[1]
    variant = supported_card(tensors.q.device).variant
    assert variant is not None
    return AppendKey(
        variant=variant,
        dtype=update.k.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        rotary_dim=rotary_dim,
        interleaved=rotary_dim > 0 and update.rotary_interleaved,
        vector=_vector(update, tensors, rotary_dim),
        packed_new=update.cu_seqlens_k_new is not None,
        packed_q=rotary_dim > 0 and tensors.cu_seqlens_q is not None,
        paged=tensors.page_table is not None,
        has_batch_idx=tensors.kv_batch_idx is not None,
        fp8=tensors.k.dtype == FP8,
        has_k_descale=tensors.k_descale is not None,
        has_v_descale=tensors.v_descale is not None,
    )


def explain_append(key: AppendKey) -> str:
    """What writes the new tokens, for people."""
    rotary = f", rotated in {key.rotary_dim} dimensions, as queries are" if key.rotary_dim else ""
    return (
        f"append: a kernel before the attention, {key.vector} elements at a time{rotary}\n"
        f"code of the append: {compiler.origin(key)}"
    )


def append(
    update: CacheUpdate,
    tensors: AttentionTensors,
    rotate_along: bool,
    ready: tuple[AppendKey, Any] | None = None,
) -> tuple:
    """Write the new tokens into tensors.k and tensors.v, then make `tensors` ask about the result.

    Sets tensors.seqused_k to a new tensor of the lengths after the update and, with rotary tables,
    tensors.q to the rotated queries: at cache_seqlens + i if `rotate_along`, else all at
    cache_seqlens. Everything happens on the device's current stream, without waiting for it.
    `ready` is the key of the call's kernel and the kernel, if they are known. Returns the kernel,
    its arguments and what it returned.
    """
    key, kernel = ready or (append_key(update, tensors), None)
    q, k, table = tensors.q, tensors.k, tensors.page_table
    rotates = update.rotary_cos is not None
    rotated = q.new_empty(q.shape) if rotates else None
    lengths = torch.empty_like(update.cache_seqlens, memory_format=torch.contiguous_format)
    args = AppendArgs(
        mKNew=update.k,
        mVNew=update.v,
        mK=k.view(torch.uint8) if key.fp8 else k,
        mV=tensors.v.view(torch.uint8) if key.fp8 else tensors.v,
        mQ=q if rotates else None,
        mQRotated=rotated,
        mCos=update.rotary_cos,
        mSin=update.rotary_sin,
        mKDescale=tensors.k_descale,
        mVDescale=tensors.v_descale,
        mCacheSeqlens=update.cache_seqlens,
        mSeqUsed=lengths,
        mCuSeqlensNew=update.cu_seqlens_k_new,
        mCuSeqlensQ=tensors.cu_seqlens_q if rotates else None,
        mPageTable=table,
        mBatchIdx=tensors.kv_batch_idx,
        query_step=int(rotate_along),
        capacity=k.shape[1] if table is None else table.shape[1] * k.shape[1],
    )
    kernel = kernel or compiler.compiled(key)
    launched = kernel, args, kernel(args)
    tensors.seqused_k = lengths
    if rotated is not None:
        tensors.q = rotated
    return launched


def _vector(update: CacheUpdate, tensors: AttentionTensors, rotary_dim: int) -> int:
    """Elements of the widest vector, 16 bytes, if every row of every tensor is cut evenly by it."""
    moved = [update.k, update.v, tensors.k, tensors.v]
    if update.rotary_cos is not None and update.rotary_sin is not None:
        moved += [tensors.q, update.rotary_cos, update.rotary_sin]
    widest = VECTOR_BYTES // update.k.element_size()
    half = rotary_dim // 2
    cuts = [tensors.k.shape[-1], tensors.v.shape[-1], half]
    even = all(extent % widest == 0 for extent in cuts)
    return widest if even and all(map(is_aligned, moved)) else 1

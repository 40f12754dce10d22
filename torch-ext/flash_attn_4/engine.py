"""What serving engines call: the FA4 forward entry point, and what they precompute once a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .flash_attn4_cute.block_sparse import BlockSparse
from .flash_attn4_cute.checks import as_int, check_is_tensor, refuse
from .flash_attn4_cute.problem import (
    OTHERS,
    AttentionProblem,
    AttentionTensors,
    Layout,
    make_mask_rule,
)
from .flash_attn4_cute.scheduler_metadata import SchedulerMetadata
from .other_arguments import check_foreign
from .request import Window, ask, send


def _flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    block_sparse_tensors: Any = None,
    scheduler_metadata: Any = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor | None]:
    """The call that vLLM and SGLang make into FlashAttention-4.

    Args:
        q, k, v, cu_seqlens_q, ..., aux_tensors: as in flash_attn_varlen_func.
        block_sparse_tensors: an object with upstream's fields: mask_block_cnt (b or 1, h or 1, M)
            and mask_block_idx (b or 1, h or 1, M, N), the blocks of keys in which mask_mod decides;
            full_block_cnt and full_block_idx, those that are seen whole; block_size (queries,
            keys), in multiples of 16 and 8. For dense sequences.
        min_seqlen_k: lower bound of the key lengths; a hint that changes no result.
        window_size_left, window_size_right: as window_size; None, -1 or less: no limit, since
            vLLM and SGLang pass either.
        out, lse: where to write the results; None allocates them. Rows of given ones that belong to
            no sequence, as where a CUDA graph's tokens are padded, are left as they are.
        k_descale, v_descale: as in flash_attn_varlen_func; q stays in half precision.
        unsupported: any other argument of upstream's signature (qv, q_descale, ...); must be None,
            False, or what asks for nothing in flash_attn_varlen_func.

    Returns:
        (out, lse), lse None unless return_lse or lse is given. The copies of this function that
        vLLM and upstream keep return two or three tensors more, for other callers of theirs; the
        plugin flash-attn-4-vllm has a form of it that returns what vLLM unpacks.

    Raises:
        TypeError, ValueError, NotImplementedError: as flash_attn_varlen_func; NotImplementedError
            for an unsupported argument that is given.
    """
    if unsupported:
        check_foreign(_flash_attn_fwd, unsupported, any_name=True)
    if min_seqlen_k is not None:
        as_int("min_seqlen_k", min_seqlen_k)
    asked = (
        causal,
        (_limit(window_size_left), _limit(window_size_right)),
        mask_mod,
        softmax_scale,
        softcap or 0.0,
        score_mod,
        0.0,
        False,
        num_splits,
        pack_gqa,
        max_seqlen_q,
        return_lse or lse is not None,
        scheduler_metadata,
    )
    others = (
        out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, None, None,
        k_descale, v_descale, learnable_sink, None,
    )  # fmt: skip
    if block_sparse_tensors is None:
        return ask(asked, max_seqlen_k, (q, k, v), others, aux_tensors)
    named: dict[str, Any] = dict(zip(OTHERS, others, strict=True))
    tensors = AttentionTensors(q=q, k=k, v=v, **named)
    tensors.aux_tensors = None if aux_tensors is None else tuple(aux_tensors)
    tensors.blocks = BlockSparse.of(block_sparse_tensors)
    return send(tensors, None, asked, max_seqlen_k)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    *,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    page_size: int | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    **unsupported: Any,
) -> SchedulerMetadata:
    """Decide once per step what the attention calls of all layers have in common.

    Nothing here depends on the lengths of a step, which the kernels read on the device: each
    sequence divides its own keys by num_splits. So no launch and no tensor is needed, unlike in
    FlashAttention-3.

    Args:
        batch_size: number of sequences.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths of the step; for a CUDA graph, of
            all steps that it will replay.
        num_heads_q, num_heads_kv, headdim, headdim_v: heads and head dimensions; headdim_v None:
            headdim.
        cache_seqlens: int32 (b,), the lengths of the keys; only its device and shape are used.
        qkv_dtype: dtype of q, k and v.
        cu_seqlens_q: int32 (b + 1,) if queries are packed.
        page_size: tokens per page; None if the keys are not paged.
        causal, window_size, pack_gqa: as in flash_attn_varlen_func.
        has_softcap: whether softcap is on.
        num_splits: 0 lets the plan decide; other numbers are kept.
        unsupported: as in flash_attn_varlen_func.

    Returns:
        SchedulerMetadata to pass as `scheduler_metadata=`. It holds no tensor, so it can be
        made before a CUDA graph is captured and stays valid when the graph is replayed.

    Raises:
        TypeError, ValueError: naming the argument, its value, the rule and the way out.
    """
    if unsupported:
        check_foreign(get_scheduler_metadata, unsupported)
    check_is_tensor("cache_seqlens", cache_seqlens)
    sizes = {
        "batch_size": batch_size,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "num_heads_q": num_heads_q,
        "num_heads_kv": num_heads_kv,
        "headdim": headdim,
        "headdim_v": headdim if headdim_v is None else headdim_v,
    }
    sizes = {name: _at_least(int("head" in name), name, size) for name, size in sizes.items()}
    if sizes["num_heads_q"] % sizes["num_heads_kv"]:
        raise refuse(
            ValueError,
            "num_heads_q",
            num_heads_q,
            f"must be a multiple of num_heads_kv, {num_heads_kv}",
            "Pass the heads of q and of k",
        )
    problem = AttentionProblem(
        device=cache_seqlens.device,
        dtype=qkv_dtype,
        batch=sizes["batch_size"],
        seqlen_q=sizes["max_seqlen_q"],
        seqlen_k=sizes["max_seqlen_k"],
        num_heads=sizes["num_heads_q"],
        num_heads_kv=sizes["num_heads_kv"],
        head_dim=sizes["headdim"],
        head_dim_v=sizes["headdim_v"],
        q_layout=Layout.DENSE if cu_seqlens_q is None else Layout.VARLEN,
        kv_layout=Layout.DENSE if page_size is None else Layout.PAGED,
        page_size=None if page_size is None else _at_least(1, "page_size", page_size),
        mask=make_mask_rule(causal, window_size),
        softmax_scale=1.0,
        softcap=float(bool(has_softcap)),
        has_seqused_q=False,
        has_seqused_k=True,
        has_kv_batch_idx=False,
        has_sink=False,
        has_alibi=False,
        score_mod=None,
        dropout_p=0.0,
        deterministic=False,
        num_splits=_at_least(0, "num_splits", 0 if num_splits is None else num_splits),
        pack_gqa=pack_gqa,
        return_lse=True,
        requires_grad=False,
    )
    splits, packed = _planned(problem)
    return SchedulerMetadata(
        batch=problem.batch,
        max_seqlen_q=problem.seqlen_q,
        max_seqlen_k=problem.seqlen_k,
        num_heads=problem.num_heads,
        num_heads_kv=problem.num_heads_kv,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        page_size=problem.page_size,
        num_splits=splits,
        pack_gqa=packed,
    )


def _planned(problem: AttentionProblem) -> tuple[int, bool | None]:
    """num_splits and pack_gqa that ask for what the plan for this device chooses."""
    if problem.num_splits or problem.device.type != "cuda":
        return max(1, problem.num_splits), problem.pack_gqa
    from .flash_attn4_cute.kernel_keys import DecodeKey
    from .flash_attn4_cute.plan import make_plan

    plan = make_plan(problem)
    return plan.num_splits, isinstance(plan.key, DecodeKey) or problem.pack_gqa


def _at_least(lowest: int, name: str, value: Any) -> int:
    number = as_int(name, value)
    if number < lowest:
        raise refuse(ValueError, name, number, f"must be at least {lowest}", "Pass a size")
    return number


def _limit(bound: int | None) -> int | None:
    return None if bound is None or bound < 0 else bound

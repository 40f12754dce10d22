"""The checks behind AttentionProblem.from_tensors: types, ranks, shapes, devices and ranges.

They read shapes, dtypes and devices, never values, so a CUDA tensor causes no synchronisation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks
from .checks import FLOAT_DTYPES, FP8, check_index_tensor, refuse
from .mask_rule import Custom

if TYPE_CHECKING:
    from .problem import AttentionOptions, AttentionTensors

MAX_NUM_SPLITS = 256


def check_qkv_types(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v are on one device and of one supported dtype, or k and v are fp8."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        for name, t in (("q", q), ("k", k), ("v", v)):
            checks.check_is_tensor(name, t)
    dtype, device = q.dtype, q.device
    if dtype not in FLOAT_DTYPES:
        checks.check_dtype("q", q, FLOAT_DTYPES)
    if (k.dtype != dtype or v.dtype != dtype) and not k.dtype == v.dtype == FP8:
        for name, t in (("k", k), ("v", v)):
            if t.dtype != dtype:
                raise refuse(
                    TypeError,
                    f"{name}.dtype",
                    t.dtype,
                    f"must be q's dtype, {dtype}, or k and v both {FP8}",
                    f"Convert it with {name}.to(q.dtype)",
                )
    if k.device != device or v.device != device:
        checks.check_device("k", k, device)
        checks.check_device("v", v, device)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Head counts divide, head dimensions agree, and neither is zero."""
    (h, d), (h_k, d_k) = q.shape[-2:], k.shape[-2:]
    if d_k != d:
        raise refuse(
            ValueError,
            "k.shape[-1]",
            d_k,
            f"must be q's head_dim, {d}",
            "Only v may have another head_dim",
        )
    if k.shape[:-1] != v.shape[:-1]:
        raise refuse(
            ValueError,
            "v.shape",
            tuple(v.shape),
            f"must be k's shape {tuple(k.shape)} except in the last dimension",
            "Pass k and v of the same tokens and heads",
        )
    if d < 1 or v.shape[-1] < 1:
        raise refuse(
            ValueError,
            "head_dim" if d < 1 else "head_dim_v",
            min(d, v.shape[-1]),
            "must be at least 1",
            "Pass q, k and v with a last dimension of 1 or more",
        )
    if h < 1 or h_k < 1 or h % h_k:
        raise refuse(
            ValueError,
            "num_heads",
            f"{h} for {h_k} key heads",
            "the query heads must be a positive multiple of the key heads",
            "Pass k and v with a number of heads that divides q's",
        )


def _check_rank(name: str, tensor: Tensor, rank: int, meaning: str, way_out: str) -> None:
    if tensor.dim() != rank:
        raise refuse(
            ValueError,
            f"{name}.shape",
            tuple(tensor.shape),
            f"must have {rank} dimensions {meaning}",
            way_out,
        )


def query_extent(tensors: AttentionTensors, options: AttentionOptions) -> tuple[int, int]:
    """(number of sequences, longest query sequence)."""
    q, cu = tensors.q, tensors.cu_seqlens_q
    longest = options.max_seqlen_q
    if longest is not None and longest < 0:
        raise refuse(ValueError, "max_seqlen_q", longest, "must be >= 0", "Pass None to derive it")
    if cu is None:
        _check_rank(
            "q", q, 4, "(b, sq, h, d)", "For packed (total_q, h, d) queries pass cu_seqlens_q"
        )
        batch, seqlen_q = q.shape[:2]
        if longest is not None and longest < seqlen_q and tensors.seqused_q is None:
            raise refuse(
                ValueError,
                "max_seqlen_q",
                longest,
                f"must not be below q's length, {seqlen_q}",
                "Pass None, or seqused_q if only part of q counts",
            )
        return batch, seqlen_q
    _check_rank("q", q, 3, "(total_q, h, d) with cu_seqlens_q", "Drop cu_seqlens_q for dense q")
    batch = _check_cu_seqlens("cu_seqlens_q", cu, q.device)
    total = q.shape[0]
    return batch, total if longest is None or longest > total else longest


def key_extent(tensors: AttentionTensors, options: AttentionOptions, batch: int) -> int:
    """Longest key sequence."""
    k, v, longest = tensors.k, tensors.v, options.max_seqlen_k
    if longest is not None and longest < 0:
        raise refuse(ValueError, "max_seqlen_k", longest, "must be >= 0", "Pass None to derive it")
    if tensors.page_table is not None:
        capacity = _check_paged(tensors, batch)
        if tensors.seqused_k is None or longest is None or longest > capacity:
            return capacity
        return longest
    if tensors.cu_seqlens_k is not None:
        for name, t in (("k", k), ("v", v)):
            _check_rank(
                name, t, 3, "(total_k, h_k, d) with cu_seqlens_k", "Drop cu_seqlens_k for dense k"
            )
        found = _check_cu_seqlens("cu_seqlens_k", tensors.cu_seqlens_k, k.device)
        _check_same_batch("cu_seqlens_k", found, batch)
        total = k.shape[0]
        return total if longest is None or longest > total else longest
    for name, t in (("k", k), ("v", v)):
        _check_rank(
            name,
            t,
            4,
            "(b, sk, h_k, d)",
            "For packed keys pass cu_seqlens_k, for pages a page_table",
        )
    if tensors.kv_batch_idx is None:
        _check_same_batch("k", k.shape[0], batch)
    if longest is not None and longest < k.shape[1] and tensors.seqused_k is None:
        raise refuse(
            ValueError,
            "max_seqlen_k",
            longest,
            f"must not be below k's length, {k.shape[1]}",
            "Pass None, or seqused_k if only part of k counts",
        )
    return k.shape[1]


def _check_same_batch(name: str, found: int, batch: int) -> None:
    if found != batch:
        raise refuse(
            ValueError,
            f"batch of {name}",
            found,
            f"must be q's, {batch}",
            "Pass as many key sequences as query sequences",
        )


def _check_cu_seqlens(name: str, cu: Tensor, device: torch.device) -> int:
    """Number of sequences that `cu` cuts."""
    checks.check_is_tensor(name, cu)
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise refuse(
            ValueError,
            f"{name}.shape",
            tuple(cu.shape),
            "must be (b + 1,)",
            "Pass the starts of all sequences followed by the end of the last",
        )
    check_index_tensor(name, cu, device, cu.shape, "(b + 1,)")
    return cu.shape[0] - 1


def _check_paged(tensors: AttentionTensors, batch: int) -> int:
    """Number of keys that the pages of one sequence can hold."""
    k, v, table = tensors.k, tensors.v, tensors.page_table
    assert table is not None
    for name, t in (("k", k), ("v", v)):
        _check_rank(
            name,
            t,
            4,
            "(pages, page_size, h_k, d) with a page_table",
            "Drop the page_table for keys that are not paged",
        )
    checks.check_is_tensor("page_table", table)
    if table.dim() != 2:
        raise refuse(
            ValueError,
            "page_table.shape",
            tuple(table.shape),
            "must be (b, max_pages)",
            "Pass one row of page numbers per sequence, padded with -1",
        )
    expected = (batch, table.shape[1])
    check_index_tensor("page_table", table, k.device, expected, "(b, max_pages)")
    for name, other in (
        ("cu_seqlens_k", tensors.cu_seqlens_k),
        ("cache_batch_idx", tensors.kv_batch_idx),
        ("cache_leftpad", tensors.cache_leftpad),
    ):
        if other is not None:
            raise refuse(
                NotImplementedError,
                name,
                "a tensor",
                "cannot be combined with page_table",
                "Express it through the page_table and seqused_k",
            )
    if k.shape[1] < 1:
        raise refuse(ValueError, "page_size", k.shape[1], "must be at least 1", "Pass larger pages")
    return table.shape[1] * k.shape[1]


def check_optional_tensors(tensors: AttentionTensors, batch: int, num_heads: int) -> None:
    """Every optional tensor that is given has the shape, dtype and device it must have."""
    device = tensors.q.device
    if tensors.seqused_q is not None:
        check_index_tensor("seqused_q", tensors.seqused_q, device, (batch,), "(b,)")
    if tensors.seqused_k is not None:
        check_index_tensor("seqused_k", tensors.seqused_k, device, (batch,), "(b,)")
    if tensors.kv_batch_idx is not None or tensors.cache_leftpad is not None:
        _check_cache_rows(tensors, batch)
    if tensors.k_descale is not None or tensors.v_descale is not None:
        _check_descales(tensors, batch)
    if tensors.sink is not None:
        sink = tensors.sink
        checks.check_is_tensor("s_aux", sink)
        checks.check_dtype("s_aux", sink, FLOAT_DTYPES)
        checks.check_device("s_aux", sink, device)
        checks.check_shape("s_aux", sink, (num_heads,), "(h,)")
    if tensors.alibi_slopes is not None:
        _check_alibi(tensors.alibi_slopes, device, batch, num_heads)
    if tensors.blocks is not None:
        _check_blocks(tensors, batch, num_heads)
    if tensors.out is not None:
        expected = (*tensors.q.shape[:-1], tensors.v.shape[-1])
        _check_result("out", tensors.out, tensors.q, expected, tensors.q.dtype)
    if tensors.lse is not None:
        lengths = tensors.q.shape[:-2]
        _check_result(
            "lse", tensors.lse, tensors.q, (*lengths[:-1], num_heads, lengths[-1]), torch.float32
        )


def _check_blocks(tensors: AttentionTensors, batch: int, num_heads: int) -> None:
    lengths = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    for name in (*lengths, "page_table", "kv_batch_idx", "cache_leftpad"):
        if getattr(tensors, name) is not None:
            raise refuse(
                NotImplementedError,
                "block_sparse_tensors",
                f"given with {name}",
                "block lists belong to dense sequences of full length",
                f"Leave {name} out, or express the mask by mask_mod",
            )
    assert tensors.blocks is not None
    sizes = (tensors.q.shape[1], tensors.k.shape[1])
    tensors.blocks.check(batch, num_heads, sizes, tensors.q.device)


def _check_cache_rows(tensors: AttentionTensors, batch: int) -> None:
    for name, rows in (
        ("cache_batch_idx", tensors.kv_batch_idx),
        ("cache_leftpad", tensors.cache_leftpad),
    ):
        if rows is None:
            continue
        if tensors.cu_seqlens_k is not None:
            raise refuse(
                ValueError,
                name,
                "a tensor",
                "needs dense k and v (b, sk, h_k, d)",
                "Drop it, or drop cu_seqlens_k",
            )
        check_index_tensor(name, rows, tensors.q.device, (batch,), "(b,)")


def _check_descales(tensors: AttentionTensors, batch: int) -> None:
    for name, descale in (("k_descale", tensors.k_descale), ("v_descale", tensors.v_descale)):
        if descale is None:
            continue
        checks.check_is_tensor(name, descale)
        if tensors.k.dtype != FP8:
            raise refuse(
                ValueError,
                name,
                "a tensor",
                f"scales k and v of {FP8}, these are {tensors.k.dtype}",
                f"Drop {name}, or multiply k or v by it",
            )
        checks.check_dtype(name, descale, (torch.float32,))
        checks.check_device(name, descale, tensors.q.device)
        checks.check_shape(name, descale, (batch, tensors.k.shape[-2]), "(b, h_k)")


def _check_alibi(slopes: Tensor, device: torch.device, batch: int, num_heads: int) -> None:
    checks.check_is_tensor("alibi_slopes", slopes)
    checks.check_dtype("alibi_slopes", slopes, (torch.float32,))
    checks.check_device("alibi_slopes", slopes, device)
    if slopes.shape not in ((num_heads,), (batch, num_heads)):
        raise refuse(
            ValueError,
            "alibi_slopes.shape",
            tuple(slopes.shape),
            f"must be (h,) = ({num_heads},) or (b, h) = ({batch}, {num_heads})",
            "Pass one slope per query head",
        )


def _check_result(
    name: str, tensor: Tensor, q: Tensor, expected: tuple[int, ...], dtype: torch.dtype
) -> None:
    checks.check_is_tensor(name, tensor)
    checks.check_dtype(name, tensor, (dtype,))
    checks.check_device(name, tensor, q.device)
    checks.check_shape(name, tensor, expected, "the shape of the result")


def check_options(tensors: AttentionTensors, options: AttentionOptions) -> None:
    """Numbers are in range, callables callable, and what autograd records differentiable."""
    if not 0.0 <= options.softcap < math.inf:
        raise refuse(
            ValueError,
            "softcap",
            options.softcap,
            "must be >= 0 and finite",
            "Pass 0.0 to switch it off",
        )
    if options.softmax_scale is not None and not math.isfinite(options.softmax_scale):
        raise refuse(
            ValueError,
            "softmax_scale",
            options.softmax_scale,
            "must be finite",
            "Pass a finite float, or None for 1 / sqrt(head_dim)",
        )
    if not 0.0 <= options.dropout_p < 1.0:
        raise refuse(
            ValueError, "dropout_p", options.dropout_p, "must be in [0, 1)", "Pass 0.0 for none"
        )
    if not 0 <= options.num_splits <= MAX_NUM_SPLITS:
        raise refuse(
            ValueError,
            "num_splits",
            options.num_splits,
            f"must be in 0 .. {MAX_NUM_SPLITS}",
            "Pass 0 to let the plan decide, or 1 not to split",
        )
    if tensors.aux_tensors is not None or options.score_mod is not None:
        _check_score_mod(tensors, options)
    if options.requires_grad:
        _check_differentiable(tensors, options)


def _check_score_mod(tensors: AttentionTensors, options: AttentionOptions) -> None:
    if options.score_mod is not None:
        arguments = "score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors"
        checks.check_function("score_mod", options.score_mod, arguments)
    if tensors.aux_tensors is None:
        return
    if options.score_mod is None and not isinstance(options.mask, Custom):
        raise refuse(
            ValueError,
            "aux_tensors",
            f"{len(tensors.aux_tensors)} tensors",
            "only score_mod and mask_mod read them, and neither is given",
            "Pass score_mod or mask_mod, or drop aux_tensors",
        )
    for i, t in enumerate(tensors.aux_tensors):
        checks.check_is_tensor(f"aux_tensors[{i}]", t)
        checks.check_device(f"aux_tensors[{i}]", t, tensors.q.device)


def _check_differentiable(tensors: AttentionTensors, options: AttentionOptions) -> None:
    if tensors.k.dtype == FP8:
        raise refuse(
            NotImplementedError,
            "k.dtype",
            FP8,
            "a call on fp8 k and v has no gradient",
            "Call under torch.no_grad(), or convert k and v to q's dtype",
        )
    for name, result in (("out", tensors.out), ("lse", tensors.lse)):
        if result is not None:
            raise refuse(
                ValueError,
                name,
                f"tensor of shape {tuple(result.shape)}",
                "a given result cannot be differentiated",
                f"Drop {name}=, or call under torch.no_grad()",
            )
    if tensors.blocks is not None:
        raise refuse(
            NotImplementedError,
            "block_sparse_tensors",
            "given",
            "has no gradient",
            "Call under torch.no_grad(), or express the mask by mask_mod",
        )
    if options.score_mod is not None:
        raise refuse(
            NotImplementedError,
            "score_mod",
            repr(options.score_mod),
            "has no gradient",
            "Call under torch.no_grad(), or express it by softcap, alibi_slopes or mask_mod",
        )

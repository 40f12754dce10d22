"""Checks of what CPU tensors contain. CUDA tensors are not read: that would stall every call.

On a GPU the same rules hold and are the caller's responsibility.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import refuse
from .problem import AttentionProblem, AttentionTensors


def check_values(problem: AttentionProblem, tensors: AttentionTensors) -> None:
    """The index tensors of one call agree with the memory they point into.

    Raises:
        ValueError: cu_seqlens that do not ascend from 0 to at most the number of tokens, a sequence
            longer than its maximum or its buffer, a page, row or padding outside the cache.
    """
    if problem.device.type != "cpu":
        return
    room_q = _room(tensors.cu_seqlens_q, "cu_seqlens_q", tensors.q, problem.seqlen_q, problem.batch)
    _check_used("seqused_q", tensors.seqused_q, room_q)
    if tensors.page_table is not None:
        capacity = tensors.page_table.shape[1] * tensors.k.shape[1]
        _check_used("seqused_k", tensors.seqused_k, [capacity] * problem.batch, problem.seqlen_k)
        check_pages(tensors.page_table, tensors.seqused_k, tensors.k)
        return
    room_k = _room(tensors.cu_seqlens_k, "cu_seqlens_k", tensors.k, problem.seqlen_k, problem.batch)
    _check_used("seqused_k", tensors.seqused_k, room_k)
    check_rows(tensors.kv_batch_idx, tensors.k.shape[0])
    _check_used("cache_leftpad", tensors.cache_leftpad, room_k)


def check_rows(rows: Tensor | None, num_rows: int) -> None:
    """Every entry of kv_batch_idx names a row of the cache."""
    if rows is None:
        return
    for i, row in enumerate(rows.tolist()):
        if not 0 <= row < num_rows:
            raise refuse(
                ValueError,
                f"cache_batch_idx[{i}]",
                row,
                f"must be in 0 .. {num_rows - 1}, the rows of the cache",
                "Pass rows that exist",
            )


def check_pages(page_table: Tensor, lengths: Tensor | None, pages: Tensor) -> None:
    """Every page that `lengths` (None: the whole table) makes a kernel read exists."""
    num_pages, page_size = pages.shape[:2]
    if lengths is None:
        wanted = torch.ones_like(page_table, dtype=torch.bool)
    else:
        first = torch.arange(page_table.shape[1], device="cpu") * page_size
        wanted = first < lengths[:, None]
    bad = wanted & ((page_table < 0) | (page_table >= num_pages))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise refuse(
            ValueError,
            f"page_table[{row}, {column}]",
            int(page_table[row, column]),
            f"must be in 0 .. {num_pages - 1}, since the sequence reaches this page",
            "Allocate the page, or shorten the sequence in seqused_k / cache_seqlens",
        )


def check_cu_seqlens(name: str, cu: Tensor, total: int) -> list[int]:
    """`cu` ascends from 0 to at most `total`; returns it as a list."""
    values = cu.tolist()
    if values[0] != 0:
        raise refuse(ValueError, f"{name}[0]", values[0], "must be 0", "Start with a 0")
    for i, (start, end) in enumerate(zip(values[:-1], values[1:], strict=True)):
        if end < start:
            raise refuse(
                ValueError,
                f"{name}[{i + 1}]",
                end,
                f"must not be below {name}[{i}] = {start}",
                "Pass cumulative sums of the sequence lengths",
            )
    if values[-1] > total:
        raise refuse(
            ValueError,
            f"{name}[-1]",
            values[-1],
            f"must not exceed the {total} tokens that are there",
            "Pass cumulative sums of the sequence lengths",
        )
    return values


def _room(cu: Tensor | None, name: str, tokens: Tensor, longest: int, batch: int) -> list[int]:
    """How many tokens each sequence can have."""
    if cu is None:
        return [tokens.shape[1]] * batch
    values = check_cu_seqlens(name, cu, tokens.shape[0])
    lengths = [end - start for start, end in zip(values[:-1], values[1:], strict=True)]
    if lengths and max(lengths) > longest:
        maximum = name.replace("cu_seqlens", "max_seqlen")
        raise refuse(
            ValueError,
            maximum,
            longest,
            f"must not be below the longest sequence, {max(lengths)}",
            f"Pass {maximum}={max(lengths)} or more, or None to derive it",
        )
    return lengths


def _check_used(
    name: str, used: Tensor | None, room: list[int], longest: int | None = None
) -> None:
    if used is None:
        return
    for i, (value, available) in enumerate(zip(used.tolist(), room, strict=True)):
        limit = available if longest is None else min(available, longest)
        if value > limit:
            raise refuse(
                ValueError,
                f"{name}[{i}]",
                value,
                f"must not exceed the {limit} tokens that the sequence has room for",
                "Pass lengths within the buffer and within max_seqlen",
            )

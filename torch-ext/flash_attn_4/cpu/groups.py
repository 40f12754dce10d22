"""Which queries meet which keys: one view of every memory layout.

A `Group` is a set of consecutive sequences of the same lengths that are computed together: the
whole batch for dense tensors, a single sequence otherwise. It hands out slices of tensors by
position in the sequence, so the arithmetic never sees cu_seqlens, page tables or padding, and what
lies outside a sequence is never read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..flash_attn4_cute.problem import AttentionProblem, AttentionTensors, Layout


@dataclass(frozen=True, slots=True)
class SeqlenInfo:
    """What score_mod and mask_mod learn about the sequence at hand."""

    seqlen_q: int
    seqlen_k: int
    offset_q: int
    offset_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """`count` sequences starting with number `first`, all with the same lengths.

    offset_q and offset_k are where the sequence starts in packed tensors or in its row; row is the
    sequence's row of dense keys; pages are its page numbers, or None if the keys are not paged.
    """

    first: int
    count: int
    seqlen_q: int
    seqlen_k: int
    offset_q: int = 0
    offset_k: int = 0
    row: int = 0
    pages: Tensor | None = None

    @property
    def seqlen_info(self) -> SeqlenInfo:
        return SeqlenInfo(self.seqlen_q, self.seqlen_k, self.offset_q, self.offset_k)

    def part(self, first: int, count: int) -> Group:
        """`count` of its sequences from the `first` on."""
        if count == self.count:
            return self
        return replace(self, first=self.first + first, count=count, row=self.row + first)

    def queries(self, t: Tensor, start: int, end: int) -> Tensor:
        """View (count, h, end - start, d) of q, out or a gradient of them."""
        if t.dim() == 4:
            return t[self.first : self.first + self.count, start:end].transpose(1, 2)
        return t[self.offset_q + start : self.offset_q + end].transpose(0, 1)[None]

    def statistics(self, t: Tensor, start: int, end: int) -> Tensor:
        """View (count, h, end - start) of the log-sum-exp or a gradient of it."""
        if t.dim() == 3:
            return t[self.first : self.first + self.count, :, start:end]
        return t[None, :, self.offset_q + start : self.offset_q + end]

    def per_query_head(self, t: Tensor, num_heads: int) -> Tensor:
        """(count, h, 1, 1) of a factor (b, h_k) of keys or values."""
        part = t[self.first : self.first + self.count]
        return part.repeat_interleave(num_heads // t.shape[1], 1)[..., None, None]

    def keys(self, t: Tensor, start: int, end: int) -> Tensor:
        """(count, h_k, end - start, d) of k or v: a view, or a copy of just these pages."""
        if self.pages is not None:
            size = t.shape[1]
            page = start // size
            gathered = t[self.pages[page : (end - 1) // size + 1]].flatten(0, 1)
            return gathered[start - page * size : end - page * size].transpose(0, 1)[None]
        start, end = start + self.offset_k, end + self.offset_k
        if t.dim() == 4:
            return t[self.row : self.row + self.count, start:end].transpose(1, 2)
        return t[start:end].transpose(0, 1)[None]

    def add_keys(self, t: Tensor, start: int, end: int, part: Tensor) -> None:
        """Add `part` (count, h_k, end - start, d) to the tokens that `keys` reads."""
        if self.pages is None:
            self.keys(t, start, end).add_(part)
            return
        token = torch.arange(start, end, device="cpu")
        where = (self.pages[token // t.shape[1]], token % t.shape[1])
        t.index_put_(where, part[0].transpose(0, 1), accumulate=True)


def make_groups(problem: AttentionProblem, tensors: AttentionTensors) -> list[Group]:
    """The groups of one call, without those that have no query."""
    b = problem.batch
    dense = problem.q_layout is Layout.DENSE and problem.kv_layout is Layout.DENSE
    if dense and not _is_ragged(problem):
        whole = Group(first=0, count=b, seqlen_q=problem.seqlen_q, seqlen_k=problem.seqlen_k)
        return [whole] if whole.seqlen_q and b else []
    starts_q, lengths_q = _extents(tensors.cu_seqlens_q, tensors.seqused_q, b, problem.seqlen_q)
    capacity = problem.seqlen_k
    if problem.kv_layout is Layout.PAGED:
        assert tensors.page_table is not None
        capacity = tensors.page_table.shape[1] * tensors.k.shape[1]
    starts_k, lengths_k = _extents(tensors.cu_seqlens_k, tensors.seqused_k, b, capacity)
    rows = range(b) if tensors.kv_batch_idx is None else tensors.kv_batch_idx.tolist()
    if tensors.cache_leftpad is not None:
        starts_k = tensors.cache_leftpad.tolist()
        lengths_k = [n - pad for n, pad in zip(lengths_k, starts_k, strict=True)]
    return [
        Group(
            first=i,
            count=1,
            seqlen_q=lengths_q[i],
            seqlen_k=max(0, lengths_k[i]),
            offset_q=starts_q[i],
            offset_k=starts_k[i],
            row=rows[i],
            pages=None if tensors.page_table is None else tensors.page_table[i],
        )
        for i in range(b)
        if lengths_q[i] > 0
    ]


def _is_ragged(problem: AttentionProblem) -> bool:
    return (
        problem.has_seqused_q
        or problem.has_seqused_k
        or problem.has_kv_batch_idx
        or problem.has_cache_leftpad
    )


def _extents(
    cu: Tensor | None, used: Tensor | None, batch: int, length: int
) -> tuple[list[int], list[int]]:
    """Start and length of every sequence."""
    if cu is None:
        starts, lengths = [0] * batch, [length] * batch
    else:
        bounds = cu.tolist()
        starts = bounds[:-1]
        lengths = [end - start for start, end in zip(starts, bounds[1:], strict=True)]
    return starts, lengths if used is None else used.tolist()

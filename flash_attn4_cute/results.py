"""What a call writes its results to, and which rows of these it writes.

Rows that belong to no sequence, behind the last cu_seqlens or seqused, are written by no kernel.
Results that are made here have 0 and -inf there; those that a caller gives keep what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import AttentionProblem, AttentionTensors, Layout


def is_sparse(problem: AttentionProblem) -> bool:
    """Whether rows of the results may belong to no sequence."""
    return problem.has_seqused_q or problem.q_layout is Layout.VARLEN


def has_work(problem: AttentionProblem, tensors: AttentionTensors) -> bool:
    """Whether there are queries, and keys that they may see."""
    return problem.batch > 0 and problem.seqlen_k > 0 and tensors.q.numel() > 0


def allocate(problem: AttentionProblem, tensors: AttentionTensors) -> None:
    """Give `tensors` the results that the caller did not."""
    q = tensors.q
    sparse = is_sparse(problem)
    if tensors.out is None:
        tensors.out = new_out(q, problem.out_shape(q), sparse)
    if tensors.lse is None and problem.return_lse:
        tensors.lse = new_lse(q, problem.lse_shape(q), sparse)


def new_out(q: Tensor, shape: Sequence[int], sparse: bool) -> Tensor:
    """A tensor for the output, 0 where nobody may write."""
    return q.new_zeros(shape) if sparse else q.new_empty(shape)


def new_lse(q: Tensor, shape: Sequence[int], sparse: bool) -> Tensor:
    """A tensor for the log-sum-exp, -inf where nobody may write."""
    if sparse:
        return q.new_full(shape, -torch.inf, dtype=torch.float32)
    return q.new_empty(shape, dtype=torch.float32)


def clear(problem: AttentionProblem, tensors: AttentionTensors) -> None:
    """Write what queries get that see no key to the rows of all sequences.

    That is 0, and as log-sum-exp the sink, or -inf without one.
    """
    out, lse = tensors.out, tensors.lse
    assert out is not None
    if problem.batch == 0:
        return
    rows = _rows_of_sequences(tensors) if is_sparse(problem) else None
    if rows is None:
        out.zero_()
    else:
        out.masked_fill_(rows[..., None, None], 0.0)
    if lse is not None:
        sink = out.new_full((1,), -torch.inf) if tensors.sink is None else tensors.sink
        nothing = sink.to(torch.float32)[:, None].expand(lse.shape)
        lse.copy_(nothing if rows is None else torch.where(rows.unsqueeze(-2), nothing, lse))


def _rows_of_sequences(tensors: AttentionTensors) -> Tensor:
    """Bool (total_q,) or (b, sq); on the device, without waiting for it."""
    q, starts, used = tensors.q, tensors.cu_seqlens_q, tensors.seqused_q
    rows = torch.arange(q.shape[-3], dtype=torch.int32, device=q.device)
    if starts is None:
        assert used is not None
        return rows < used[:, None]
    inside = rows < starts[-1]
    if used is None:
        return inside
    sequence = torch.searchsorted(starts, rows, right=True).sub_(1).clamp_(max=len(used) - 1)
    return inside & (rows - starts[sequence] < used[sequence])

"""What a call writes its results to, and which rows of these it writes.

Rows that belong to no sequence, behind the last cu_seqlens or seqused, are written by no kernel.
Results that are made here have 0 and -inf there; those that a caller gives keep what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import AttentionProblem, AttentionTensors


def has_rows_of_no_sequence(tensors: AttentionTensors) -> bool:
    """Whether some of the results may be that."""
    return tensors.cu_seqlens_q is not None or tensors.seqused_q is not None


def has_work(problem: AttentionProblem, tensors: AttentionTensors) -> bool:
    """Whether there are queries, and keys that they may see."""
    return problem.batch > 0 and problem.seqlen_k > 0 and tensors.q.numel() > 0


def allocate(problem: AttentionProblem, tensors: AttentionTensors) -> None:
    """Give `tensors` the results that the caller did not."""
    q = tensors.q
    cleared = has_rows_of_no_sequence(tensors)
    if tensors.out is None:
        tensors.out = new_out(q, problem.out_shape(q), cleared)
    if tensors.lse is None and problem.return_lse:
        tensors.lse = new_lse(q, problem.lse_shape(q), cleared)


def new_out(q: Tensor, shape: Sequence[int], cleared: bool) -> Tensor:
    """A tensor for the output, 0 if `cleared`."""
    return q.new_zeros(shape) if cleared else q.new_empty(shape)


def new_lse(q: Tensor, shape: Sequence[int], cleared: bool) -> Tensor:
    """A tensor for the log-sum-exp, -inf if `cleared`."""
    if cleared:
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
    rows = _rows_of_sequences(tensors) if has_rows_of_no_sequence(tensors) else None
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
    inside = (rows >= starts[0]) & (rows < starts[-1])
    if used is None:
        return inside
    sequence = torch.searchsorted(starts, rows, right=True).sub_(1).clamp_(0, len(used) - 1)
    return inside & (rows - starts[sequence] < used[sequence])

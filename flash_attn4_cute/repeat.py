"""A call that was made before, made again: nothing is decided anew, only addresses are passed on.

What a call on the GPU launches is decided by the metadata of its tensors and by its options, see
`problem.signature`. The first call with a signature leaves a `Repeat`; later ones take it.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .launcher.kernel import Kernel
from .problem import AttentionProblem, AttentionTensors, Layout

# Where the kernels' arguments come from; their scores' own are below `score`.
_SOURCES = {
    "mQ": "q",
    "mK": "k",
    "mV": "v",
    "mO": "out",
    "mLSE": "lse",
    "mCuSeqlensQ": "cu_seqlens_q",
    "mCuSeqlensK": "cu_seqlens_k",
    "mSeqUsedQ": "seqused_q",
    "mSeqUsedK": "seqused_k",
    "mPageTable": "page_table",
    "mKvRow": "kv_batch_idx",
    "mLeftPad": "cache_leftpad",
    "mKDescale": "k_descale",
    "mVDescale": "v_descale",
    "mAlibi": "alibi_slopes",
    "mSink": "sink",
}
_WORKSPACE = "mWorkspace"


class Repeat:
    """Allocates what the first call allocated, and launches what it launched."""

    def __init__(self, problem: AttentionProblem, kernel: Kernel, arguments: Any):
        self.problem = problem
        self.ready = kernel.ready((arguments,))
        names = [_name(arguments, found.path[1:]) for found in kernel.pointer_inputs]
        self.workspace_at = names.index(_WORKSPACE) if _WORKSPACE in names else None
        self.workspace_size = 0
        if self.workspace_at is not None:
            names.remove(_WORKSPACE)
            self.workspace_size = arguments.mWorkspace.numel()
        self.sparse = is_sparse(problem)
        self.to_allocate = self.sparse or problem.return_lse
        q, out = arguments[0], arguments[3]
        # The cheapest way to new memory is to ask for more of the same.
        self.out_like_q = not self.sparse and out.shape == q.shape and q.is_contiguous()
        results = ("out", "lse") if problem.return_lse else ("out",)
        self.is_plain = [_SOURCES[name] for name in names] == ["q", "k", "v", *results]
        self.tensors_of = attrgetter(*(_SOURCES[name] for name in names))

    @staticmethod
    def of(problem: AttentionProblem, launched: tuple[Any, Any]) -> Repeat | None:
        """From the kernel of a call and its arguments; None if it cannot be repeated like that."""
        kernel, arguments = launched
        if problem.misfits or problem.dropout_p or not isinstance(kernel, Kernel):
            return None
        if kernel.program.decisive:
            return None
        return Repeat(problem, kernel, arguments)

    def __call__(self, tensors: AttentionTensors) -> tuple[Tensor, Tensor | None]:
        """(out, lse) of a call with the same signature."""
        if self.out_like_q and tensors.out is None:
            tensors.out = torch.empty_like(tensors.q)
        if tensors.out is None or self.to_allocate:
            allocate(self.problem, tensors)
        addresses = [t.data_ptr() for t in self.tensors_of(tensors)]
        if self.workspace_at is not None:
            size, device = self.workspace_size, tensors.q.device
            workspace = torch.empty(size, dtype=torch.float32, device=device)
            addresses.insert(self.workspace_at, workspace.data_ptr())
        self.ready.launch(addresses)
        assert tensors.out is not None
        return tensors.out, tensors.lse

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """What the public function returns, from q, k and v alone; see `is_plain`."""
        problem = self.problem
        out = torch.empty_like(q) if self.out_like_q else q.new_empty(problem.out_shape(q))
        addresses = [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()]
        lse = None
        if self.to_allocate:
            lse = q.new_empty(problem.lse_shape(q), dtype=torch.float32)
            addresses.append(lse.data_ptr())
        if self.workspace_at is not None:
            workspace = torch.empty(self.workspace_size, dtype=torch.float32, device=q.device)
            addresses.insert(self.workspace_at, workspace.data_ptr())
        self.ready.launch(addresses)
        return out if lse is None else (out, lse)


def is_sparse(problem: AttentionProblem) -> bool:
    """Whether rows of the results may belong to no sequence: no kernel writes them."""
    return problem.has_seqused_q or problem.q_layout is Layout.VARLEN


def allocate(problem: AttentionProblem, tensors: AttentionTensors) -> None:
    """Give `tensors` the results that the caller did not."""
    q = tensors.q
    sparse = is_sparse(problem)
    if tensors.out is None:
        shape = problem.out_shape(q)
        tensors.out = q.new_zeros(shape) if sparse else q.new_empty(shape)
    if tensors.lse is None and problem.return_lse:
        tensors.lse = q.new_empty(problem.lse_shape(q), dtype=torch.float32)
    if sparse and tensors.lse is not None:
        tensors.lse.fill_(-torch.inf)


def _name(arguments: Any, path: tuple[int, ...]) -> str:
    """The name of the field at `path` of nested named tuples."""
    *outer, last = path
    for index in outer:
        arguments = arguments[index]
    return arguments._fields[last]

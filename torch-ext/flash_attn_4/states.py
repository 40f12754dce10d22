"""Merging what users have of partial results: by one launch of a kernel, or by PyTorch operations.

The kernel is the one that merges split keys. PyTorch operations take over on the CPU, and where
gradients are recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import execute, ops
from .flash_attn4_cute import repeat_merge
from .flash_attn4_cute.watchers import dual_levels, is_only_memory
from .gradients import needs_grad
from .merge import combine_parts

Parts = tuple[Tensor, ...]


def is_merged_by_kernel(outs: Parts, lses: Parts) -> bool:
    """Whether no PyTorch operations merge these parts."""
    return execute.has_kernels(outs[0].device) and not _is_differentiated((*outs, *lses))


def merged(
    outs: Parts, lses: Parts, out: Tensor | None, dtype: torch.dtype, key: tuple | None
) -> tuple[Tensor, Tensor]:
    """(out in `dtype`, lse) of one stack of parts, or of two parts.

    LSEs have heads last in and of a stack, and first with two parts. What was launched is
    remembered under `key`, see `repeat_merge`.
    """
    stacked = len(outs) == 1
    if stacked:
        lses = (lses[0].transpose(-1, -2),)
    if not is_merged_by_kernel(outs, lses):
        both = (x[0] if stacked else torch.stack(x) for x in (outs, lses))
        total, lse = combine_parts(*both)
        total = total.to(dtype) if out is None else out.copy_(total)
        return total, lse.transpose(-1, -2) if stacked else lse
    first, first_lse = (x[0][0] if stacked else x[0] for x in (outs, lses))
    if out is None:
        out = first.new_empty(first.shape, dtype=dtype)
    lse = first_lse.new_empty(first_lse.shape)
    returned = lse.transpose(-1, -2) if stacked else lse
    if torch.compiler.is_compiling() or not is_only_memory((*outs, *lses, out)):
        ops.merge(out, lse, list(outs), list(lses))
    else:
        launched = execute.merge(outs, lses, out, lse)
        repeat_merge.remember(key, launched, outs, (out, returned))
    return out, returned


def _is_differentiated(tensors: Parts) -> bool:
    """Whether autograd has to see operations, in reverse or in forward mode."""
    if not torch.compiler.is_compiling() and dual_levels._current_level >= 0:
        return True
    return needs_grad(*tensors)

"""A merge that was made before, made again: only addresses are passed on. See `repeat`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .launcher.kernel import Kernel, ReadyCall
from .likeness import Likeness
from .overlap import overlap
from .repeat import contiguous
from .watchers import is_only_memory

Parts = tuple[Tensor, ...]

known: dict[tuple, RepeatedMerge] = {}  # by key, and the last one of each kind
_MAX_KNOWN = 1024


def merged_again(
    outs: Parts, lses: Parts, out: Tensor | None, dtype: torch.dtype | None
) -> tuple[tuple | None, tuple[Tensor, Tensor] | None]:
    """(key, (out, lse)), by the launch of an earlier merge like this one; None if there was none.

    Nor is there one for memory that is not aligned as it was. The key is for `remember`.
    """
    if is_dynamo_compiling() or not (dtype is None or type(dtype) is torch.dtype):
        return None, None
    tensors = (*outs, *lses) if out is None else (*outs, *lses, out)
    kind = (len(outs), dtype, out is None)  # its last merge is found by a look
    found, key = known.get(kind), None
    if found is None or found.likeness is None or not found.likeness.holds(tensors):
        key = _key_of(kind, tensors)
        found = None if key is None else known.get(key)
        if found is None:
            return key, None
        if found.likeness is None or not found.likeness.holds(tensors):
            if not is_only_memory(tensors):
                return None, None
            found.likeness = Likeness.of(tensors)
        known[kind] = found
    return key, found.again(outs, lses, out)


def _key_of(kind: tuple, tensors: Parts) -> tuple | None:
    """All that decides how parts are merged, or None if it must be worked out each time."""
    key: list[Any] = [*kind]
    try:
        for t in tensors:
            if type(t) is not Tensor or (t.requires_grad and is_grad_enabled()):
                return None
            key += (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.get_device())
    except AttributeError:
        return None
    return tuple(key)


def remember(key: tuple | None, launched: tuple | None, outs: Parts, results: Parts) -> None:
    """Keep what one merge launched: its kernel, and what the kernel returned."""
    if key is None or launched is None or not isinstance(launched[0], Kernel):
        return
    kernel, ready = launched
    if _misaligned((*outs, results[0])) or kernel.program.decisive:
        return
    if len(known) >= _MAX_KNOWN:
        known.clear()
    known[key] = RepeatedMerge(kernel, ready, len(outs), results)


def _misaligned(tensors: Parts) -> int:
    together = 0
    for t in tensors:
        together |= t.data_ptr()
    return together & 15


class RepeatedMerge:
    """Allocates what the first merge allocated, and launches what it launched."""

    def __init__(self, kernel: Kernel, ready: ReadyCall, num_outs: int, results: Parts):
        self.ready = ready
        self.likeness: Likeness | None = None  # of the tensors of such a merge
        self.apart = 0, 0  # the last distances from the parts to an out that lay apart
        out, lse = results
        self.new_out = contiguous(out.shape, out.dtype)
        self.new_lse = tuple(lse.shape), lse.stride(), lse.dtype
        # The fields of CombineArgs: parts, their LSEs, out, lse; parts may be pairs.
        first = (0, num_outs, 2 * num_outs, 2 * num_outs + 1)
        paths = [found.path[1:] for found in kernel.pointer_inputs]
        self.order = tuple(first[field] + sum(member) for field, *member in paths)

    def again(self, outs: Parts, lses: Parts, out: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """(out, lse) of a merge with the same key.

        None if memory is not aligned, or if `out` lies on what is merged.
        """
        driver, device = self.ready.driver, self.ready.device
        if driver.current_device() != device:
            with driver.on(device):
                return self.again(outs, lses, out)
        if out is None:
            out = driver.empty(*self.new_out)
        elif not self._lies_apart(out, outs[0], lses[0]):
            return None
        if _misaligned((*outs, out)):
            return None
        lse = driver.empty(*self.new_lse)
        given = (*outs, *lses, out, lse)
        self.ready.launch([given[place].data_ptr() for place in self.order])
        return out, lse

    def _lies_apart(self, out: Tensor, stack: Tensor, sums: Tensor) -> bool:
        """As in `repeat`; a merge in place goes the slow way, which knows when it is right."""
        at = out.data_ptr()
        distances = at - stack.data_ptr(), at - sums.data_ptr()
        if distances != self.apart:
            if overlap(out, stack) or overlap(out, sums):
                return False
            self.apart = distances
        return True

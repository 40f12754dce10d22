"""Partial results on a CUDA device -> CombineKey -> launch of the kernel that merges them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import compiler
from .checks import refuse
from .decode_arguments import CombineArgs
from .device import supported_card
from .problem import is_aligned
from .splits import MAX_SPLITS

VECTOR = 4  # elements that a lane loads at once: 16 bytes of float32
MAX_COLUMNS = 512  # what the registers of the merge hold


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineKey:
    """Everything that a compiled merge depends on.

    `vector` is how many elements a lane loads at once; with 1 the tensors may have any strides. The
    parts are `stacked` in one tensor, or a pair of tensors.
    """

    variant: str
    dtype: torch.dtype
    out_dtype: torch.dtype
    head_dim: int
    vector: int
    stacked: bool
    packed: bool

    @property
    def family(self) -> str:
        """The kernels' architecture family: one source serves every card."""
        return "sm120"

    def trace(self) -> tuple:
        """The kernel and stand-ins for its arguments; see compiler.KernelKey."""
        from .decode_signature import trace_combine

        return trace_combine(self)


def merge(
    outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], out: Tensor, lse: Tensor
) -> tuple | None:
    """Write the merge of one stack of parts, or of two parts, to `out` and `lse`.

    Everything happens on the device's current stream, without waiting for it. More parts than one
    launch takes are merged in groups first. Returns the kernel and what it returned, if one launch
    of these very tensors was all.
    """
    _check_columns(outs)
    if out.numel() == 0:
        lse.fill_(-torch.inf)
        return None
    if len(outs) == 1 and outs[0].shape[0] > MAX_SPLITS:
        groups = range(0, outs[0].shape[0], MAX_SPLITS)
        partial = out.new_empty((len(groups), *out.shape), dtype=torch.float32)
        partial_lse = lse.new_empty((len(groups), *lse.shape))
        for i, first in enumerate(groups):
            chosen = slice(first, first + MAX_SPLITS)
            merge((outs[0][chosen],), (lses[0][chosen],), partial[i], partial_lse[i])
        merge((partial,), (partial_lse,), out, lse)
        return None
    given = (*outs, *lses)
    if len(outs) == 2:
        outs, lses = _alike(outs), _alike(lses)
    key = combine_key(outs, out)
    args = CombineArgs(
        outs[0] if key.stacked else outs,
        lses[0] if key.stacked else lses,
        out,
        lse,
        None,
        None,
        None,
        out.shape[-3],
    )
    kernel = compiler.compiled(key)
    launched = kernel, kernel(args)
    copied = any(a is not b for a, b in zip(given, (*outs, *lses), strict=True))
    return None if copied else launched


def _check_columns(outs: tuple[Tensor, ...]) -> None:
    """Refuse what the kernel cannot merge.

    Raises:
        NotImplementedError: too many columns.
    """
    columns = outs[0].shape[-1]
    if columns > MAX_COLUMNS:
        raise refuse(
            NotImplementedError,
            f"{'out_partial' if len(outs) == 1 else 'out_a'}.shape[-1]",
            columns,
            f"the GPU merges up to {MAX_COLUMNS} columns",
            "Merge the columns in parts, with the same LSE, or pass CPU tensors",
        )


def explain(outs: tuple[Tensor, ...], out: Tensor | None, dtype: torch.dtype) -> str:
    """What `merge` would launch, for people; `out` None is a new tensor of this dtype."""
    _check_columns(outs)
    stacked = len(outs) == 1
    if 0 in outs[0].shape[stacked:]:
        return "merge: not launched, there is nothing to write"
    if out is None:
        out = (outs[0][0] if stacked else outs[0]).new_empty(outs[0].shape[stacked:], dtype=dtype)
    key = combine_key(outs if stacked else _alike(outs), out)
    parts = outs[0].shape[0] if stacked else 2
    groups = f", in groups of {MAX_SPLITS} first" if parts > MAX_SPLITS else ""
    return (
        f"merge: a kernel for {key.variant}, {parts} parts{groups}, "
        f"{key.vector} elements at a time\n"
        f"code: {compiler.origin(key)}"
    )


def combine_key(outs: tuple[Tensor, ...], out: Tensor) -> CombineKey:
    """The kernel that merges `outs` into `out`."""
    variant = supported_card(out.device).variant
    assert variant is not None
    wide = out.shape[-1] % VECTOR == 0 and all(map(is_aligned, (*outs, out)))
    return CombineKey(
        variant=variant,
        dtype=outs[0].dtype,
        out_dtype=out.dtype,
        head_dim=out.shape[-1],
        vector=VECTOR if wide else 1,
        stacked=len(outs) == 1,
        packed=out.dim() == 3,
    )


def _alike(pair: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The two tensors with the same strides, so that they are one tensor a step apart."""
    a, b = pair
    if a.stride() != b.stride():
        a, b = a.contiguous(), b.contiguous()
    return a, b

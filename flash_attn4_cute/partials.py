"""Checks for merging partial attention results, each a pair (out, lse)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .checks import FLOAT_DTYPES, refuse
from .overlap import check_not_expanded, overlap
from .watchers import is_only_memory


def check_partial(out: Tensor, lse: Tensor, names: tuple[str, str], stacked: bool) -> None:
    """`lse` holds one float32 per row of `out`.

    Args:
        out: (b, s, h, d_v) or (total, h, d_v); with `stacked`, a leading dimension of partials.
        lse: float32 (b, h, s) or (h, total); with `stacked`, as `out` without its last dimension.
        names: what the caller calls the two.
    """
    for name, tensor in zip(names, (out, lse), strict=True):
        checks.check_is_tensor(name, tensor)
    checks.check_dtype(names[0], out, FLOAT_DTYPES)
    checks.check_dtype(names[1], lse, (torch.float32,))
    if lse.device != out.device:
        raise refuse(
            ValueError,
            f"{names[1]}.device",
            lse.device,
            f"must be {names[0]}'s device, {out.device}",
            "Move it there",
        )
    rank = out.dim() - int(stacked)
    if rank not in (3, 4):
        shapes = "(b, s, h, d) or (total, h, d)"
        raise refuse(
            ValueError,
            f"{names[0]}.shape",
            tuple(out.shape),
            f"must be {'(parts,) + ' if stacked else ''}{shapes}",
            "Stack the results that the attention functions return",
        )
    *lead, length, heads = out.shape[:-1]
    if stacked:
        meaning = "one value per row, heads last, not first as the attention functions return it"
        checks.check_shape(names[1], lse, tuple(out.shape[:-1]), meaning)
    else:
        checks.check_shape(names[1], lse, (*lead, heads, length), "one value per row, heads first")
    if stacked and out.shape[0] < 1:
        raise refuse(
            ValueError, f"{names[0]}.shape[0]", 0, "there must be a part", "Pass one or more"
        )


def check_same_rows(out_a: Tensor, out_b: Tensor) -> None:
    """Two partial results are of the same rows, dtype and device."""
    checks.check_dtype("out_b", out_b, (out_a.dtype,))
    checks.check_shape("out_b", out_b, tuple(out_a.shape), "out_a's shape")
    if out_b.device != out_a.device:
        raise refuse(
            ValueError,
            "out_b.device",
            out_b.device,
            f"must be out_a's device, {out_a.device}",
            "Move it there",
        )


def check_combined(
    out: Tensor | None, parts: tuple[Tensor, Tensor], dtype: torch.dtype, traced: bool
) -> None:
    """`out`, if given, can take the merge of `parts`, (out_partial, lse_partial).

    What is `traced` has no memory yet.
    """
    like = parts[0]
    if dtype not in FLOAT_DTYPES:
        raise refuse(
            TypeError,
            "out_dtype",
            dtype,
            "must be torch.float32, torch.float16 or torch.bfloat16",
            "Pass None for the dtype of out_partial",
        )
    if out is None:
        return
    checks.check_is_tensor("out", out)
    checks.check_dtype("out", out, (dtype,))
    checks.check_device("out", out, like.device)
    checks.check_shape("out", out, tuple(like.shape[1:]), "the shape of one part")
    check_not_expanded("out", out)
    if not traced and is_only_memory((out, *parts)):
        check_apart_from_parts(out, *parts)


def check_apart_from_parts(out: Tensor, out_partial: Tensor, lse_partial: Tensor) -> None:
    """`out` shares no memory with what is merged, or is one of the parts itself.

    A row is read before it is written, so that a merge in place is right.
    """
    name = "lse_partial"
    if not overlap(out, lse_partial):
        name = "out_partial"
        if not overlap(out, out_partial):
            return
        if all(_is_same(out, part) or not overlap(out, part) for part in out_partial):
            return
    raise refuse(
        ValueError,
        "out",
        f"memory of {name}",
        "is written while other rows of it are still read",
        "Pass another tensor or one whole part, or None to allocate one",
    )


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.stride(), a.dtype) == (b.data_ptr(), b.stride(), b.dtype)

"""Users' functions, traced into a kernel: score_mod and mask_mod.

A function sees one score or one pair of positions at a time. Its numbers are `TensorSSA`s of one
element, as upstream's kernels pass them: operators, comparisons, `abs()` and `cute.math` work on
them, and so does indexing an aux tensor with them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32

from .seqlen import SeqlenInfo


def as_vector(value: cutlass.Numeric) -> cute.TensorSSA:
    """A scalar as a vector of one element."""
    element = cute.make_rmem_tensor(1, type(value))
    element[0] = value
    return element.load()


def as_scalar(value: Any, dtype: type[cutlass.Numeric]) -> cutlass.Numeric:
    """What a user's function returned, a vector of one element or a plain number, as a scalar."""
    return dtype(value[0] if isinstance(value, cute.TensorSSA) else value)


class AuxTensor:
    """An aux tensor that a user's function may index with what it is given.

    An index that leaves dimensions out yields an AuxTensor of those, as in PyTorch.
    """

    def __init__(self, tensor: cute.Tensor):
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def __getitem__(self, index: Any) -> Any:
        indices = index if isinstance(index, tuple) else (index,)
        if not any(isinstance(i, cute.TensorSSA) for i in indices):
            return self.tensor[index]
        missing = cute.rank(self.tensor) - len(indices)
        scalars = [i[0] if isinstance(i, cute.TensorSSA) else i for i in indices]
        found = self.tensor[(*scalars, *[None] * missing)]
        return AuxTensor(found) if missing else as_vector(found)


@dataclass(frozen=True)
class ModSite:
    """Where in a call the scores of one tile are: what a user's function learns beside indices."""

    batch: Int32
    head: Int32
    seqlen: SeqlenInfo
    aux: Any  # tuple of cute.Tensor, or None

    def arguments(self, row: Int32, key: Int32) -> tuple:
        """(b, h, q_idx, kv_idx, seqlen_info, aux_tensors).

        Rows and keys past the end take the last one's place: a table indexed by them has no more.
        """
        row = cutlass.min(row, self.seqlen.seqlen_q - 1)
        key = cutlass.min(key, self.seqlen.seqlen_k - 1)
        aux = None if self.aux is None else [AuxTensor(t) for t in self.aux]
        indices = (as_vector(Int32(i)) for i in (self.batch, self.head, row, key))
        return (*indices, self.seqlen, aux)


@cute.jit
def apply_score_mod(
    mod: Constexpr[Callable], acc_mn: cute.Tensor, coord_mn: cute.Tensor, corner: Any, site: ModSite
):
    """Replace each score of a thread by mod(score, ...); `corner` is the tile's (row, key)."""
    for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(acc_mn, mode=[1])):
            row, key = corner[0] + coord_mn[r, c][0], corner[1] + coord_mn[r, c][1]
            score = as_vector(acc_mn[r, c])
            acc_mn[r, c] = as_scalar(mod(score, *site.arguments(row, key)), Float32)


@cute.jit
def apply_mask_mod(
    mod: Constexpr[Callable], acc_mn: cute.Tensor, coord_mn: cute.Tensor, corner: Any, site: ModSite
):
    """Set to -inf the scores of a thread that mod(b, h, q_idx, kv_idx, ...) does not admit."""
    for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(acc_mn, mode=[1])):
            row, key = corner[0] + coord_mn[r, c][0], corner[1] + coord_mn[r, c][1]
            seen = as_scalar(mod(*site.arguments(row, key)), Boolean)
            acc_mn[r, c] = acc_mn[r, c] if seen else -Float32.inf

"""The factors of an fp8 cache, one of K and one of V for each sequence and key head.

A key is its row times K's factor and a value its row times V's, so the scores and the sums over V
are the plain ones times a factor: neither K nor V is multiplied.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, const_expr

from ..arguments import SMALLEST_SCALE, ForwardArgs
from .scheduler import WorkTile


def of_tile(args: ForwardArgs, work: WorkTile):
    """The sequence and key head of a tile, whose factors they are."""
    heads, heads_kv = (cute.size(m, mode=[cute.rank(m) - 2]) for m in (args.mQ, args.mK))
    return work.batch, work.head // (heads // heads_kv)


def scale_and_factor(args: Any, is_scaled: Constexpr[bool], place: tuple):
    """(scale of the softmax, factor of the dot products or None) with K's factor in one of them.

    Of ForwardArgs or DecodeArgs, at `place` (sequence, key head). `is_scaled`: steps that are not
    linear need the dot products themselves.
    """
    scale, factor = args.softmax_scale, None
    if const_expr(args.mKDescale is not None):
        factor = args.mKDescale[place]
        if const_expr(not is_scaled):
            scale, factor = cutlass.max(scale * factor, Float32(SMALLEST_SCALE)), None
    return scale, factor


def with_v_descale(args: ForwardArgs, work: WorkTile, factor: Any):
    """`factor` of O, None being 1, times that of V."""
    if const_expr(args.mVDescale is not None):
        descale = args.mVDescale[of_tile(args, work)]
        factor = descale if factor is None else factor * descale
    return factor

"""From dot products to scores: the steps between Q K^T and the softmax.

With z = softmax_scale q.k, query i and key j of sequences of lengths sq and sk,

    s = score_mod(softcap tanh(z / softcap)) - slope |i + sk - sq - j|

where each step may be absent. Without any, the scale is folded into the exponentials and nothing is
done here. What mask_mod hides becomes -inf; the band mask is mask.py's.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ..arguments import ForwardArgs
from .mods import ModSite, apply_mask_mod, apply_score_mod
from .scheduler import WorkTile
from .seqlen import SeqlenInfo
from .softmax import LOG2_E


@dataclass(frozen=True)
class ScoreSteps:
    """The steps of one head of one sequence. `rule` is a ScoreRule, `mask_mod` a function."""

    rule: Constexpr[Any]
    mask_mod: Constexpr[Any]
    scale: Float32
    softcap: Float32
    slope: Float32
    site: ModSite

    @staticmethod
    @cute.jit
    def of(
        rule: Constexpr[Any],
        mask_mod: Constexpr[Any],
        args: ForwardArgs,
        work: WorkTile,
        seqlen: SeqlenInfo,
    ) -> "ScoreSteps":
        scale, softcap, slope, aux = Float32(1.0), Float32(1.0), Float32(0.0), None
        if const_expr(args.score is not None):
            scale, softcap, aux = args.score.scale, args.score.softcap, args.score.aux_tensors
            if const_expr(rule.alibi):
                slope = args.score.mAlibi[work.batch, work.head]
        site = ModSite(work.batch, work.head, seqlen, aux)
        return ScoreSteps(rule, mask_mod, scale, softcap, slope, site)

    @property
    def any(self) -> bool:
        """Whether there is anything to do before the band mask."""
        return self.rule.scaled or self.mask_mod is not None

    @cute.jit
    def apply(self, acc_mn: cute.Tensor, coord_mn: cute.Tensor, row: Int32, key: Int32):
        """Turn one thread's dot products into scores, in place.

        `acc_mn` and `coord_mn` are as in `BandMask.apply`.
        """
        if const_expr(self.rule.softcap):
            self._cap(acc_mn)
        elif const_expr(self.rule.scaled):
            for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
                acc_mn[r, None] = acc_mn[r, None].load() * self.scale
        if const_expr(self.rule.score_mod is not None):
            apply_score_mod(self.rule.score_mod, acc_mn, coord_mn, (row, key), self.site)
        if const_expr(self.rule.alibi):
            self._add_bias(acc_mn, coord_mn, row, key)
        if const_expr(self.mask_mod is not None):
            apply_mask_mod(self.mask_mod, acc_mn, coord_mn, (row, key), self.site)

    @cute.jit
    def _cap(self, acc_mn: cute.Tensor):
        # tanh x = 1 - 2 / (e^2x + 1): exact in both limits, where tanh.approx is off by 2^-11.
        factor = self.scale / self.softcap * (2.0 * LOG2_E)
        for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(acc_mn, mode=[1])):
                power = cute.math.exp2(acc_mn[r, c] * factor, fastmath=True)
                below = 2.0 * self.softcap * cute.arch.rcp_approx(power + 1.0)
                acc_mn[r, c] = self.softcap - below

    @cute.jit
    def _add_bias(self, acc_mn: cute.Tensor, coord_mn: cute.Tensor, row: Int32, key: Int32):
        diagonal = self.site.seqlen.seqlen_k - self.site.seqlen.seqlen_q
        for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
            # Relative to this thread's first column, every column is a compile-time constant.
            own = Float32(row + coord_mn[r, 0][0] + diagonal - key - coord_mn[0, 0][1])
            for c in cutlass.range_constexpr(cute.size(acc_mn, mode=[1])):
                distance = own - Float32(coord_mn[0, c][1] - coord_mn[0, 0][1])
                distance = cute.arch.fmax(distance, -distance)
                acc_mn[r, c] = acc_mn[r, c] - self.slope * distance

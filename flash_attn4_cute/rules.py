"""What a kernel is compiled for between the dot products and the softmax: presence, not values.

A rule says which steps there are; the kernel gets their numbers when it runs. Callables are steps
too: a kernel belongs to one function object, so two closures of one function are two kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .mask_rule import Band, Custom, band_of
from .problem import AttentionProblem


@dataclass(frozen=True, slots=True)
class BandRule:
    """Which bounds of the band mask exist, and what else decides whether a key is seen."""

    has_left: bool
    has_right: bool
    mask_mod: Callable | None = None
    block_sparse: bool = False

    @staticmethod
    def of(problem: AttentionProblem) -> "BandRule":
        band = band_of(problem.mask)
        left, right = (band.left, band.right) if isinstance(band, Band) else (None, None)
        mask_mod = problem.mask.mask_mod if isinstance(problem.mask, Custom) else None
        sparse = problem.block_size is not None
        return BandRule(left is not None, right is not None, mask_mod, sparse)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRule:
    """The steps from q.k to a score, and what the softmax does beside them.

    `scaled`: softmax_scale is applied to every score, as a step that follows or a negative scale
    needs; else it is folded into the exponentials. `sink` is the dtype of the sinks, `aux` holds
    the (dtype, rank) of each aux tensor.
    """

    scaled: bool = False
    softcap: bool = False
    alibi: bool = False
    score_mod: Callable | None = None
    dropout: bool = False
    sink: torch.dtype | None = None
    aux: tuple[tuple[torch.dtype, int], ...] = ()

    @staticmethod
    def of(problem: AttentionProblem) -> "ScoreRule":
        steps = problem.softcap != 0.0, problem.has_alibi, problem.score_mod is not None
        return ScoreRule(
            scaled=any(steps) or problem.softmax_scale < 0,
            softcap=problem.softcap != 0.0,
            alibi=problem.has_alibi,
            score_mod=problem.score_mod,
            dropout=problem.dropout_p > 0.0,
            sink=problem.sink_dtype,
            aux=problem.aux,
        )

    def names(self) -> list[str]:
        """The steps, for people."""
        found = [name for name in ("softcap", "alibi", "dropout") if getattr(self, name)]
        if self.score_mod is not None:
            found.append(f"score_mod {getattr(self.score_mod, '__name__', 'callable')}")
        return found + ["sinks"] * (self.sink is not None)


PLAIN = ScoreRule()

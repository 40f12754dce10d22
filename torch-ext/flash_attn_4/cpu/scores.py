"""From dot products to masked scores: the one place with the formula.

z_ij = scale * q_i . k_j
s_ij = score_mod(softcap * tanh(z_ij / softcap)) - slope * |i + sk - sq - j|
s_ij = -inf where query i must not see key j
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..flash_attn4_cute.block_sparse import FULL_BLOCK, SKIPPED
from ..flash_attn4_cute.checks import refuse
from ..flash_attn4_cute.problem import (
    AttentionProblem,
    AttentionTensors,
    Band,
    Custom,
    Full,
    band_of,
)
from .groups import Group


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `rows` and keys `cols` of the sequences of a group, as ranges of positions."""

    group: Group
    rows: range
    cols: range

    @property
    def diagonal(self) -> int:
        """Query i stands on key i + diagonal."""
        return self.group.seqlen_k - self.group.seqlen_q

    def row_positions(self) -> Tensor:
        """(rows, 1): the key that each query stands on."""
        return torch.arange(self.rows.start, self.rows.stop, device="cpu")[:, None] + self.diagonal

    def col_positions(self) -> Tensor:
        """(cols,): the keys."""
        return torch.arange(self.cols.start, self.cols.stop, device="cpu")


def _check_answer(name: str, answer: Any, shape: tuple[int, ...], what: str) -> None:
    """`answer` is what a caller's function says of scores of this shape (count, h, rows, cols)."""
    if not isinstance(answer, Tensor):
        fault: Any = (TypeError, type(answer).__name__)
    else:
        given = tuple(answer.shape)
        padded = (1,) * (len(shape) - len(given)) + given
        if len(given) <= len(shape) and all(
            m in (1, n) for m, n in zip(padded, shape, strict=True)
        ):
            return
        fault = (ValueError, f"a tensor of shape {given}")
    rule = f"must return {what}, a tensor that broadcasts to {tuple(shape)}"
    raise refuse(
        fault[0], f"{name}(...)", fault[1], rule, "Compute it from the function's arguments"
    )


def _block_rule(problem: AttentionProblem, tensors: AttentionTensors) -> dict[str, Any]:
    """The fields of a ScoreRule that a block-sparse mask fills."""
    if tensors.blocks is None:
        return {}
    size = tensors.blocks.block_size
    kinds = tensors.blocks.kinds(-(-problem.seqlen_k // size[1]))
    return {"block_kinds": kinds, "block_size": size}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRule:
    """Everything between the dot products and the softmax, the same for all tiles of a call."""

    scale: float
    softcap: float
    band: Band | Full
    mask_mod: Callable | None
    score_mod: Callable | None
    alibi_slopes: Tensor | None
    aux_tensors: list[Tensor] | None
    num_heads: int
    block_kinds: Tensor | None = None
    block_size: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, problem: AttentionProblem, tensors: AttentionTensors) -> ScoreRule:
        return cls(
            scale=problem.softmax_scale,
            softcap=problem.softcap,
            band=band_of(problem.mask),
            mask_mod=problem.mask.mask_mod if isinstance(problem.mask, Custom) else None,
            score_mod=problem.score_mod,
            alibi_slopes=tensors.alibi_slopes,
            aux_tensors=None if tensors.aux_tensors is None else list(tensors.aux_tensors),
            num_heads=problem.num_heads,
            **_block_rule(problem, tensors),
        )

    def visible_keys(self, group: Group, rows: range) -> range:
        """The keys that any of these queries may see; keys outside need not be read."""
        start, stop = 0, group.seqlen_k
        diagonal = group.seqlen_k - group.seqlen_q
        if isinstance(self.band, Band):
            if self.band.left is not None:
                start = max(start, rows.start + diagonal - self.band.left)
            if self.band.right is not None:
                stop = min(stop, rows.stop + diagonal + self.band.right)
        return range(start, max(start, stop))

    def apply(self, z: Tensor, tile: Tile) -> Tensor:
        """Masked scores for the scaled dot products z (count, h, rows, cols); may overwrite z."""
        if self.softcap:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.score_mod is not None:
            modified = self.score_mod(z, *self._coordinates(tile))
            _check_answer("score_mod", modified, z.shape, "the scores that it makes of `score`")
            z = modified.to(z.dtype).expand(z.shape).clone()
        if self.alibi_slopes is not None:
            distance = (tile.row_positions() - tile.col_positions()).abs()
            z = z - self._slopes(tile) * distance
        visible = self.visible(tile)
        return z if visible is None else z.masked_fill(~visible, -torch.inf)

    def slope(self, z: Tensor) -> Tensor | None:
        """ds/dz = 1 - tanh^2(z / softcap), or None where it is 1; score_mod has no gradient."""
        return 1.0 - torch.tanh(z / self.softcap).square_() if self.softcap else None

    def visible(self, tile: Tile) -> Tensor | None:
        """Which keys each query sees, broadcastable to (count, h, rows, cols); None for all."""
        visible = self._in_band(tile)
        admitted = None
        if self.mask_mod is not None:
            admitted = self.mask_mod(*self._coordinates(tile))
            if isinstance(admitted, (bool, int)) or hasattr(admitted, "__array__"):
                admitted = torch.as_tensor(admitted, device="cpu")
            shape = (tile.group.count, self.num_heads, len(tile.rows), len(tile.cols))
            _check_answer("mask_mod", admitted, shape, "whether q_idx may see kv_idx")
            admitted = admitted.to(torch.bool)
        if self.block_kinds is not None:
            kinds = self._kinds(tile)
            partial = kinds != SKIPPED
            admitted = partial if admitted is None else (kinds == FULL_BLOCK) | (partial & admitted)
        if admitted is None:
            return visible
        return admitted if visible is None else admitted & visible

    def _kinds(self, tile: Tile) -> Tensor:
        """(count or 1, h or 1, rows, cols): the kind of the block that each score lies in."""
        kinds = self.block_kinds
        assert kinds is not None
        if kinds.shape[0] > 1:
            kinds = kinds[tile.group.first : tile.group.first + tile.group.count]
        rows = torch.arange(tile.rows.start, tile.rows.stop, device="cpu") // self.block_size[0]
        cols = tile.col_positions() // self.block_size[1]
        return kinds[:, :, rows[:, None], cols]

    def _in_band(self, tile: Tile) -> Tensor | None:
        # i + sk - sq - left <= j <= i + sk - sq + right; None where the tile lies inside the band.
        if isinstance(self.band, Full):
            return None
        left, right = self.band.left, self.band.right
        first, last = tile.rows.start + tile.diagonal, tile.rows.stop - 1 + tile.diagonal
        visible = None
        if right is not None and tile.cols.stop - 1 > first + right:
            visible = tile.col_positions() <= tile.row_positions() + right
        if left is not None and tile.cols.start < last - left:
            recent = tile.col_positions() >= tile.row_positions() - left
            visible = recent if visible is None else visible & recent
        return visible

    def _slopes(self, tile: Tile) -> Tensor:
        """(count or 1, h, 1, 1)."""
        slopes = self.alibi_slopes
        assert slopes is not None
        if slopes.dim() == 2:
            slopes = slopes[tile.group.first : tile.group.first + tile.group.count]
        return slopes.reshape(-1, self.num_heads, 1, 1)

    def _coordinates(self, tile: Tile) -> tuple:
        """(b, h, q_idx, kv_idx, seqlen_info, aux_tensors) for a user's callable, broadcastable."""
        group = tile.group
        return (
            torch.arange(group.first, group.first + group.count, device="cpu").view(-1, 1, 1, 1),
            torch.arange(self.num_heads, device="cpu").view(1, -1, 1, 1),
            torch.arange(tile.rows.start, tile.rows.stop, device="cpu").view(1, 1, -1, 1),
            torch.arange(tile.cols.start, tile.cols.stop, device="cpu").view(1, 1, 1, -1),
            group.seqlen_info,
            self.aux_tensors,
        )

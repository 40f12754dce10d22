"""Block-sparse masks: which blocks of queries meet which blocks of keys.

Upstream's convention. Scores are cut into blocks of `block_size` = (queries, keys), counted from
the first query and the first key. For each block of queries there are two lists of blocks of keys:
`full`, seen whole, and `mask`, seen as mask_mod decides (whole without a mask_mod). Blocks in no
list are not computed. A band mask holds besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_is_tensor, check_shape, refuse

SKIPPED, PARTIAL, FULL_BLOCK = 0, 1, 2
ROWS, KEYS = 16, 8  # what block sizes must be multiples of: the tile of one mma


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """The lists of one call: counts (b or 1, h or 1, M), indices (b or 1, h or 1, M, N)."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None
    full_block_idx: Tensor | None
    block_size: tuple[int, int]

    @classmethod
    def of(cls, given: Any) -> BlockSparse:
        """From an object with the fields of upstream's BlockSparseTensorsTorch.

        Raises:
            TypeError, ValueError, NotImplementedError: naming the field.
        """
        name = "block_sparse_tensors"
        for field in ("cu_total_m_blocks", "cu_block_idx_offsets"):
            if getattr(given, field, None) is not None:
                rule = "block lists of packed sequences are not supported"
                raise refuse(NotImplementedError, f"{name}.{field}", "tensor", rule, "Leave it out")
        size = getattr(given, "block_size", None)
        if size is None or len(size) != 2 or size[0] < 1 or size[1] < 1:
            rule = "must be (queries, keys) of one block"
            raise refuse(
                ValueError, f"{name}.block_size", size, rule, "Pass for example (128, 128)"
            )
        if size[0] % ROWS or size[1] % KEYS:
            rule = f"must be multiples of {ROWS} queries and {KEYS} keys"
            raise refuse(ValueError, f"{name}.block_size", size, rule, "Choose larger blocks")
        mask, full = (_lists(given, kind) for kind in ("mask", "full"))
        if mask is None:
            rule = "the list of partial blocks must be given"
            raise refuse(ValueError, f"{name}.mask_block_cnt", None, rule, "Pass counts of 0")
        full_cnt, full_idx = full or (None, None)
        return cls(*mask, full_cnt, full_idx, (int(size[0]), int(size[1])))

    def check(self, batch: int, heads: int, lengths: tuple[int, int], device: Any) -> None:
        """The lists fit a call.

        Raises:
            ValueError: a shape or a device that does not.
        """
        num_m = -(-lengths[0] // self.block_size[0])
        pairs = (
            ("mask", self.mask_block_cnt, self.mask_block_idx),
            ("full", self.full_block_cnt, self.full_block_idx),
        )
        for kind, cnt, idx in pairs:
            if cnt is None or idx is None:
                continue
            expected = tuple(
                1 if found == 1 else wanted
                for found, wanted in zip(cnt.shape, (batch, heads, num_m), strict=True)
            )
            name = f"block_sparse_tensors.{kind}_block"
            meaning = "(b or 1, h or 1, blocks of queries)"
            check_shape(f"{name}_cnt", cnt, (*expected[:2], num_m), meaning)
            shape = (*cnt.shape, idx.shape[3])
            check_shape(
                f"{name}_idx", idx, shape, "the counts' shape and the most entries of a list"
            )
            for t in (cnt, idx):
                if t.device != device:
                    rule = f"must be q's device, {device}"
                    raise refuse(ValueError, f"{name}.device", t.device, rule, "Move it there")

    def kinds(self, num_n: int) -> Tensor:
        """uint8 (b or 1, h or 1, M, num_n): SKIPPED, PARTIAL or FULL_BLOCK. Waits for no device."""
        outer = self.mask_block_cnt.shape
        if self.full_block_cnt is not None:
            outer = torch.broadcast_shapes(outer, self.full_block_cnt.shape)
        # A last column takes what is no entry.
        kinds = self.mask_block_cnt.new_zeros((*outer, num_n + 1), dtype=torch.uint8)
        for kind, cnt, idx in (
            (PARTIAL, self.mask_block_cnt, self.mask_block_idx),
            (FULL_BLOCK, self.full_block_cnt, self.full_block_idx),
        ):
            if cnt is None or idx is None:
                continue
            place = torch.arange(idx.shape[3], device=idx.device)
            counts = (place < cnt[..., None]) & (idx >= 0) & (idx < num_n)
            target = torch.where(counts, idx, num_n).expand(*outer, idx.shape[3])
            kinds.scatter_(3, target.long(), kind)
        return kinds[..., :num_n].contiguous()


def tile_lists(
    kinds: Tensor, block_size: tuple[int, int], lengths: tuple[int, int], tile: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(counts, lists) of the key tiles that each tile of queries needs, for tiles of a kernel.

    An entry, int32, is twice the number of the key tile, plus 1 if some block in it is not full.
    """
    least = most = kinds
    for dim in (0, 1):
        starts = torch.arange(0, lengths[dim], tile[dim], device=kinds.device)
        ends = (starts + tile[dim]).clamp(max=lengths[dim]) - 1
        first, last = starts // block_size[dim], ends // block_size[dim]
        span = torch.arange(tile[dim] // block_size[dim] + 2, device=kinds.device)
        covered = torch.minimum(first[:, None] + span, last[:, None])
        most = most.movedim(2 + dim, 2)[:, :, covered].amax(3).movedim(2, 2 + dim)
        least = least.movedim(2 + dim, 2)[:, :, covered].amin(3).movedim(2, 2 + dim)
    skipped = most == SKIPPED
    order = torch.argsort(skipped.to(torch.uint8), dim=3, stable=True)
    unfinished = torch.gather((least != FULL_BLOCK).to(torch.int32), 3, order)
    lists = order.to(torch.int32) * 2 + unfinished
    return (~skipped).sum(3, dtype=torch.int32), lists


def _lists(given: Any, kind: str) -> tuple[Tensor, Tensor] | None:
    """Counts and indices of the blocks of one kind."""
    cnt: Any = getattr(given, f"{kind}_block_cnt", None)
    idx: Any = getattr(given, f"{kind}_block_idx", None)
    if cnt is None and idx is None:
        return None
    for field, t, rank in ((f"{kind}_block_cnt", cnt, 3), (f"{kind}_block_idx", idx, 4)):
        name = f"block_sparse_tensors.{field}"
        check_is_tensor(name, t)
        if t.dtype != torch.int32:
            raise refuse(TypeError, f"{name}.dtype", t.dtype, "must be torch.int32", "Convert it")
        if t.dim() != rank:
            rule = f"must have {rank} dimensions"
            raise refuse(ValueError, f"{name}.shape", tuple(t.shape), rule, "Add those of b and h")
    return cnt, idx

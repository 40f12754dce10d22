"""The piece of work that all roles of a CTA agree on without talking to each other."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32

from ..arguments import ForwardArgs
from ..common.mask import BandMask
from ..common.scheduler import TileScheduler, WorkTile
from ..common.seqlen import SeqlenInfo
from . import pair
from .tiles import BLOCK_M, TileConfig


@dataclass(frozen=True)
class Work:
    """`num_blocks` key blocks for some rows of one head, the last one first.

    `row` is the first row of this CTA's first Q tile. In a pair, Q tiles of the CTAs alternate, and
    `num_blocks` is what either needs. With no key block, all roles but the correction pass on.
    """

    tile: WorkTile
    seqlen: SeqlenInfo
    mask: BandMask
    row: Int32
    last_block: Int32
    num_blocks: Int32

    def tile_row(self, ctas: int, tile):
        """The first row of this CTA's Q tile `tile`."""
        return self.row + tile * ctas * BLOCK_M


@dataclass(frozen=True)
class WorkQueue:
    """The tiles of this CTA, one a turn."""

    cfg: Constexpr[TileConfig]
    rule: Constexpr[Any]
    scheduler: TileScheduler

    @cute.jit
    def has_work(self, turn: Int32):
        return self.scheduler.index(turn, self.cfg.ctas) < self.scheduler.num_tiles()

    @cute.jit
    def work(self, args: ForwardArgs, turn: Int32) -> Work:
        cfg = self.cfg
        tile = self.scheduler.tile(self.scheduler.index(turn, cfg.ctas))
        seqlen = SeqlenInfo.of(args, tile.batch)
        mask = BandMask.of(self.rule, args.window_left, args.window_right, seqlen)
        row = tile.m_block * cfg.block_m
        end_row = cutlass.min(row + cfg.block_m, seqlen.seqlen_q)
        lo, hi = mask.blocks(row, end_row, cfg.block_n)
        num_blocks = hi - lo if row < seqlen.seqlen_q else 0
        own_row = row + pair.rank(cfg.ctas) * BLOCK_M
        return Work(tile, seqlen, mask, own_row, hi - 1, num_blocks)

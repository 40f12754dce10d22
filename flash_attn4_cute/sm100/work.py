"""The piece of work that all roles of a CTA agree on without talking to each other."""

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.key_blocks import KeyBlocks
from ..common.mask import BandMask
from ..common.scheduler import WorkTile
from ..common.seqlen import SeqlenInfo
from . import pair
from .rows import RowMap
from .tiles import BLOCK_M, TileConfig
from .turns import TilesByRank, TilesFromCounter


@dataclass(frozen=True)
class Work:
    """`num_blocks` key blocks for the queries of some Q tiles, the last one first: `block(i)`.

    `last` is the first one's position in the order of the keys, or in the list of a block-sparse
    mask. `token` is the first query of this CTA's first Q tile, `tile_tokens` the way to its next:
    in a pair, Q tiles of the CTAs alternate, and `num_blocks` is what either needs. `tile.head`
    counts key heads if heads are packed. With no key block, only the correction has work to do.
    A right bound hides the first `hidden` blocks from the first of two Q tiles: it does without.
    """

    rows: Constexpr[RowMap]
    tile_tokens: Constexpr[int]
    tile: WorkTile
    seqlen: SeqlenInfo
    mask: BandMask
    blocks: KeyBlocks
    token: Int32
    last: Int32
    num_blocks: Int32
    hidden: Int32

    @cute.jit
    def first_block(self, tile) -> Int32:
        """The number i of the first block that Q tile `tile` has products with."""
        return self.hidden if tile == 0 else Int32(0)

    @cute.jit
    def block(self, i) -> Int32:
        """Number of the i-th key block; one number more than there are blocks may be asked for."""
        position = self.last - i
        if const_expr(self.blocks.rule.block_sparse):
            position = self.blocks.at(cutlass.max(position, 0))
        return position

    def token_of(self, tile, row):
        """The token of row `row` of Q tile `tile`."""
        return self.token + tile * self.tile_tokens + self.rows.token(row)

    def head_of(self, row):
        """The query head of a row."""
        return self.tile.head * self.rows.group + self.rows.head(row)

    def tile_of(self, row) -> WorkTile:
        """The tile, as one of the head of a row."""
        return WorkTile(self.tile.m_block, self.head_of(row), self.tile.batch)

    @cute.jit
    def has_row(self, tile, row):
        """Whether row `row` of Q tile `tile` is a query of the sequence."""
        exists = self.token_of(tile, row) < self.seqlen.seqlen_q
        if const_expr(self.rows.used < BLOCK_M):
            exists = exists and row < self.rows.used
        return exists


@dataclass(frozen=True)
class WorkQueue:
    """The tiles of this CTA, one a turn, and the split of the keys that belongs to each.

    A role asks `has_work` and, if so, `work` once a turn.
    """

    cfg: Constexpr[TileConfig]
    rows: Constexpr[RowMap]
    rule: Constexpr[Any]
    heads: Int32  # of tiles: key heads if heads are packed
    tiles: TilesByRank | TilesFromCounter

    @property
    def num_heads(self) -> Int32:
        """Query heads of the call."""
        return self.heads * self.rows.group

    def of(self, role: str) -> "WorkQueue":
        """The same as it serves one role."""
        return replace(self, tiles=self.tiles.of(role))

    @cute.jit
    def has_work(self, turn: Int32):
        return self.tiles.has_tile(turn)

    def ask(self):
        """By the load role, once a turn: it will soon need the next piece of work."""
        self.tiles.ask()

    @cute.jit
    def work(self, args: ForwardArgs, turn: Int32) -> Work:
        cfg, rows = self.cfg, self.rows
        tile, seqlen = self.tiles.tile(args, turn)
        mask = BandMask.of(self.rule, args.window_left, args.window_right, seqlen)
        token = tile.m_block * cfg.block_tokens
        end_token = cutlass.min(token + cfg.block_tokens, seqlen.seqlen_q)
        lo, hi = mask.blocks(token, end_token, cfg.block_n)
        blocks = KeyBlocks.of(self.rule, args, tile, seqlen)
        lo, hi = blocks.limits(lo, hi)
        lo, hi = blocks.share(args, tile, lo, hi)
        num_blocks = hi - lo if token < seqlen.seqlen_q else 0
        hidden = self.hidden_blocks(mask, token, hi, num_blocks)
        token += pair.rank(cfg.ctas) * rows.tokens
        tile_tokens = cfg.ctas * rows.tokens
        return Work(
            rows, tile_tokens, tile, seqlen, mask, blocks, token, hi - 1, num_blocks, hidden
        )

    @cute.jit
    def hidden_blocks(self, mask: BandMask, token: Int32, hi: Int32, num_blocks: Int32) -> Int32:
        """How many of the last blocks in front of `hi` no row of the first Q tile sees.

        Not all: each Q tile has at least one block, so that all roles come to the same turns.
        """
        cfg, hidden = self.cfg, Int32(0)
        alone = cfg.ctas == 1 and cfg.q_tiles == 2
        if const_expr(alone and mask.has_right and not self.rule.block_sparse):
            _, seen = mask.blocks(token, token + self.rows.tokens, cfg.block_n)
            hidden = cutlass.max(cutlass.min(hi - seen, num_blocks - 1), 0)
        return hidden

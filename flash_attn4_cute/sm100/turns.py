"""How a CTA comes by its tiles, one a turn: by rank, or from a counter that all CTAs share.

Both answer the same questions of the roles, `has_tile` and `tile`, which ask them once a turn each.
"""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.scheduler import TileScheduler, WorkTile
from ..common.seqlen import SeqlenInfo
from .order import tile_of_index
from .rings import TileRings
from .tiles import TILE_SLOTS, TILE_WORDS

# Words of a tile in shared memory; the number of the tile's block is NO_TILE behind the last tile.
M_BLOCK, HEAD, BATCH, SPLIT, OFFSET_Q, OFFSET_K, SEQLEN_Q, SEQLEN_K, BATCH_K = range(TILE_WORDS)
NO_TILE = -1


@dataclass(frozen=True)
class TilesByRank:
    """Each CTA, or pair, has every so many-th tile: no role needs to be told of it.

    Where sequences differ, pairs are as many as tiles. The grid's second dimension counts splits.
    """

    scheduler: TileScheduler
    ctas: Constexpr[int]

    def of(self, role: str) -> "TilesByRank":
        return self

    @cute.jit
    def has_tile(self, turn: Int32) -> Boolean:
        return self.scheduler.index(turn, self.ctas) < self.scheduler.num_tiles()

    @cute.jit
    def tile(self, args: ForwardArgs, turn: Int32) -> tuple[WorkTile, SeqlenInfo]:
        tile = tile_of_index(args, self.scheduler, self.scheduler.index(turn, self.ctas))
        split = None
        if const_expr(args.mWorkspace is not None):
            _, split, _ = cute.arch.block_idx()
        tile = WorkTile(tile.m_block, tile.head, tile.batch, split)
        return tile, SeqlenInfo.of(args, tile.batch)

    def ask(self):
        """The next tile is known."""


def slot_of(turn: Int32) -> tuple[Int32, Int32]:
    """Where the ring of tiles has that of a turn: slot and phase."""
    assert TILE_SLOTS & (TILE_SLOTS - 1) == 0, "a mask is the remainder"
    return turn & (TILE_SLOTS - 1), turn >> TILE_SLOTS.bit_length() - 1 & 1


@dataclass(frozen=True)
class TilesFromCounter:
    """The schedule role takes tiles from the counter and writes them into a ring; see there."""

    role: Constexpr[Any]  # who reads
    rings: TileRings

    def of(self, role: str) -> "TilesFromCounter":
        return TilesFromCounter(role, self.rings)

    @cute.jit
    def has_tile(self, turn: Int32) -> Boolean:
        slot, phase = slot_of(turn)
        self.rings.tile.wait_full(slot, phase)
        return self.word(M_BLOCK, slot) != NO_TILE

    @cute.jit
    def tile(self, args: ForwardArgs, turn: Int32) -> tuple[WorkTile, SeqlenInfo]:
        """Reads the tile, and gives its slot back."""
        slot, _ = slot_of(turn)
        place = (self.word(word, slot) for word in (M_BLOCK, HEAD, BATCH, SPLIT))
        lengths = (OFFSET_Q, OFFSET_K, SEQLEN_Q, SEQLEN_K, BATCH_K)
        found = WorkTile(*place), SeqlenInfo(*(self.word(word, slot) for word in lengths))
        self.rings.tile.arrive_empty(self.role, slot)
        return found

    def word(self, word: int, slot: Int32) -> Int32:
        """A word of a tile; all lanes have it."""
        return cute.arch.make_warp_uniform(self.rings.sTile[word, slot])

    @cute.jit
    def ask(self):
        """The load role will soon need the tile after this one."""
        self.rings.ask.arrive_full("load", 0)

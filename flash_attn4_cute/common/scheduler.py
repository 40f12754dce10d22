"""Which output tile a CTA computes next."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr


@dataclass(frozen=True)
class WorkTile:
    """One tile of queries: block `m_block` of head `head` of sequence `batch`.

    `split` is which part of the keys it attends to, None if they are not split.
    """

    m_block: Int32
    head: Int32
    batch: Int32
    split: Any = None


@dataclass(frozen=True)
class TileScheduler:
    """The order of the tiles: each CTA takes one a round, until there are none left.

    Heads run fastest, so that query heads which share a key head run together and meet its keys in
    the L2 cache. The last query block comes first: under a causal mask it is the longest, and short
    tiles fill the end of the launch. CTAs are visited forwards and backwards in turn, so that of
    tiles that get shorter with rank every CTA gets as much as any other.
    """

    num_m_blocks: Int32
    num_heads: cute.FastDivmodDivisorV2
    num_batch: cute.FastDivmodDivisorV2

    @staticmethod
    def of(num_m_blocks: Int32, num_heads: Int32, num_batch: Int32) -> "TileScheduler":
        """On the host, where the constants of fast divisions are worked out."""
        divisor = cute.fast_divmod_create_divisor_v2
        return TileScheduler(num_m_blocks, divisor(num_heads), divisor(num_batch))

    @cute.jit
    def num_tiles(self) -> Int32:
        return self.num_m_blocks * self.num_heads.divisor * self.num_batch.divisor

    @cute.jit
    def index(self, turn: Int32, ctas: Constexpr[int] = 1) -> Int32:
        """Rank of the tile of this CTA in round `turn`; with no tile left, num_tiles or more.

        `ctas` CTAs that follow each other take a tile together.
        """
        grid, _, _ = cute.arch.grid_dim()
        cta, _, _ = cute.arch.block_idx()
        if const_expr(ctas > 1):
            grid, cta = grid // ctas, cta // ctas
        return turn * grid + (cta if turn % 2 == 0 else grid - 1 - cta)

    @cute.jit
    def tile(self, index: Int32) -> WorkTile:
        """The tile of rank `index` < num_tiles."""
        rest, head = divmod(index, self.num_heads)
        round_of_heads, batch = divmod(rest, self.num_batch)
        return WorkTile(self.num_m_blocks - 1 - round_of_heads, head, batch)


@dataclass(frozen=True)
class SplitScheduler(TileScheduler):
    """The same order, each tile once for every split of its keys: `num_batch` counts them too."""

    num_splits: cute.FastDivmodDivisorV2

    @staticmethod
    def over(
        num_m_blocks: Int32, num_heads: Int32, num_batch: Int32, num_splits: Int32
    ) -> "SplitScheduler":
        """As `TileScheduler.of`."""
        whole = TileScheduler.of(num_m_blocks, num_heads, num_batch * num_splits)
        splits = cute.fast_divmod_create_divisor_v2(num_splits)
        return SplitScheduler(whole.num_m_blocks, whole.num_heads, whole.num_batch, splits)

    @cute.jit
    def tile(self, index: Int32) -> WorkTile:
        """The tile and split of rank `index` < num_tiles."""
        whole = TileScheduler.tile(self, index)
        batch, split = divmod(whole.batch, self.num_splits)
        return WorkTile(whole.m_block, whole.head, batch, split)

"""Which key blocks a tile of queries visits: a range, or the list of a block-sparse mask."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr

from ..arguments import ForwardArgs
from .mods import ModSite, as_scalar
from .scheduler import WorkTile
from .seqlen import SeqlenInfo

PARTIAL, FULL = 1, 2  # kinds of blocks; 0 is skipped
KEYS = 8  # what sizes of blocks are multiples of


@dataclass(frozen=True)
class KeyBlocks:
    """Positions [lo, hi) in the order of the keys, and the block at each. `rule` is a BandRule."""

    rule: Constexpr[Any]
    count: Int32
    mList: Any  # (key blocks,), or None
    mKinds: Any  # (blocks of queries, blocks of keys), or None
    rows: Int32
    keys: Int32
    site: ModSite

    @staticmethod
    @cute.jit
    def of(
        rule: Constexpr[Any], args: ForwardArgs, work: WorkTile, seqlen: SeqlenInfo
    ) -> "KeyBlocks":
        count, rows, keys = Int32(0), Int32(1), Int32(1)
        mList = mKinds = aux = None
        if const_expr(rule.block_sparse):
            blocks = args.blocks
            count = blocks.mCount[work.batch, work.head, work.m_block]
            mList = blocks.mList[work.batch, work.head, work.m_block, None]
            mKinds = blocks.mKinds[work.batch, work.head, None, None]
            rows, keys = blocks.rows, blocks.keys
            if const_expr(args.score is not None):
                aux = args.score.aux_tensors
        site = ModSite(work.batch, work.head, seqlen, aux)
        return KeyBlocks(rule, count, mList, mKinds, rows, keys, site)

    @cute.jit
    def limits(self, lo: Int32, hi: Int32):
        """The positions, if the band mask leaves the blocks [lo, hi)."""
        if const_expr(self.rule.block_sparse):
            lo, hi = Int32(0), self.count
        return lo, hi

    @cute.jit
    def share(self, args: ForwardArgs, work: WorkTile, lo: Int32, hi: Int32):
        """The part of the positions [lo, hi) that belongs to the tile's split of the keys.

        It depends on the sequence's own lengths and on num_splits alone.
        """
        if const_expr(args.mWorkspace is not None):
            per_split = cute.ceil_div(hi - lo, args.num_splits)
            lo = cutlass.min(lo + work.split * per_split, hi)
            hi = cutlass.min(lo + per_split, hi)
        return lo, hi

    @cute.jit
    def at(self, position: Int32) -> Int32:
        """Number of the key block at `position`."""
        if const_expr(self.rule.block_sparse):
            position = self.mList[position] // 2
        return position

    @cute.jit
    def apply(
        self, position: Int32, acc_mn: cute.Tensor, coord_mn: cute.Tensor, row: Int32, key: Int32
    ):
        """Set to -inf what the lists or mask_mod hide; arguments as in `BandMask.apply`."""
        if self.mList[position] % 2 == 1:
            for r in cutlass.range_constexpr(0, cute.size(acc_mn, mode=[0]), 2):
                for c in cutlass.range_constexpr(0, cute.size(acc_mn, mode=[1]), 2):
                    # Block sizes are multiples of the mma tile, which these four values share.
                    i = cutlass.min(row + coord_mn[r, c][0], self.site.seqlen.seqlen_q - 1)
                    j = cutlass.min(key + coord_mn[r, c][1], self.site.seqlen.seqlen_k - 1)
                    kind = Int32(self.mKinds[i // self.rows, j // self.keys])
                    for half in cutlass.range_constexpr(4):
                        r_own, c_own = r + half // 2, c + half % 2
                        place = coord_mn[r_own, c_own]
                        seen = kind != 0
                        if const_expr(self.rule.mask_mod is not None):
                            own = self.site.arguments(row + place[0], key + place[1])
                            admitted = as_scalar(self.rule.mask_mod(*own), Boolean)
                            seen = kind == FULL or (kind == PARTIAL and admitted)
                        acc_mn[r_own, c_own] = acc_mn[r_own, c_own] if seen else -Float32.inf

    @cute.jit
    def apply_to_row(self, position: Int32, scores: cute.Tensor, row: Int32, key: Int32):
        """The same for one thread that holds all scores of row `row` from column `key` on."""
        if self.mList[position] % 2 == 1:
            i = cutlass.min(row, self.site.seqlen.seqlen_q - 1) // self.rows
            for first in cutlass.range_constexpr(0, cute.size(scores), KEYS):
                j = cutlass.min(key + first, self.site.seqlen.seqlen_k - 1) // self.keys
                kind = Int32(self.mKinds[i, j])
                for c in cutlass.range_constexpr(first, first + KEYS):
                    seen = kind != 0
                    if const_expr(self.rule.mask_mod is not None):
                        admitted = as_scalar(
                            self.rule.mask_mod(*self.site.arguments(row, key + c)), Boolean
                        )
                        seen = kind == FULL or (kind == PARTIAL and admitted)
                    scores[c] = scores[c] if seen else -Float32.inf

"""Which rows and which keys one CTA of a decode launch takes."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr

from ..common.mask import BandMask
from ..common.seqlen import SeqlenInfo
from ..common.tma import EVICT_FIRST, EVICT_NORMAL
from ..decode_arguments import DecodeArgs
from ..decode_tiles import DecodeConfig

LINE_BYTES = 128


@dataclass(frozen=True)
class DecodeGrid:
    """The CTAs of a launch: row tiles run fastest, then key heads, sequences, splits.

    Row tiles read the same keys and should meet them in the L2 cache; the same keys of neighbouring
    heads lie side by side in memory.
    """

    num_m_tiles: Int32
    num_heads_kv: Int32
    num_splits: Int32
    num_batch: Int32

    @cute.jit
    def shape(self) -> tuple[Int32, Int32, int]:
        """Of the launch. Splits are few enough for a dimension of their own: no division."""
        return self.num_m_tiles * self.num_heads_kv * self.num_batch, self.num_splits, 1


@dataclass(frozen=True)
class DecodeWork:
    """One CTA's share: packed rows from `row` on, key blocks [lo, hi) of sequence `batch`.

    Packed row r is token r // group of the sequence, head kv_head * group + r % group.
    """

    row: Int32
    num_rows: Int32  # that exist, from `row` on; may be 0 or less, or beyond the tile
    group: Int32
    kv_head: Int32
    split: Int32
    batch: Int32
    seqlen: SeqlenInfo
    lo: Int32
    hi: Int32
    full_lo: Int32
    full_hi: Int32
    mask: BandMask
    num_m_tiles: Int32

    @cute.jit
    def policy(self) -> Int64:
        """Of the L2 cache for keys and values: read once, they make room first."""
        return Int64(EVICT_FIRST) if self.num_m_tiles == 1 else Int64(EVICT_NORMAL)

    @staticmethod
    @cute.jit
    def of(
        cfg: Constexpr[DecodeConfig], rule: Constexpr[Any], args: DecodeArgs, grid: DecodeGrid
    ) -> "DecodeWork":
        """The share of this CTA. Depends on the sequence's own lengths and on num_splits alone."""
        index, split, _ = cute.arch.block_idx()
        batch = index // (grid.num_m_tiles * grid.num_heads_kv)
        index = index % (grid.num_m_tiles * grid.num_heads_kv)
        kv_head, m_tile = index // grid.num_m_tiles, index % grid.num_m_tiles
        if const_expr(args.mPageTable is not None):
            prefetch(args.mPageTable[batch, None])  # while the length is on its way
        seqlen = SeqlenInfo.of(args, batch)
        group = cute.size(args.mQ, mode=[cute.rank(args.mQ) - 2]) // grid.num_heads_kv
        row = m_tile * cfg.rows
        num_rows = seqlen.seqlen_q * group - row
        mask = BandMask.of(rule, args.window_left, args.window_right, seqlen)
        lo, hi, full_lo, full_hi = Int32(0), Int32(0), Int32(0), Int32(0)
        if num_rows > 0:
            token = row // group
            end_token = (row + cutlass.min(num_rows, cfg.rows) - 1) // group + 1
            lo, hi = mask.blocks(token, end_token, cfg.block_n)
            full_lo, full_hi = mask.full_blocks(token, end_token, cfg.block_n)
            if const_expr(args.mWorkspace is not None):
                per_split = cute.ceil_div(hi - lo, grid.num_splits)
                lo = cutlass.min(lo + split * per_split, hi)
                hi = cutlass.min(lo + per_split, hi)
        return DecodeWork(
            row,
            num_rows,
            group,
            kv_head,
            split,
            batch,
            seqlen,
            lo,
            hi,
            full_lo,
            full_hi,
            mask,
            grid.num_m_tiles,
        )


@cute.jit
def prefetch(mX: cute.Tensor):
    """Bring mX (n) to the L2 cache, a line a thread of the CTA."""
    thread, _, _ = cute.arch.thread_idx()
    first = thread * (LINE_BYTES * 8 // mX.element_type.width)
    if first < cute.size(mX):
        cute.arch.prefetch((mX.iterator + first).llvm_ptr, cache_level="L2")

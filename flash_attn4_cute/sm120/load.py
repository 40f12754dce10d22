"""The load role: one thread of one warp issues every TMA copy of the CTA."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32

from ..arguments import ForwardArgs
from ..common.key_blocks import KeyBlocks
from ..common.mask import BandMask
from ..common.scheduler import TileScheduler
from ..common.seqlen import SeqlenInfo
from ..common.tma import TmaOperand
from ..tiles import TileConfig


@dataclass(frozen=True)
class LoadRole:
    """Feeds the ring of K and V blocks, from the last key block to the first."""

    cfg: Constexpr[TileConfig]
    rule: Constexpr[Any]
    k: TmaOperand
    v: TmaOperand
    kv_ring: Any
    scheduler: TileScheduler
    heads_per_kv_head: Int32

    @cute.jit
    def run(self, args: ForwardArgs):
        kv_ring = self.kv_ring
        turn = Int32(0)
        index = self.scheduler.index(turn)
        while index < self.scheduler.num_tiles():
            kv_ring = self.load_tile(args, index, kv_ring)
            turn += 1
            index = self.scheduler.index(turn)

    @cute.jit
    def load_tile(self, args: ForwardArgs, index: Int32, kv_ring: Any):
        """The keys and values of one tile; returns the ring as it leaves it."""
        work = self.scheduler.tile(index)
        seqlen = SeqlenInfo.of(args, work.batch)
        row = work.m_block * self.cfg.block_m
        if row < seqlen.seqlen_q:
            mask = BandMask.of(self.rule, args.window_left, args.window_right, seqlen)
            end_row = cutlass.min(row + self.cfg.block_m, seqlen.seqlen_q)
            lo, hi = mask.blocks(row, end_row, self.cfg.block_n)
            blocks = KeyBlocks.of(self.rule, args, work, seqlen)
            lo, hi = blocks.limits(lo, hi)
            kv_head = work.head // self.heads_per_kv_head
            tKsK, tKgK = self.k.tiles(kv_head, seqlen.batch_k, seqlen.offset_k)
            tVsV, tVgV = self.v.tiles(kv_head, seqlen.batch_k, seqlen.offset_k)
            for i in cutlass.range(hi - lo, unroll=1):
                n_block = blocks.at(hi - 1 - i)
                slot = kv_ring.acquire_and_advance()
                cute.copy(
                    self.k.atom,
                    tKgK[None, n_block],
                    tKsK[None, slot.index],
                    tma_bar_ptr=slot.barrier,
                )
                slot = kv_ring.acquire_and_advance()
                cute.copy(
                    self.v.atom,
                    tVgV[None, n_block],
                    tVsV[None, slot.index],
                    tma_bar_ptr=slot.barrier,
                )
        return kv_ring

"""The load role: one warp issues every TMA copy of the CTA."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32

from ..arguments import ForwardArgs
from ..common.key_blocks import KeyBlocks
from ..common.kv import KvTile, PagedKv
from ..common.mask import BandMask
from ..common.scheduler import TileScheduler, WorkTile
from ..common.seqlen import SeqlenInfo
from ..tiles import TileConfig


@dataclass(frozen=True)
class LoadRole:
    """Feeds the ring of K and V blocks, from the last key block to the first."""

    cfg: Constexpr[TileConfig]
    rule: Constexpr[Any]
    k: Any  # TmaOperand, or PagedOperand for PagedLoadRole
    v: Any
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
    def share(self, args: ForwardArgs, work: WorkTile, seqlen: SeqlenInfo):
        """(blocks, lo, hi): a tile, or its split, takes the key blocks [lo, hi) of `blocks`."""
        row = work.m_block * self.cfg.block_m
        mask = BandMask.of(self.rule, args.window_left, args.window_right, seqlen)
        end_row = cutlass.min(row + self.cfg.block_m, seqlen.seqlen_q)
        lo, hi = mask.blocks(row, end_row, self.cfg.block_n)
        blocks = KeyBlocks.of(self.rule, args, work, seqlen)
        lo, hi = blocks.share(args, work, *blocks.limits(lo, hi))
        return blocks, lo, hi

    @cute.jit
    def load_tile(self, args: ForwardArgs, index: Int32, kv_ring: Any):
        """The keys and values of one tile; returns the ring as it leaves it."""
        work = self.scheduler.tile(index)
        seqlen = SeqlenInfo.of(args, work.batch)
        row = work.m_block * self.cfg.block_m
        if row < seqlen.seqlen_q:
            kv_ring = self.load_blocks(args, work, seqlen, kv_ring)
        return kv_ring

    @cute.jit
    def load_blocks(self, args: ForwardArgs, work: WorkTile, seqlen: SeqlenInfo, kv_ring: Any):
        """The same for a tile that has queries."""
        blocks, lo, hi = self.share(args, work, seqlen)
        kv_head = work.head // self.heads_per_kv_head
        tKsK, tKgK = self.k.tiles(kv_head, seqlen.batch_k, seqlen.offset_k)
        tVsV, tVgV = self.v.tiles(kv_head, seqlen.batch_k, seqlen.offset_k)
        for i in cutlass.range(hi - lo, unroll=1):
            n_block = blocks.at(hi - 1 - i)
            slot = kv_ring.acquire_and_advance()
            cute.copy(
                self.k.atom, tKgK[None, n_block], tKsK[None, slot.index], tma_bar_ptr=slot.barrier
            )
            slot = kv_ring.acquire_and_advance()
            cute.copy(
                self.v.atom, tVgV[None, n_block], tVsV[None, slot.index], tma_bar_ptr=slot.barrier
            )
        return kv_ring


@dataclass(frozen=True)
class PagedOperand:
    """K or V in pages: a copy atom, the tensor it reads by pages, and where its boxes land."""

    tile: Constexpr[KvTile]
    atom: cute.CopyAtom
    mX: cute.Tensor  # (page_size, d, heads, pages)
    sX: cute.Tensor  # by KvTile.box_layout

    @cute.jit
    def of(self, head: Int32, seqlen_k: Int32, mPages: cute.Tensor) -> PagedKv:
        """What one head of the sequence with these pages takes its blocks from."""
        return PagedKv.of(self.tile, (self.atom, self.mX), self.sX, (head, seqlen_k), mPages)


@dataclass(frozen=True)
class PagedLoadRole(LoadRole):
    """The same for keys in pages, which are looked up while the ring is full."""

    @cute.jit
    def load_blocks(self, args: ForwardArgs, work: WorkTile, seqlen: SeqlenInfo, kv_ring: Any):
        """The keys and values of a tile that has queries; returns the ring as it leaves it."""
        _, lo, hi = self.share(args, work, seqlen)
        place = (work.head // self.heads_per_kv_head, seqlen.seqlen_k)
        k = self.k.of(*place, args.mPageTable[work.batch, None])
        v = self.v.of(*place, args.mPageTable[work.batch, None])
        reach = k.reach
        places = k.look_up(hi - 1)
        # The table is read while the ring is full.
        following = k.look_up(hi - 1 - reach)
        for i in cutlass.range(hi - lo, unroll=1):
            n_block, turn = hi - 1 - i, i % reach
            if i > 0 and turn == 0:
                places.store(following.load())
                following.store(k.look_up(n_block - reach).load())
            slot = kv_ring.acquire_and_advance()
            k.copy(n_block, slot.index, slot.barrier, (places, turn))
            slot = kv_ring.acquire_and_advance()
            v.copy(n_block, slot.index, slot.barrier, (places, turn))
        return kv_ring

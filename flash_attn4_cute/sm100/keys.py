"""Blocks of K and V on their way to the ring: by TMA, or gathered row by row by cp.async.

In a pair of CTAs, each brings its own half: rows of K, columns of V.
"""

from dataclasses import dataclass, replace
from typing import Any

import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.kv import DenseKv, GatheredKv, KvTile, PagedKv
from . import pair
from .clear import clear_rows
from .rings import Rings
from .tiles import BLOCK_N, ELEMENT_BYTES, TileConfig
from .work import Work


@dataclass(frozen=True)
class KvStream:
    """K or V of one head of one sequence, and the pages of the block that comes next."""

    source: Any  # DenseKv, PagedKv or GatheredKv
    pages: cute.Tensor
    seqlen_k: Int32

    @staticmethod
    def of(source: Any, first_block: Int32, seqlen_k: Int32) -> "KvStream":
        return KvStream(source, source.look_up(first_block), seqlen_k)

    @cute.jit
    def look_ahead(self, block: Int32):
        """Find the pages of the next block while the ring is full."""
        self.pages.store(self.source.look_up(block).load())


@dataclass(frozen=True)
class KvOperand:
    """K or V: the copy atom, the tensor it reads, and the slots that it fills."""

    tile: Constexpr[KvTile]
    atom: cute.CopyAtom
    mX: cute.Tensor
    sX: cute.Tensor  # (rows, d, slots)

    def source(self, args: ForwardArgs, work: Work, head: Int32, first_chunk: Any) -> Any:
        """Where the blocks of one head of one sequence come from."""
        seqlen, tma = work.seqlen, (self.atom, self.mX)
        boxes = cute.make_tensor(self.sX.iterator, self.tile.box_layout(cute.size(self.sX, [2])))
        if args.mPageTable is not None:
            mPages = args.mPageTable[work.tile.batch, None]
            there = (head, seqlen.seqlen_k)
            return PagedKv.of(self.tile, tma, boxes, there, mPages, first_chunk)
        where = (head, seqlen.batch_k, seqlen.offset_k)
        return DenseKv.of(self.tile, tma, boxes, where, first_chunk)


@dataclass(frozen=True)
class TmaKeys:
    """One warp brings K and V by TMA."""

    cfg: Constexpr[TileConfig]
    guard_v: Constexpr[bool]  # rows past seqlen_k may hold anything: TMA did not zero them
    k: KvOperand
    v: KvOperand
    v_tail: cute.CopyAtom  # as v's, but it signals this CTA's own barriers
    rings: Rings
    tail_barrier: cute.Pointer  # full when a block of V that must be cleared has arrived

    def streams(self, args: ForwardArgs, work: Work, head: Int32) -> tuple[KvStream, KvStream]:
        cfg, rank = self.cfg, pair.rank(self.cfg.ctas)
        k = self.k.source(args, work, head, 0)
        v = self.v.source(args, work, head, rank * self.v.tile.num_chunks)
        first, seqlen_k = work.block(0), work.seqlen.seqlen_k
        return (
            KvStream.of(k, first * cfg.ctas + rank, seqlen_k),
            KvStream.of(v, first, seqlen_k),
        )

    @cute.jit
    def load_k(self, k: KvStream, blocks: tuple, slot: Int32, phase: Int32):
        """This CTA's keys of a block of K; `blocks` are its number and that of the next."""
        cfg, ring, rank = self.cfg, self.rings.kv, pair.rank(self.cfg.ctas)
        ring.wait_empty(slot, phase)
        ring.expect("load", slot, cfg.k_rows * cfg.head_dim * ELEMENT_BYTES)
        k.source.copy(blocks[0] * cfg.ctas + rank, slot, ring.full(slot), (k.pages, 0))
        k.look_ahead(blocks[1] * cfg.ctas + rank)

    @cute.jit
    def load_v(self, v: KvStream, blocks: tuple, at: tuple, tail_phase: Int32) -> Int32:
        """This CTA's columns of a block of V; `at` is (slot, phase).

        Returns the next tail phase. Rows past the end are zeroed: P is 0 there, but 0 * NaN would
        reach O.
        """
        ring, (slot, phase) = self.rings.kv, at
        num_bytes = BLOCK_N * self.cfg.v_columns * ELEMENT_BYTES
        ring.wait_empty(slot, phase)
        rows = v.seqlen_k - blocks[0] * BLOCK_N
        if const_expr(self.guard_v) and rows < BLOCK_N:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(self.tail_barrier, num_bytes)
            copies = replace(v.source.copies, atom=self.v_tail)
            source = replace(v.source, copies=copies)
            source.copy(blocks[0], slot, self.tail_barrier, (v.pages, 0))
            cute.arch.mbarrier_wait(self.tail_barrier, tail_phase)
            clear_rows(self.v.sX[None, None, slot], rows)
            ring.arrive_full("load", slot, stored=True)
            tail_phase ^= 1
        else:
            ring.expect("load", slot, num_bytes)
            v.source.copy(blocks[0], slot, ring.full(slot), (v.pages, 0))
        v.look_ahead(blocks[1])
        return tail_phase


@dataclass(frozen=True)
class GatheredKeys:
    """One warp gathers K, another V, where pages are too small or too odd for TMA.

    Both run through all fillings of the ring, and pass over the other's. Alone, a CTA does not wait
    for its copies: they arrive when they are done, and whoever waits for the slot makes them
    visible to the tensor core (`Ring.wait_full`). In a pair they must arrive at the leader, which
    only threads can: the warp waits for them.
    """

    cfg: Constexpr[TileConfig]
    is_k: Constexpr[bool]
    tile: Constexpr[KvTile]
    mX: cute.Tensor  # (page_size, d, heads, pages)
    slots: Int32  # address of the ring's slots
    rings: Rings

    def streams(self, args: ForwardArgs, work: Work, head: Int32) -> tuple[KvStream, KvStream]:
        """The same stream twice: the warp's own."""
        assert args.mPageTable is not None, "only pages are gathered"
        cfg, rank = self.cfg, pair.rank(self.cfg.ctas)
        mPages = args.mPageTable[work.tile.batch, None]
        first_column = 0 if self.is_k else rank * cfg.v_columns
        source = GatheredKv(
            self.tile,
            self.mX[None, None, head, None],
            self.slots,
            mPages,
            work.seqlen.seqlen_k,
            Int32(first_column),
        )
        first = work.block(0) * cfg.ctas + rank if self.is_k else work.block(0)
        stream = KvStream.of(source, first, work.seqlen.seqlen_k)
        return stream, stream

    @cute.jit
    def load_k(self, k: KvStream, blocks: tuple, slot: Int32, phase: Int32):
        """This CTA's keys of a block of K; `blocks` are its number and that of the next."""
        cfg, rank = self.cfg, pair.rank(self.cfg.ctas)
        if const_expr(self.is_k):
            own, following = (block * cfg.ctas + rank for block in blocks)
            self.fill(k, (own, following), slot, phase)

    @cute.jit
    def load_v(self, v: KvStream, blocks: tuple, at: tuple, tail_phase: Int32) -> Int32:
        """This CTA's columns of a block of V; `at` as in TmaKeys, there is no tail."""
        if const_expr(not self.is_k):
            self.fill(v, blocks, at[0], at[1])
        return tail_phase

    @cute.jit
    def fill(self, stream: KvStream, blocks: tuple, slot: Int32, phase: Int32):
        ring = self.rings.kv
        ring.wait_empty(slot, phase)
        stream.source.copy(blocks[0], slot, stream.pages)
        if const_expr(self.cfg.ctas == 1):
            ring.arrive_copies("gather", slot)
            stream.look_ahead(blocks[1])
        else:
            cute.arch.cp_async_commit_group()
            stream.look_ahead(blocks[1])
            cute.arch.cp_async_wait_group(0)
            cute.arch.fence_proxy("async.shared", space="cta")
            ring.arrive_full("load", slot, stored=True)

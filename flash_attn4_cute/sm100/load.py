"""The load role: one warp issues every TMA copy of the CTA."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.tma import TmaOperand
from . import pair
from .rings import Cursor, Rings
from .tiles import BLOCK_M, BLOCK_N, ELEMENT_BYTES, WARP_SIZE, TileConfig
from .work import WorkQueue

CLEAR_ELEMENTS = 8  # 16 bytes a store


@dataclass(frozen=True)
class LoadRole:
    """Feeds the slots of Q, and the ring of K and V: K, V, K, V, the last block first."""

    cfg: Constexpr[TileConfig]
    guard_v: Constexpr[bool]  # rows past seqlen_k may hold anything: TMA did not zero them
    q: TmaOperand
    k: TmaOperand
    v: TmaOperand
    v_tail: cute.CopyAtom  # as v's, but it signals this CTA's own barriers
    rings: Rings
    tail_barrier: cute.Pointer  # full when a block of V that must be cleared has arrived
    queue: WorkQueue
    heads_per_kv_head: Int32

    @cute.jit
    def run(self, args: ForwardArgs):
        cfg = self.cfg
        kv = Cursor.start(cfg.kv_stages)
        q_phase, tail_phase = Int32(0), Int32(0)
        turn = Int32(0)
        while self.queue.has_work(turn):
            work = self.queue.work(args, turn)
            if work.num_blocks > 0:
                tile, seqlen = work.tile, work.seqlen
                kv_head = tile.head // self.heads_per_kv_head
                tQ = self.q.tiles(tile.head, tile.batch, seqlen.offset_q)
                tK = self.k.tiles(kv_head, seqlen.batch_k, seqlen.offset_k)
                tV = self.v.tiles(kv_head, seqlen.batch_k, seqlen.offset_k, pair.rank(cfg.ctas))
                for i in cutlass.range(work.num_blocks, unroll=1):
                    n_block = work.last_block - i
                    if i == 0:
                        self.load_q(tQ, work.tile.m_block, 0, q_phase)
                    self.load_k(tK, n_block, kv.slot, kv.phase)
                    kv = kv.next()
                    # Q1 is needed only after Q0 K^T has been issued.
                    if i == 0:
                        self.load_q(tQ, work.tile.m_block, 1, q_phase)
                    rows = seqlen.seqlen_k - n_block * cfg.block_n
                    tail_phase = self.load_v(tV, n_block, (kv.slot, kv.phase), rows, tail_phase)
                    kv = kv.next()
                q_phase ^= 1
            turn += 1
        self.wait_for_pair(kv, q_phase)

    @cute.jit
    def wait_for_pair(self, kv: Cursor, q_phase: Int32):
        """Wait until all slots are free: no arrival of the leader's is then on its way to here."""
        cfg = self.cfg
        if const_expr(cfg.ctas == 2):
            for _ in cutlass.range_constexpr(cfg.kv_stages):
                self.rings.kv.wait_empty(kv.slot, kv.phase)
                kv = kv.next()
            for tile in cutlass.range_constexpr(cfg.q_tiles):
                self.rings.q.wait_empty(tile, q_phase)

    @cute.jit
    def load_q(self, tQ: tuple, m_block: Int32, tile: Constexpr[int], phase: Int32):
        cfg, (tQsQ, tQgQ) = self.cfg, tQ
        self.rings.q.wait_empty(tile, phase)
        self.rings.q.expect("load", tile, BLOCK_M * cfg.head_dim * ELEMENT_BYTES)
        cute.copy(
            self.q.atom,
            tQgQ[None, (m_block * cfg.q_tiles + tile) * cfg.ctas + pair.rank(cfg.ctas)],
            tQsQ[None, tile],
            tma_bar_ptr=self.rings.q.full(tile),
        )

    @cute.jit
    def load_k(self, tK: tuple, n_block: Int32, slot: Int32, phase: Int32):
        """This CTA's keys of a block of K."""
        cfg, (tKsK, tKgK) = self.cfg, tK
        self.rings.kv.wait_empty(slot, phase)
        self.rings.kv.expect("load", slot, cfg.k_rows * cfg.head_dim * ELEMENT_BYTES)
        cute.copy(
            self.k.atom,
            tKgK[None, n_block * cfg.ctas + pair.rank(cfg.ctas)],
            tKsK[None, slot],
            tma_bar_ptr=self.rings.kv.full(slot),
        )

    @cute.jit
    def load_v(self, tV: tuple, n_block: Int32, at: tuple, rows: Int32, tail_phase: Int32) -> Int32:
        """This CTA's columns of a block of V, of which the first `rows` rows count.

        Returns the next tail phase. Rows past the end are zeroed: P is 0 there, but 0 * NaN would
        reach O.
        """
        (tVsV, tVgV), (slot, phase) = tV, at
        num_bytes = BLOCK_N * self.cfg.v_columns * ELEMENT_BYTES
        self.rings.kv.wait_empty(slot, phase)
        if const_expr(self.guard_v) and rows < BLOCK_N:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(self.tail_barrier, num_bytes)
            cute.copy(
                self.v_tail,
                tVgV[None, n_block],
                tVsV[None, slot],
                tma_bar_ptr=self.tail_barrier,
            )
            cute.arch.mbarrier_wait(self.tail_barrier, tail_phase)
            clear_rows(self.v.sX[None, None, slot], rows)
            self.rings.kv.arrive_full("load", slot, stored=True)
            tail_phase ^= 1
        else:
            self.rings.kv.expect("load", slot, num_bytes)
            cute.copy(
                self.v.atom,
                tVgV[None, n_block],
                tVsV[None, slot],
                tma_bar_ptr=self.rings.kv.full(slot),
            )
        return tail_phase


@cute.jit
def clear_rows(sV: cute.Tensor, rows: Int32):
    """Zero the rows >= `rows` of a block of V (block_n, d), by one warp."""
    per_row = cute.size(sV, mode=[1]) // CLEAR_ELEMENTS
    zeros = cute.make_rmem_tensor(CLEAR_ELEMENTS, sV.element_type)
    zeros.fill(0.0)
    missing = (BLOCK_N - rows) * per_row
    for i in cutlass.range(cute.arch.lane_idx(), missing, WARP_SIZE, unroll=1):
        target = cute.local_tile(sV, (1, CLEAR_ELEMENTS), (rows + i // per_row, i % per_row))
        cute.autovec_copy(
            zeros, cute.make_tensor(target.iterator, cute.make_layout(CLEAR_ELEMENTS))
        )
    # The tensor core reads the block through the async proxy.
    cute.arch.fence_proxy("async.shared", space="cta")

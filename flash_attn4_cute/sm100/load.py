"""The load role: one warp issues every TMA copy of the CTA."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from ..common.tma import TmaOperand
from .rings import Cursor, Rings
from .tiles import BLOCK_M, BLOCK_N, ELEMENT_BYTES, NUM_Q_TILES, WARP_SIZE, TileConfig
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
    rings: Rings
    tail_barrier: cute.Pointer  # full when a block of V that must be cleared has arrived
    queue: WorkQueue
    heads_per_kv_head: Int32

    @cute.jit
    def run(self, args: ForwardArgs):
        cfg, rings = self.cfg, self.rings
        kv = Cursor.start(cfg.kv_stages)
        q_phase, tail_phase = Int32(0), Int32(0)
        turn = Int32(0)
        while self.queue.has_work(turn):
            work = self.queue.work(args, turn)
            if work.num_blocks > 0:
                tile, seqlen = work.tile, work.seqlen
                kv_head = tile.head // self.heads_per_kv_head
                tQsQ, tQgQ = self.q.tiles(tile.head, tile.batch, seqlen.offset_q)
                tKsK, tKgK = self.k.tiles(kv_head, seqlen.batch_k, seqlen.offset_k)
                tVsV, tVgV = self.v.tiles(kv_head, seqlen.batch_k, seqlen.offset_k)
                for i in cutlass.range(work.num_blocks, unroll=1):
                    n_block = work.last_block - i
                    if i == 0:
                        self.load_q(tQsQ, tQgQ, work.tile.m_block, 0, q_phase)
                    rings.kv.wait_empty(kv.slot, kv.phase)
                    rings.kv.expect("load", kv.slot, self.block_bytes(cfg.head_dim))
                    cute.copy(
                        self.k.atom,
                        tKgK[None, n_block],
                        tKsK[None, kv.slot],
                        tma_bar_ptr=rings.kv.full(kv.slot),
                    )
                    kv = kv.next()
                    # Q1 is needed only after Q0 K^T has been issued.
                    if i == 0:
                        self.load_q(tQsQ, tQgQ, work.tile.m_block, 1, q_phase)
                    rings.kv.wait_empty(kv.slot, kv.phase)
                    rows = seqlen.seqlen_k - n_block * cfg.block_n
                    if const_expr(self.guard_v) and rows < cfg.block_n:
                        self.load_tail(tVsV, tVgV[None, n_block], kv.slot, rows, tail_phase)
                        tail_phase ^= 1
                    else:
                        rings.kv.expect("load", kv.slot, self.block_bytes(cfg.head_dim_v))
                        cute.copy(
                            self.v.atom,
                            tVgV[None, n_block],
                            tVsV[None, kv.slot],
                            tma_bar_ptr=rings.kv.full(kv.slot),
                        )
                    kv = kv.next()
                q_phase ^= 1
            turn += 1

    def block_bytes(self, columns: int) -> int:
        return BLOCK_N * columns * ELEMENT_BYTES

    @cute.jit
    def load_q(self, tQsQ: cute.Tensor, tQgQ: cute.Tensor, m_block: Int32, tile, phase: Int32):
        self.rings.q.wait_empty(tile, phase)
        self.rings.q.expect("load", tile, BLOCK_M * self.cfg.head_dim * ELEMENT_BYTES)
        cute.copy(
            self.q.atom,
            tQgQ[None, m_block * NUM_Q_TILES + tile],
            tQsQ[None, tile],
            tma_bar_ptr=self.rings.q.full(tile),
        )

    @cute.jit
    def load_tail(self, tVsV: cute.Tensor, tVgV: cute.Tensor, slot: Int32, rows: Int32, phase):
        """Load a block of V of which only `rows` rows count, and zero the others.

        P is 0 there, but 0 * NaN would reach O.
        """
        with cute.arch.elect_one():
            num_bytes = self.block_bytes(self.cfg.head_dim_v)
            cute.arch.mbarrier_arrive_and_expect_tx(self.tail_barrier, num_bytes)
        cute.copy(self.v.atom, tVgV, tVsV[None, slot], tma_bar_ptr=self.tail_barrier)
        cute.arch.mbarrier_wait(self.tail_barrier, phase)
        clear_rows(self.v.sX[None, None, slot], rows)
        self.rings.kv.arrive_full("load", slot)


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

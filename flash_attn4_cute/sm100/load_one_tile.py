"""The load role where a CTA has one Q tile: K is a block ahead of V, as the products are."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..arguments import ForwardArgs
from . import pair
from .load import LoadRole
from .rings import Cursor


@dataclass(frozen=True)
class LoadOneTileRole(LoadRole):
    """As LoadRole, in the order of MmaOneTileRole: K, K, V, K, V, ..., V."""

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
                self.load_q(tQ, tile.m_block, 0, q_phase)
                self.load_k(tK, work.last_block, kv.slot, kv.phase)
                kv = kv.next()
                for i in cutlass.range(work.num_blocks, unroll=1):
                    n_block = work.last_block - i
                    if i < work.num_blocks - 1:
                        self.load_k(tK, n_block - 1, kv.slot, kv.phase)
                        kv = kv.next()
                    rows = seqlen.seqlen_k - n_block * cfg.block_n
                    tail_phase = self.load_v(tV, n_block, (kv.slot, kv.phase), rows, tail_phase)
                    kv = kv.next()
                q_phase ^= 1
            turn += 1
        self.wait_for_pair(kv, q_phase)

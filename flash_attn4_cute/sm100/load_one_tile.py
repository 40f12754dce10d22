"""The load role where a CTA has one Q tile: K is a block ahead of V, as the products are."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..arguments import ForwardArgs
from .load import LoadRole
from .rings import Cursor


@dataclass(frozen=True)
class LoadOneTileRole(LoadRole):
    """As LoadRole, in the order of MmaOneTileRole: K, K, V, K, V, ..., V."""

    @cute.jit
    def run(self, args: ForwardArgs):
        cfg, keys = self.cfg, self.keys
        self.clear_idle_rows()
        kv = Cursor.start(cfg.kv_stages)
        q_phase, tail_phase = Int32(0), Int32(0)
        turn = Int32(0)
        while self.queue.has_work(turn):
            work = self.queue.work(args, turn)
            if work.num_blocks > 0:
                kv_head = work.tile.head // self.heads_per_kv_head
                queries = self.boxes(work)
                k, v = keys.streams(args, work, kv_head)
                keys.load_k(k, (work.block(0), work.block(1)), kv.slot, kv.phase)
                kv = kv.next()
                self.load_q(queries, work, 0, q_phase)
                for i in cutlass.range(work.num_blocks, unroll=1):
                    blocks = work.block(i), work.block(i + 1)
                    if i < work.num_blocks - 1:
                        keys.load_k(k, (blocks[1], work.block(i + 2)), kv.slot, kv.phase)
                        kv = kv.next()
                    tail_phase = keys.load_v(v, blocks, (kv.slot, kv.phase), tail_phase)
                    kv = kv.next()
                q_phase ^= 1
            turn += 1
        self.wait_for_pair(kv, q_phase)

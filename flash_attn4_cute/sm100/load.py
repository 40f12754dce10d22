"""The load role: one warp fills the slots of Q, and those of K and V.

Who brings blocks of K and V, TMA or cp.async, is an object: see `keys`.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from .query import QueryLoader
from .rings import Cursor, Rings
from .tiles import TileConfig
from .work import WorkQueue


@dataclass(frozen=True)
class LoadRole:
    """Feeds the slots of Q, and the ring of K and V: K, V, K, V, the last block first."""

    cfg: Constexpr[TileConfig]
    q: QueryLoader | None  # None: another warp has it
    keys: Any  # TmaKeys or GatheredKeys
    rings: Rings
    queue: WorkQueue
    heads_per_kv_head: Int32

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
                for i in cutlass.range(work.num_blocks, unroll=1):
                    blocks = work.block(i), work.block(i + 1)
                    keys.load_k(k, blocks, kv.slot, kv.phase)
                    kv = kv.next()
                    # The slots of Q are the last to be free, behind the work before.
                    if i == 0:
                        for tile in cutlass.range_constexpr(cfg.q_tiles):
                            self.load_q(queries, work, tile, q_phase)
                    # While V waits for its slot, the next tile can be found.
                    if i == work.num_blocks - 1:
                        self.ask()
                    tail_phase = keys.load_v(v, blocks, (kv.slot, kv.phase), tail_phase)
                    kv = kv.next()
                q_phase ^= 1
            else:
                self.ask()
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
            for slot in cutlass.range_constexpr(cfg.q_tiles * cfg.q_parts):
                self.rings.q.wait_empty(slot, q_phase)

    @cute.jit
    def ask(self):
        """Ask for the next piece of work, by the warp that has Q."""
        if const_expr(self.q is not None):
            self.queue.ask()

    @cute.jit
    def clear_idle_rows(self):
        if const_expr(self.q is not None):
            self.q.clear_idle_rows()

    def boxes(self, work):
        """The boxes of Q, where this warp loads it."""
        return None if self.q is None else self.q.boxes(work)

    @cute.jit
    def load_q(self, boxes: Any, work, tile: Constexpr[int], phase: Int32):
        if const_expr(self.q is not None):
            self.q.load(boxes, work, tile, phase)

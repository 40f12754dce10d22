"""The MMA role: one thread issues every product, for two Q tiles in turn.

    Q0 K0  Q1 K0 | P0 V0  Q0 K1  P1 V0  Q1 K1 | P0 V1  Q0 K2 ... | P0 Vn  P1 Vn

While the softmax of one tile works on its scores, the tensor core works for the other.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, const_expr

from ..arguments import ForwardArgs
from .products import STEP, Products, SmemOperand, multiply
from .rings import Cursor, Ring, Rings
from .tiles import BLOCK_N
from .tmem import TmemMap, fence_after_sync
from .work import WorkQueue

HEAD_STEPS = 6  # of the 8 steps of P V: those that do not wait for the rest of P


@dataclass(frozen=True)
class MmaRole:
    """Consumes Q, K, V and P, produces S and O."""

    products: Constexpr[Products]
    tmem: Constexpr[TmemMap]
    q: SmemOperand
    k: SmemOperand
    v: SmemOperand
    rings: Rings
    queue: WorkQueue

    @cute.jit
    def run(self, args: ForwardArgs):
        cfg, rings = self.products.cfg, self.rings
        kv = Cursor.start(cfg.kv_stages)
        q_phase, p_phase = Int32(0), Int32(0)
        turn = Int32(0)
        while self.queue.has_work(turn):
            work = self.queue.work(args, turn)
            if work.num_blocks > 0:
                rings.kv.wait_full(kv.slot, kv.phase)
                for tile in cutlass.range_constexpr(cfg.q_tiles):
                    rings.q.wait_full(tile, q_phase)
                    self.issue_qk(tile, kv.slot)
                self.free(rings.kv, kv.slot)
                kv = kv.next()
                for i in cutlass.range(work.num_blocks - 1, unroll=1):
                    v, kv = kv, kv.next()
                    rings.kv.wait_full(v.slot, v.phase)
                    for tile in cutlass.range_constexpr(cfg.q_tiles):
                        self.issue_pv(tile, v.slot, p_phase, i > 0)
                        if const_expr(tile == 0):
                            rings.kv.wait_full(kv.slot, kv.phase)
                        else:
                            self.free(rings.kv, v.slot)
                        self.issue_qk(tile, kv.slot)
                    self.free(rings.kv, kv.slot)
                    kv = kv.next()
                    p_phase ^= 1
                for tile in cutlass.range_constexpr(cfg.q_tiles):
                    self.free(rings.q, tile)
                rings.kv.wait_full(kv.slot, kv.phase)
                for tile in cutlass.range_constexpr(cfg.q_tiles):
                    self.issue_pv(tile, kv.slot, p_phase, work.num_blocks > 1)
                    with cute.arch.elect_one():
                        rings.o.commit_full("mma", tile)
                self.free(rings.kv, kv.slot)
                kv = kv.next()
                p_phase ^= 1
                q_phase ^= 1
            turn += 1

    @cute.jit
    def free(self, ring: Ring, slot):
        """Free a slot once the products issued so far have read it."""
        with cute.arch.elect_one():
            ring.commit_empty("mma", slot)

    def lower_q(self, tile: int, slot: Int32) -> Int32:
        """The lower word of the descriptor of a Q tile, plus 0, which only a `slot` knows.

        If it were the same in every turn of the loop, ptxas would work out the descriptors of all
        steps before it, and spill them: up to 144 bytes at d 192.
        """
        return self.q.lower(tile) + (slot >> 16)

    @cute.jit
    def issue_qk(self, tile: Constexpr[int], slot: Int32):
        """S = Q K^T for one Q tile and the block in `slot`."""
        cfg = self.products.cfg
        target = (self.tmem.s[tile], self.products.instruction(BLOCK_N, False), cfg.ctas)
        q, k = (self.q, self.lower_q(tile, slot)), (self.k, self.k.lower(slot))
        with cute.arch.elect_one():
            multiply(target, q, k, range(cfg.head_dim // STEP), 0)
            self.rings.s.commit_full("mma", tile)

    @cute.jit
    def issue_pv(self, tile: Constexpr[int], slot: Int32, phase: Int32, accumulate: Boolean):
        """O = P V, or O += P V, for one Q tile and the block in `slot`; the caller commits."""
        self.rings.p.wait_full(tile, phase)
        fence_after_sync()
        self.issue_pv_steps(tile, slot, Int32(accumulate), range(HEAD_STEPS))
        self.rings.p_tail.wait_full(tile, phase)
        fence_after_sync()
        self.issue_pv_steps(tile, slot, Int32(1), range(HEAD_STEPS, BLOCK_N // STEP))

    @cute.jit
    def issue_pv_steps(self, tile: Constexpr[int], slot: Int32, accumulate: Int32, steps):
        cfg = self.products.cfg
        target = (self.tmem.o[tile], self.products.instruction(cfg.head_dim_v, True), cfg.ctas)
        v = (self.v, self.v.lower(slot))
        with cute.arch.elect_one():
            multiply(target, self.tmem.p[tile], v, steps, accumulate)

"""The MMA role: one thread issues every product, for two Q tiles in turn.

    Q0 K0  Q1 K0 | P0 V0  Q0 K1  P1 V0  Q1 K1 | ... | P0 Vn  Q0' K0'  P1 Vn  Q1' K0' | ...

While the softmax of one tile works on its scores, the tensor core works for the other: also where
one piece of work follows another (Q', K'), whose first scores come before the last P V is due.

Where P has columns of its own, the next scores of a tile need not wait for P V, and come first:

    Q0 K0  Q1 K0 | Q0 K1  P0 V0  Q1 K1  P1 V0 | ... | Q0' K0'  P0 Vn  Q1' K0'  P1 Vn | ...
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

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
        # Bits by Q tile: whether P V of the block before, of this or the last piece of work, is
        # still to come, whether it adds to O, and the phase of P that it waits for.
        pending, adds, p_phases = Int32(0), Int32(0), Int32(0)
        q_phase, turn = Int32(0), Int32(0)
        while self.queue.has_work(turn):
            work = self.queue.work(args, turn)
            # Without a block, the last P V before it is still due: the correction waits for it, and
            # a queue may wait for the correction.
            for i in cutlass.range(cutlass.max(work.num_blocks, 1), unroll=1):
                v = kv
                if pending != 0:
                    kv = kv.next()
                for tile in cutlass.range_constexpr(cfg.q_tiles):
                    bit, first = 1 << tile, work.first_block(tile)
                    is_scored = i >= first and i < work.num_blocks
                    if const_expr(cfg.p_apart) and is_scored:
                        # The scores before these, of whose P a product may be pending, are read.
                        rings.s.wait_empty(tile, (p_phases ^ pending) >> tile & 1)
                        fence_after_sync()
                        self.issue_scores(tile, kv, q_phase, i == first, i == work.num_blocks - 1)
                    if pending & bit != 0:
                        rings.kv.wait_full(v.slot, v.phase)
                        self.issue_pv(tile, v.slot, p_phases >> tile & 1, adds >> tile & 1)
                        p_phases ^= bit
                        if const_expr(cfg.p_apart) or i == 0:
                            self.tell_of_o(tile)
                        if const_expr(tile == cfg.q_tiles - 1):
                            self.free(rings.kv, v.slot)
                    if const_expr(not cfg.p_apart) and is_scored:
                        self.issue_scores(tile, kv, q_phase, i == first, i == work.num_blocks - 1)
                    pending = pending | bit if is_scored else pending & ~bit
                    adds = adds | bit if i > first else adds & ~bit
                if i < work.num_blocks:
                    self.free(rings.kv, kv.slot)
                    kv = kv.next()
            if work.num_blocks > 0:
                q_phase ^= 1
            turn += 1
        if pending != 0:
            rings.kv.wait_full(kv.slot, kv.phase)
            for tile in cutlass.range_constexpr(cfg.q_tiles):
                self.issue_pv(tile, kv.slot, p_phases >> tile & 1, adds >> tile & 1)
                self.tell_of_o(tile)
            self.free(rings.kv, kv.slot)

    @cute.jit
    def issue_scores(self, tile: Constexpr[int], k: Cursor, q_phase: Int32, first, last):
        """S of one Q tile and one block, the first and the last one to need the tile or not."""
        if first:
            self.rings.q.wait_full(tile, q_phase)
        self.rings.kv.wait_full(k.slot, k.phase)
        self.issue_qk(tile, k.slot)
        if last:
            self.free(self.rings.q, tile)

    @cute.jit
    def tell_of_o(self, tile: Constexpr[int]):
        """O of the tile is whole once the products issued so far are done."""
        with cute.arch.elect_one():
            self.rings.o.commit_full("mma", tile)

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
    def issue_pv(self, tile: Constexpr[int], slot: Int32, phase: Int32, accumulate: Int32):
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

"""The MMA role where a CTA has one Q tile: its even and odd key blocks take turns.

    Q K0 | Q K1  P0 V0 | Q K2  P1 V1 | ... | Q' K0'  Pn Vn | Q' K1'  P0' V0' | ...

While the softmax of one block is at work, the tensor core is a product ahead and a product behind:
also where one piece of work follows another (Q', K').
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from ..arguments import ForwardArgs
from .mma import HEAD_STEPS, MmaRole
from .products import STEP, multiply
from .rings import Cursor
from .tiles import BLOCK_N, SCORE_SLOTS
from .tmem import fence_after_sync


@dataclass(frozen=True)
class MmaOneTileRole(MmaRole):
    """As MmaRole; S and P of block i are in the slot i % 2."""

    @cute.jit
    def run(self, args: ForwardArgs):
        rings = self.rings
        kv = Cursor.start(self.products.cfg.kv_stages)
        s, p = Cursor.start(SCORE_SLOTS), Cursor.start(SCORE_SLOTS)
        q_phase, turn = Int32(0), Int32(0)
        # Whether P V of the block before, of this or the last piece of work, is still to come, and
        # adds to O.
        pending, adds = Boolean(False), Boolean(False)
        while self.queue.has_work(turn):
            work = self.queue.work(args, turn)
            for i in cutlass.range(work.num_blocks, unroll=1):
                k, v = kv, kv.next()
                if pending:
                    if i == 0:
                        # The last V of the piece of work before has come first.
                        k, v = v, k
                    kv = kv.next()
                kv = kv.next()
                rings.kv.wait_full(k.slot, k.phase)
                uses_q = (q_phase, i == 0, i == work.num_blocks - 1)
                self.issue_block_qk(s.slot, k.slot, uses_q)
                self.free(rings.kv, k.slot)
                s = s.next()
                if pending:
                    rings.kv.wait_full(v.slot, v.phase)
                    self.issue_block_pv(p.slot, v.slot, p.phase, adds)
                    self.free(rings.kv, v.slot)
                    p = p.next()
                pending, adds = Boolean(True), i > 0
            if work.num_blocks > 0:
                q_phase ^= 1
            turn += 1
        if pending:
            rings.kv.wait_full(kv.slot, kv.phase)
            self.issue_block_pv(p.slot, kv.slot, p.phase, adds)
            self.free(rings.kv, kv.slot)

    @cute.jit
    def issue_block_qk(self, scores: Int32, slot: Int32, uses_q: tuple):
        """S = Q K^T for the block of K in `slot`, into the slot `scores` of tensor memory.

        `uses_q`: the phase of Q, and whether this is the first and the last block to need it. Its
        parts are awaited and given back one by one, so that the next Q comes in time.
        """
        phase, first, last = uses_q
        cfg = self.products.cfg
        target = (self.tmem.s_at(scores), self.products.instruction(BLOCK_N, False), cfg.ctas)
        q, k = (self.q, self.lower_q(0, slot)), (self.k, self.k.lower(slot))
        per_part = cfg.head_dim // STEP // cfg.q_parts
        for part in cutlass.range_constexpr(cfg.q_parts):
            if first:
                self.rings.q.wait_full(part, phase)
            steps = range(part * per_part, (part + 1) * per_part)
            with cute.arch.elect_one():
                multiply(target, q, k, steps, int(part > 0))
            if last:
                self.free(self.rings.q, part)
        with cute.arch.elect_one():
            self.rings.s.commit_full("mma", scores)

    @cute.jit
    def issue_block_pv(self, scores: Int32, slot: Int32, phase: Int32, accumulate: Boolean):
        """O = P V, or O += P V, for the block of V in `slot`, and tell of its end."""
        self.rings.p.wait_full(scores, phase)
        fence_after_sync()
        self.issue_block_steps(scores, slot, Int32(accumulate), range(HEAD_STEPS))
        self.rings.p_tail.wait_full(scores, phase)
        fence_after_sync()
        self.issue_block_steps(scores, slot, Int32(1), range(HEAD_STEPS, BLOCK_N // STEP))
        with cute.arch.elect_one():
            self.rings.o.commit_full("mma", 0)

    @cute.jit
    def issue_block_steps(self, scores: Int32, slot: Int32, accumulate: Int32, steps):
        cfg = self.products.cfg
        target = (self.tmem.o[0], self.products.instruction(cfg.head_dim_v, True), cfg.ctas)
        v = (self.v, self.v.lower(slot))
        with cute.arch.elect_one():
            multiply(target, self.tmem.p_at(scores), v, steps, accumulate)

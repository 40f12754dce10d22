"""The load role of the decode kernel: one warp issues every TMA copy of the CTA."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute

from .decode_work import DecodeWork


@dataclass(frozen=True)
class DecodeLoadRole:
    """Feeds the ring with blocks of K and V, from the last of this CTA's share to the first."""

    k: Any  # DenseKv or PagedKv
    v: Any
    kv_ring: Any
    work: DecodeWork

    @cute.jit
    def run(self):
        kv_ring, reach = self.kv_ring, self.k.reach
        places = self.k.look_up(self.work.hi - 1)
        following = cute.make_fragment_like(places)
        for i in cutlass.range(self.work.hi - self.work.lo, unroll=1):
            block, turn = self.work.hi - 1 - i, i % reach
            if i > 0 and turn == 0:
                places.store(following.load())
            slot = kv_ring.acquire_and_advance()
            self.k.copy(block, slot.index, slot.barrier, (places, turn))
            slot = kv_ring.acquire_and_advance()
            self.v.copy(block, slot.index, slot.barrier, (places, turn))
            if turn == 0:
                # The table is read while the ring is full.
                following.store(self.k.look_up(block - reach).load())

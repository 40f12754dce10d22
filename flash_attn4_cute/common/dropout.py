"""The dropout mask, drawn where the probabilities are: Philox4x32-10.

The layout of key and counter is the cpu variant's (cpu/dropout.py), so that a seed means the same
mask on every device: for query i and key j of query head h in sequence b,

    counter = (j div 4, i, b * num_heads + h, offset)    word = philox(counter, seed)[j mod 4]

and an element is kept iff word >= floor(p * 2^32). Reference: Salmon et al., SC 2011.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Uint32, Uint64, const_expr

from ..arguments import ForwardArgs
from .scheduler import WorkTile

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


@dataclass(frozen=True)
class Dropout:
    """Drops elements of one warp's rows of P; `present` False drops nothing."""

    present: Constexpr[bool]
    seed: tuple  # low and high word
    offset: Uint32
    stream: Uint32  # b * num_heads + h
    threshold: Uint32
    lane: Int32

    @staticmethod
    @cute.jit
    def of(
        present: Constexpr[bool], args: ForwardArgs, work: WorkTile, num_heads: Int32, lane: Int32
    ) -> "Dropout":
        seed, offset, threshold = (Uint32(0), Uint32(0)), Uint32(0), Uint32(0)
        if const_expr(present):
            word = Uint64(args.score.mDropoutState[0])
            seed = (Uint32(word & 0xFFFFFFFF), Uint32(word >> 32))
            offset = Uint32(Uint64(args.score.mDropoutState[1]) & 0xFFFFFFFF)
            threshold = args.score.dropout_threshold
        stream = Uint32(work.batch * num_heads + work.head)
        return Dropout(present, seed, offset, stream, threshold, lane)

    @cute.jit
    def apply(self, acc_mn: cute.Tensor, row: Int32, key: Int32):
        """Zero the dropped elements of accumulator columns whose corner is (`row`, `key`).

        `key` is a multiple of 8. A lane holds two neighbouring columns of each n8 tile, half of
        what one evaluation yields.
        """
        upper = self.lane % 2 == 1
        for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
            i = Uint32(row + self.lane // 4 + 8 * r)
            for tile in cutlass.range_constexpr(cute.size(acc_mn, mode=[1]) // 2):
                j = Uint32(key // 4 + 2 * tile + self.lane % 4 // 2)
                words = philox((j, i, self.stream, self.offset), self.seed)
                for half in cutlass.range_constexpr(2):
                    word = words[2 + half] if upper else words[half]
                    p = acc_mn[r, 2 * tile + half]
                    acc_mn[r, 2 * tile + half] = p if word >= self.threshold else 0.0

    @cute.jit
    def apply_to_row(self, p: cute.Tensor, row: Int32, key: Int32):
        """Zero the dropped elements of row `row` from column `key`, a multiple of 4, on."""
        for group in cutlass.range_constexpr(cute.size(p) // 4):
            counter = (Uint32(key // 4 + group), Uint32(row), self.stream, self.offset)
            words = philox(counter, self.seed)
            for c in cutlass.range_constexpr(4):
                kept = p[4 * group + c]
                p[4 * group + c] = kept if words[c] >= self.threshold else 0.0


def philox(counter: tuple, key: tuple) -> tuple:
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0 = Uint64(c0) * Uint64(MULTIPLIERS[0])
        p1 = Uint64(c2) * Uint64(MULTIPLIERS[1])
        c0, c2 = Uint32(p1 >> 32) ^ c1 ^ k0, Uint32(p0 >> 32) ^ c3 ^ k1
        c1, c3 = Uint32(p1), Uint32(p0)
        k0, k1 = k0 + Uint32(WEYL[0]), k1 + Uint32(WEYL[1])
    return c0, c1, c2, c3
